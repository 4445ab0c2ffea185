// The end of both append paths: projected heads become context K or V in the pools.
#pragma once

#include "head_row.cuh"
#include "params.h"

namespace dflare {

// Number of valid rows; the rows beyond are neither computed nor written.
__device__ __forceinline__ int valid_rows(const ContextKvOutput& out) {
  return out.compact_rows != nullptr ? out.compact_rows[0] : out.num_rows;
}

// One head of one layer; `head` is in [0, 2 * kv_heads), keys first.
template <class T, int kHeadDim>
struct ContextHead {
  const ContextKvOutput& out;
  const int layer, head;

  __device__ __forceinline__ bool is_key() const { return head < out.kv_heads; }

  // Adds the bias, applies K norm and RoPE (keys only), rounds once and writes the pool row of
  // compact row m. All lanes of a warp take part; only lanes with `valid` write.
  __device__ __forceinline__ void write(HeadRow<kHeadDim>& values, int m, bool valid) const {
    HeadRow<kHeadDim> other;
    if (out.kv_bias != nullptr) {
      const int64_t offset = (int64_t{layer} * 2 * out.kv_heads + head) * kHeadDim;
      other.load(out.rotary, static_cast<const T*>(out.kv_bias) + offset);
      values.add(other);
    }
    other.load(out.rotary, static_cast<const T*>(out.k_norm_weight) + layer * kHeadDim);
    values.normalize(other, out.k_norm_eps, is_key());
    if (!valid) return;
    const int n = out.compact_rows != nullptr ? out.compact_rows[1 + m] : m;
    T* row;
    if (is_key()) {
      other.load_rotation(out.rotary,
                          out.cos_sin + int64_t{static_cast<int>(out.positions[n])} * out.rotary);
      values.rotate(other);
      row = static_cast<T*>(out.k_pools[layer]) + out.cache_loc[n] * out.k_strides[layer] +
            head * kHeadDim;
    } else {
      row = static_cast<T*>(out.v_pools[layer]) + out.cache_loc[n] * out.v_strides[layer] +
            (head - out.kv_heads) * kHeadDim;
    }
    values.template store_with<T>(out.rotary, [&](int place, uint4 elements) {
      *reinterpret_cast<uint4*>(row + place) = elements;
    });
  }
};

}  // namespace dflare
