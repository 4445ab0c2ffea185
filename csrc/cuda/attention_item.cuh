// Which part of which request a thread block of block_attention works on, and how its rows are
// packed: row r of a request is head r % group of token r / group.
#pragma once

#include "params.h"
#include "seq_len.cuh"

namespace dflare {

struct AttentionItem {
  const BlockAttentionParams& p;
  int request, part, parts, first_partial;
  int kv_head, row_tile;
  int seq_len, first_key, tiles;  // first context index of this part and its tiles
  const int32_t* slots;           // of the request's context

  // Reads item blockIdx.z of the schedule; an idle one has request < 0 and nothing else.
  __device__ __forceinline__ AttentionItem(const BlockAttentionParams& params, int head_dim)
      : p(params) {
    const int4* records = reinterpret_cast<const int4*>(p.schedule);
    const int4 made_for = records[0], item = records[1 + blockIdx.z];
    request = item.x, part = item.y, parts = item.z, first_partial = item.w;
    if (made_for.x != p.batch_size || made_for.y != p.plan.units ||
        made_for.z != p.plan.max_items || made_for.w != p.plan.max_partials) {
      // Of another batch or shape that happens to have a schedule of this size: no request is cut.
      const int index = static_cast<int>(blockIdx.z);
      request = index < p.batch_size ? index : -1, part = 0, parts = 1;
    }
    if (request < 0) return;
    row_tile = blockIdx.x;
    kv_head = blockIdx.y;
    seq_len = load_seq_len(p.seq_lens, p.seq_lens_64bit, request);
    const int all = attention_tiles(seq_len, p.window, head_dim);
    const int first_tile = attention_first_tile(all, part, parts);
    tiles = attention_first_tile(all, part + 1, parts) - first_tile;
    first_key = attention_first_key(seq_len, p.window) + first_tile * attention_keys(head_dim);
    slots = p.req_to_token + p.req_pool_indices[request] * p.req_to_token_stride;
  }

  __device__ __forceinline__ bool has_block() const { return part == parts - 1; }
  __device__ __forceinline__ int rows() const { return p.plan.group * p.block_size; }
  __device__ __forceinline__ int token_of(int row) const {
    return row * p.plan.inverse_group >> 20;
  }
  __device__ __forceinline__ int head_of(int row) const {
    return (kv_head - token_of(row)) * p.plan.group + row;
  }
  // Whether the blocks of all parts are in one cluster.
  __device__ __forceinline__ bool has_cluster() const {
    const int first = static_cast<int>(blockIdx.z) - part;
    return parts > 1 && first / p.plan.cluster == (first + parts - 1) / p.plan.cluster;
  }
  // The rank of the block of a part of this one's request in its cluster.
  __device__ __forceinline__ int rank_of(int of_part) const {
    return static_cast<int>(blockIdx.z) % p.plan.cluster - part + of_part;
  }
  // This block among those of its item.
  __device__ __forceinline__ int unit() const { return blockIdx.y * p.plan.row_tiles + blockIdx.x; }

  // Where the result of a row goes.
  template <class T>
  __device__ __forceinline__ T* output_head(int row, int head_dim) const {
    return static_cast<T*>(p.out) +
           (int64_t{request * p.block_size + token_of(row)} * p.num_heads + head_of(row)) *
               head_dim;
  }
};

}  // namespace dflare
