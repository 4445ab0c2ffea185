// The drafter block's own heads on their way from qkv to tiles: queries, keys and values.
#pragma once

#include "attention_item.cuh"
#include "head_row.cuh"
#include "tile.cuh"

namespace dflare {

// A few rows a thread at a time, whose loads are in flight together; else every row would cost the
// latency of its head. Positions, and with them cosines and sines, are older than qkv:
// request_turns may run before the wait for the kernel that makes qkv.
template <class T, int kHeadDim, int kThreads, int kInFlight>
struct BlockHeads {
  using Row = HeadRow<kHeadDim>;
  static constexpr int kRowsPerPass = kThreads / Row::kLanes;
  static constexpr int kRows = kInFlight * kRowsPerPass;
  Row heads[kInFlight], turns[kInFlight];

  static __device__ __forceinline__ int row_of(int first, int i) {
    return first + i * kRowsPerPass + static_cast<int>(threadIdx.x) / Row::kLanes;
  }

  // source(row) gives {token of the block, head of its qkv row}.
  template <class Source>
  __device__ __forceinline__ void request_turns(const AttentionItem& item, int first,
                                                Source source) {
    const BlockAttentionParams& p = item.p;
    int position[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int token = item.request * p.block_size + source(row_of(first, i)).x;
      position[i] = static_cast<int>(p.rope.positions[token]);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      turns[i].load_rotation(p.rope.rotary, p.rope.cos_sin + int64_t{position[i]} * p.rope.rotary);
    }
  }

  template <class Source>
  __device__ __forceinline__ void request_heads(const AttentionItem& item, int first,
                                                Source source) {
    const BlockAttentionParams& p = item.p;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int2 from = source(row_of(first, i));
      const int64_t token = item.request * p.block_size + from.x;
      heads[i].load(p.rope.rotary,
                    static_cast<const T*>(p.qkv) + token * p.qkv_stride + from.y * kHeadDim);
    }
  }

  // Normalises, rotates and stores them as rows of a tile, laid out as Layout has it.
  template <class Layout>
  __device__ __forceinline__ void store(const BlockAttentionParams& p, int first,
                                        const void* norm_weight, T* tile) {
    Row weight;
    weight.load(p.rope.rotary, static_cast<const T*>(norm_weight));
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      heads[i].normalize(weight, p.eps, true);
      heads[i].rotate(turns[i]);
      heads[i].template store_with<T>(p.rope.rotary, [&](int place, uint4 elements) {
        *reinterpret_cast<uint4*>(tile + Layout::offset(row_of(first, i), place)) = elements;
      });
    }
  }
};

// Where row `row` of a row tile comes from. Rows beyond the last repeat it: their results are not
// written.
struct QuerySource {
  const AttentionItem& item;
  int first_row;
  __device__ __forceinline__ int2 operator()(int row) const {
    const int packed = min(first_row + row, item.rows() - 1);
    return make_int2(item.token_of(packed), item.head_of(packed));
  }
};

// Key `row` of the block. K rows beyond the block's last are masked whatever they hold.
struct KeySource {
  const AttentionItem& item;
  __device__ __forceinline__ int2 operator()(int row) const {
    return make_int2(min(row, item.p.block_size - 1), item.p.num_heads + item.kv_head);
  }
};

// V rows beyond the block's last must be zeros.
template <class T, int kHeadDim, int kThreads, class Layout>
__device__ __forceinline__ void load_block_values(const AttentionItem& item, T* tile) {
  const BlockAttentionParams& p = item.p;
  constexpr int kChunks = kHeadDim / 8;
  const int head = p.num_heads + p.kv_heads + item.kv_head;
  for (int i = threadIdx.x; i < attention_keys(kHeadDim) * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row < p.block_size) {
      const int64_t token = item.request * p.block_size + row;
      v = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.qkv) + token * p.qkv_stride +
                                          head * kHeadDim + column);
    }
    *reinterpret_cast<uint4*>(tile + Layout::offset(row, column)) = v;
  }
}

}  // namespace dflare
