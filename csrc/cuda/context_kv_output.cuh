// The end of both append paths: projected heads become context K or V in the pools.
#pragma once

#include "head_row.cuh"
#include "params.h"

namespace dflare {

// Number of valid rows; the rows beyond are neither computed nor written.
__device__ __forceinline__ int valid_rows(const ContextKvOutput& out) {
  return out.compact_rows != nullptr ? out.compact_rows[0] : out.num_rows;
}

// Where compact row m goes.
struct ContextRow {
  int64_t slot;
  int64_t position;
};

// The row that compact row m was.
__device__ __forceinline__ int load_source_row(const ContextKvOutput& out, int m) {
  return out.compact_rows != nullptr ? out.compact_rows[1 + m] : m;
}

__device__ __forceinline__ ContextRow load_context_row(const ContextKvOutput& out, int m) {
  const int n = load_source_row(out, m);
  return {out.cache_loc[n], out.rope.positions[n]};
}

// One head of one layer; `head` is in [0, 2 * kv_heads), keys first.
template <class T, int kHeadDim>
struct ContextHead {
  using Row = HeadRow<kHeadDim>;
  const ContextKvOutput& out;
  const int layer, head;

  __device__ __forceinline__ bool is_key() const { return head < out.kv_heads; }

  __device__ __forceinline__ void load_rotation(Row& rotation, const ContextRow& row) const {
    if (!is_key()) return;
    rotation.load_rotation(out.rope.rotary, out.rope.cos_sin + row.position * out.rope.rotary);
  }

  // Adds the bias, applies K norm and RoPE (keys only), rounds once and writes the pool row. All
  // lanes of a warp take part; only lanes with `valid` write, and only they need a row.
  __device__ __forceinline__ void write(Row& values, const Row& rotation, const ContextRow& row,
                                        bool valid) const {
    if (out.kv_bias != nullptr) {
      const int64_t offset = (int64_t{layer} * 2 * out.kv_heads + head) * kHeadDim;
      Row bias;
      bias.load(out.rope.rotary, static_cast<const T*>(out.kv_bias) + offset);
      values.add(bias);
    }
    Row weight;
    weight.load(out.rope.rotary, static_cast<const T*>(out.k_norm_weight) + layer * kHeadDim);
    values.normalize(weight, out.k_norm_eps, is_key());
    if (!valid) return;
    if (is_key()) values.rotate(rotation);
    T* pool = static_cast<T*>(is_key() ? out.k_pools[layer] : out.v_pools[layer]);
    T* to = pool + row.slot * (is_key() ? out.k_strides[layer] : out.v_strides[layer]) +
            (is_key() ? head : head - out.kv_heads) * kHeadDim;
    values.template store_with<T>(out.rope.rotary, [&](int place, uint4 elements) {
      *reinterpret_cast<uint4*>(to + place) = elements;
    });
  }
};

// Norms, rotates and writes the heads of an output tile in shared memory: load(values, token) gives
// a lane's part of one. The block's first kThreads threads do; all take part in the barrier, behind
// which the tile and the rows are read. A pass's rotations are on their way while the pass before
// is written.
template <int kThreads, class T, int kHeadDim, class Load>
__device__ __forceinline__ void write_heads(const ContextHead<T, kHeadDim>& writer,
                                            const ContextRow* rows, int tokens, Load load) {
  using Row = HeadRow<kHeadDim>;
  constexpr int kRowsPerPass = kThreads / Row::kLanes;
  int token = threadIdx.x / Row::kLanes;
  Row rotation{};
  if (token < tokens) writer.load_rotation(rotation, rows[token]);
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= kThreads) return;
  for (int base = 0; base < tokens; base += kRowsPerPass, token += kRowsPerPass) {
    const bool valid = token < tokens;
    const int at = valid ? token : 0;
    Row values;
    load(values, at);
    const Row turn = rotation;
    if (token + kRowsPerPass < tokens) writer.load_rotation(rotation, rows[token + kRowsPerPass]);
    writer.write(values, turn, rows[at], valid);
  }
}

}  // namespace dflare
