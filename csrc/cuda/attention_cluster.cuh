// Merges the parts of a request whose blocks are in one cluster: each leaves its sums, maxima and
// normalisers in its shared memory, then adds some rows of all parts, in order as in
// attention_merge.cuh. Nothing goes through global memory, no part waits for a ticket, and all
// parts share the work.
#pragma once

#include "attention_merge.cuh"

namespace dflare {

template <class T, int kHeadDim, int kWarps>
struct AttentionCluster {
  using Tile = AttentionTile<T, kHeadDim, kWarps>;
  using Result = AttentionResult<T, kHeadDim, kWarps>;
  static constexpr int kRows = Tile::kRows, kVectors = Result::kVectors;
  static constexpr int kRowsAtOnce = Result::kRowsAtOnce;
  // Four rows of a warp's stores, eight floats of each, meet in no bank.
  static constexpr int kSharedStride = kHeadDim + 8;
  static_assert(kRows * (kSharedStride + 2) * 4 <= attention_shared_bytes(kHeadDim, kWarps),
                "a part's result fits where its stages were");

  // `shared` is overwritten. A block merges every parts-th row, from its part's on.
  static __device__ __forceinline__ void merge(const AttentionItem& item, const Tile& t,
                                               void* shared) {
    constexpr int kOwnRows = 2, kParts = 4 / kVectors;  // in flight
    float* own = static_cast<float*>(shared);
    __syncthreads();  // nobody reads the stages any more
    Result::template write_partial<kSharedStride>(
        item, t, [own](int at, float2 pair) { *reinterpret_cast<float2*>(own + at) = pair; });
    ptx::cluster_barrier();  // all parts are there
    const ptx::SharedAddress sums = ptx::shared_address(shared);
    const int all_rows = Result::rows_of(item), step = kRowsAtOnce * item.parts;
#pragma unroll 1
    for (int first = threadIdx.x / Result::kLanes * item.parts + item.part; first < all_rows;
         first += kOwnRows * step) {
      typename Result::Merged merged[kOwnRows];
#pragma unroll 1
      for (int i = 0; i < item.parts; i += kParts) {
        float2 state[kParts][kOwnRows];
        float4 values[kParts][kOwnRows][kVectors];
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
          const int rank = item.rank_of(min(i + k, item.parts - 1));
#pragma unroll
          for (int r = 0; r < kOwnRows; ++r) {
            const int row = min(first + r * step, all_rows - 1);
            state[k][r] =
                ptx::load_from_cluster<float2>(sums + 4 * (kRows * kSharedStride + row * 2), rank);
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
              values[k][r][v] = ptx::load_from_cluster<float4>(
                  sums +
                      4 * (row * kSharedStride + v * Result::kLanes * 4 + Result::merge_column()),
                  rank);
            }
          }
        }
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
          if (i + k >= item.parts) break;
#pragma unroll
          for (int r = 0; r < kOwnRows; ++r) merged[r].add(state[k][r], values[k][r]);
        }
      }
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) {
        if (first + r * step < all_rows) merged[r].write(item, first + r * step);
      }
    }
    ptx::cluster_barrier_relaxed();  // all parts have been read
  }
};

}  // namespace dflare
