// Attention of 16 query rows a warp to tiles of keys: products, masks, online softmax.
//
// The softmax is in base 2 with the scale folded into the exponent. Every address of a tile is the
// tile's plus what the lane computed once (FragmentLane, tile.cuh).
#pragma once

#include <climits>

#include "attention_item.cuh"
#include "tile.cuh"

namespace dflare {

template <class T, int kHeadDim, int kWarps>
struct AttentionTile {
  static constexpr int kRows = 16 * kWarps, kKeys = attention_keys(kHeadDim);
  static constexpr int kRowBytes = 2 * kHeadDim, kTileBytes = kKeys * kRowBytes;  // of K or of V
  static constexpr bool kQueryInRegisters = kHeadDim <= 128;
  static constexpr int kStages = attention_stages(kHeadDim);
  static constexpr int kLineBytes = kRowBytes;  // from a row of K or V to the next
  // Where an element of a tile is, in elements.
  static __device__ __forceinline__ int offset(int row, int column) {
    return tile_offset<kHeadDim>(row, column);
  }
  // Lets the products of others see what this thread has written to a tile, after a barrier.
  static __device__ __forceinline__ void publish() {}

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const FragmentLane<kHeadDim> down = FragmentLane<kHeadDim>::down(lane);
  const FragmentLane<kHeadDim> across = FragmentLane<kHeadDim>::across(lane);

  // mma accumulators: sum[j] holds columns 8j + lane % 4 * 2 + {0, 1} of rows lane / 4 (elements
  // 0, 1) and lane / 4 + 8 (elements 2, 3) of the warp's 16. Maxima are in units of log2.
  float sum[kHeadDim / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, normalizer[2] = {0, 0};
  uint32_t query[kQueryInRegisters ? kHeadDim / 16 : 1][4];
  ptx::SharedAddress query_tile;  // this warp's rows, where they are not in registers

  // Row within the request of this thread's accumulator rows.
  __device__ __forceinline__ int row_of(const AttentionItem& item, int half) const {
    return item.row_tile * kRows + warp * 16 + half * 8 + lane / 4;
  }
  __device__ __forceinline__ bool warp_has_rows(const AttentionItem& item) const {
    return item.row_tile * kRows + warp * 16 < item.rows();
  }

  // Takes the warp's rows of a tile of normalised, rotated queries.
  __device__ __forceinline__ void take_query(ptx::SharedAddress tile) {
    query_tile = tile + warp * 16 * kRowBytes;
    if constexpr (kQueryInRegisters) {
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) load_fragment_a(query[k], down.at(query_tile, k));
    }
  }

  // The tile (keys, then values) holds the keys of indices [begin, end), end - begin <= kKeys, then
  // zeros. copy() requests a later tile: behind the first fragments, which the products wait for
  // and the copies would keep from the port to shared memory.
  template <class Copy>
  __device__ __forceinline__ void attend(const AttentionItem& item, ptx::SharedAddress tile,
                                         int begin, int end, Copy copy) {
    float score[kKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t q[4];
      if constexpr (kQueryInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) q[i] = query[k][i];
      } else {
        load_fragment_a(q, down.at(query_tile, k));
      }
      const ptx::SharedAddress keys = across.at(tile, k);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        load_fragments_b(b, keys + n * 16 * kRowBytes);
        ptx::mma_m16n8k16<T>(score[2 * n], q, b[0], b[1]);
        ptx::mma_m16n8k16<T>(score[2 * n + 1], q, b[2], b[3]);
      }
      if (k == 0) copy();
    }
    mask(item, score, begin, end);
    softmax(score, item.p.scale * 1.4426950408889634f);  // log2(e): exponentials are powers of 2
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      // The accumulator layout of 16 rows x 16 keys is the A operand's.
      const uint32_t probability[4] = {ptx::pack<T>(score[2 * k][0], score[2 * k][1]),
                                       ptx::pack<T>(score[2 * k][2], score[2 * k][3]),
                                       ptx::pack<T>(score[2 * k + 1][0], score[2 * k + 1][1]),
                                       ptx::pack<T>(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
      for (int j = 0; j < kHeadDim / 16; ++j) {
        uint32_t b[4];
        load_fragments_b_transposed(b, down.at(tile, j) + kTileBytes + k * 16 * kRowBytes);
        ptx::mma_m16n8k16<T>(sum[2 * j], probability, b[0], b[1]);
        ptx::mma_m16n8k16<T>(sum[2 * j + 1], probability, b[2], b[3]);
      }
    }
  }

  // Scores to probabilities; sums and normalisers so far to the new maximum.
  __device__ __forceinline__ void softmax(float (&score)[kKeys / 8][4], float scale) {
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        highest = fmaxf(highest, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      highest = fmaxf(highest * scale, maximum[half]);
      // A row that has seen no visible key keeps a maximum of -inf; -inf - -inf would be NaN.
      const float offset = highest == -INFINITY ? 0.0f : highest;
      shrink[half] = ptx::exp2(maximum[half] - offset);
      maximum[half] = highest;
      float total = 0;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          score[n][e] = ptx::exp2(score[n][e] * scale - offset);
          total += score[n][e];
        }
      }
      normalizer[half] = normalizer[half] * shrink[half] + total;
    }
    // After the first tiles a maximum rarely grows.
    if (shrink[0] == 1.0f && shrink[1] == 1.0f) return;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      sum[j][0] *= shrink[0];
      sum[j][1] *= shrink[0];
      sum[j][2] *= shrink[1];
      sum[j][3] *= shrink[1];
    }
  }

  // Key j is visible to the query of index i iff j < end, j >= i - window and, if causal, j <= i.
  __device__ __forceinline__ void mask(const AttentionItem& item, float (&score)[kKeys / 8][4],
                                       int begin, int end) const {
    const BlockAttentionParams& p = item.p;
    const int seq_len = item.seq_len;
    const int last_query = seq_len + p.block_size - 1;
    const bool below_window = p.window >= 0 && begin < last_query - p.window;
    const bool after_query = p.causal && end > seq_len;
    if (end - begin == kKeys && !below_window && !after_query) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query_index = seq_len + item.token_of(row_of(item, half));
      const int first = p.window >= 0 ? query_index - p.window : INT_MIN;
      const int last = p.causal ? min(query_index, end - 1) : end - 1;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = begin + n * 8 + lane % 4 * 2 + e;
          if (key < first || key > last) score[n][2 * half + e] = -INFINITY;
        }
      }
    }
  }

  // After the last tile: a row's four lanes have summed different keys.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      normalizer[half] += __shfl_xor_sync(0xffffffffu, normalizer[half], 1);
      normalizer[half] += __shfl_xor_sync(0xffffffffu, normalizer[half], 2);
    }
  }
};

}  // namespace dflare
