// Attention of 64 query rows a warpgroup to tiles of keys, by the products of sm_90a: as
// attention_tile.cuh, whose accumulators, masks and softmax it has, but K and V are read by the
// tensor cores themselves. Queries and probabilities are the left operand and stay in registers,
// which costs nothing: the layout is that of mma_m16n8k16, a warp's 16 rows after the other's.
#pragma once

#include "attention_tile.cuh"
#include "ptx_sm90.cuh"

namespace dflare {

template <class T, int kHeadDim, int kWarps>
struct AttentionWgmmaTile : AttentionTile<T, kHeadDim, kWarps> {
  using Base = AttentionTile<T, kHeadDim, kWarps>;
  using Base::kKeys, Base::kTileBytes, Base::query, Base::sum, Base::warp;
  static constexpr int kStages = kAttentionWgmmaStages;
  static constexpr int kLineBytes = 128, kPanelBytes = kKeys * kLineBytes;
  static_assert(Base::kQueryInRegisters && kWarps % 4 == 0 && kTileBytes % 1024 == 0);

  static __device__ __forceinline__ int offset(int row, int column) {
    return panel_offset<kKeys>(row, column);
  }
  static __device__ __forceinline__ void publish() { ptx::publish_to_products(); }

  // All warps of a warpgroup multiply, or none.
  __device__ __forceinline__ bool warp_has_rows(const AttentionItem& item) const {
    return item.row_tile * Base::kRows + warp / 4 * 64 < item.rows();
  }

  template <class Copy>
  __device__ __forceinline__ void attend(const AttentionItem& item, ptx::SharedAddress tile,
                                         int begin, int end, Copy copy) {
    float score[kKeys / 8][4] = {};
    ptx::warpgroup_fence();
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const uint64_t keys = ptx::matrix_descriptor(tile + k / 4 * kPanelBytes);
      ptx::warpgroup_mma<T, kKeys, false>(score, query[k], ptx::columns_further(keys, k % 4));
    }
    ptx::warpgroup_commit();
    copy();
    ptx::warpgroup_wait<0>();
    settle(score);
    this->mask(item, score, begin, end);
    this->softmax(score, item.p.scale * 1.4426950408889634f);  // log2(e)
    uint32_t probability[kKeys / 16][4];
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&pair)[4] = score[2 * k + i / 2];
        probability[k][i] = ptx::pack<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
      }
    }
    ptx::warpgroup_fence();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const ptx::SharedAddress values = tile + kTileBytes + k * 16 * kLineBytes;
      ptx::warpgroup_mma<T, kHeadDim, true>(sum, probability[k],
                                            ptx::panels_descriptor(values, kPanelBytes));
    }
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<0>();
    settle(sum);
  }

  template <int kTiles>
  static __device__ __forceinline__ void settle(float (&d)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::settle(d[j][i]);
    }
  }
};

}  // namespace dflare
