// append_context_kv, once for every device: schema, arguments, and what must hold for them. What it
// computes stands in python/dflare/ops/append_context_kv.py.
//
// Templates over the tensor keep Torch out of this header, which kernels include for what they are
// given: a new setting or weight is a field here, and the launchers pass it on.
#pragma once

#include <optional>
#include <vector>

#include "arguments.h"

namespace dflare {

inline constexpr char kAppendContextKv[] =
    "append_context_kv(Tensor target_hidden, Tensor fusion_probs, Tensor norm_weight, float eps,"
    " Tensor kv_weight, Tensor? kv_bias, Tensor k_norm_weight, float k_norm_eps,"
    " Tensor cos_sin_cache, Tensor positions, Tensor cache_loc, Tensor? commit_lens,"
    " int block_size, Tensor(a!)[] k_pools, Tensor(b!)[] v_pools) -> ()";

// A drafter's weights as kernels read them; T is the element type, void where that is chosen later.
template <class T>
struct ContextWeights {
  const float* fusion_probs;  // [layers, taps]
  const T* norm_weight;       // [hidden]
  float eps;
  const T* kv_weight;      // [layers, 2 * kv_heads * head_dim, hidden]: K rows, then V rows
  const T* kv_bias;        // [layers, 2 * kv_heads * head_dim] or null
  const T* k_norm_weight;  // [layers, head_dim]
  float k_norm_eps;
};

template <class Tensor>
struct AppendContextKv {
  const Tensor& target_hidden;
  const Tensor& fusion_probs;
  const Tensor& norm_weight;
  double eps;
  const Tensor& kv_weight;
  const std::optional<Tensor>& kv_bias;
  const Tensor& k_norm_weight;
  double k_norm_eps;
  const Tensor& cos_sin_cache;
  const Tensor& positions;
  const Tensor& cache_loc;
  const std::optional<Tensor>& commit_lens;
  int64_t block_size;
  const std::vector<Tensor>& k_pools;
  const std::vector<Tensor>& v_pools;
  // What `check` reads from them.
  int64_t rows = 0, layers = 0, taps = 0, hidden = 0, kv_heads = 0, head_dim = 0;
  Rope rope{};

  template <class Checker>
  void check(Checker&& check) {
    check.element("target_hidden", target_hidden);
    check.table("fusion_probs", fusion_probs, {kAny, kAny}, "[layers, taps]");
    check.weight("norm_weight", norm_weight, {kAny}, "[hidden]");
    layers = fusion_probs.size(0), taps = fusion_probs.size(1), hidden = norm_weight.size(0);
    check.count("fusion_probs", layers, "layers", check.limits.layers);
    check.count("fusion_probs", taps, "taps", check.limits.taps);
    check.hidden("norm_weight", hidden);
    check.require(
        static_cast<int64_t>(k_pools.size()) == layers && v_pools.size() == k_pools.size(),
        "k_pools has ", k_pools.size(), " and v_pools ", v_pools.size(),
        " tensors, expected one for each of the ", layers, " layers of fusion_probs");
    check.shape("k_pools", k_pools[0], {kAny, kAny, kAny}, "[slots, kv_heads, head_dim]");
    kv_heads = k_pools[0].size(1), head_dim = k_pools[0].size(2);
    check.heads(kv_heads, head_dim);
    for (int64_t layer = 0; layer < layers; ++layer) {
      check.rows("k_pools", k_pools[layer], {kAny, kv_heads, head_dim},
                 "[slots, kv_heads, head_dim]");
      check.rows("v_pools", v_pools[layer], {kAny, kv_heads, head_dim},
                 "[slots, kv_heads, head_dim]");
    }
    check.rows("target_hidden", target_hidden, {kAny, taps * hidden}, "[N, taps * hidden]");
    rows = target_hidden.size(0);
    const int64_t columns = 2 * kv_heads * head_dim;
    check.weight("kv_weight", kv_weight, {layers, columns, hidden},
                 "[layers, 2 * kv_heads * head_dim, hidden]");
    if (kv_bias) {
      check.weight("kv_bias", *kv_bias, {layers, columns}, "[layers, 2 * kv_heads * head_dim]");
    }
    check.weight("k_norm_weight", k_norm_weight, {layers, head_dim}, "[layers, head_dim]");
    rope = check.rope(cos_sin_cache, positions, rows, head_dim);
    check.int64s("cache_loc", cache_loc, {rows}, "[N]");
    if (!commit_lens) return;
    check.int32s("commit_lens", *commit_lens, {kAny}, "[bs]");
    check.block(block_size);
    const int64_t batch = commit_lens->size(0);
    check.require(rows == batch * block_size, "target_hidden has ", rows,
                  " rows, expected bs * block_size = ", batch, " * ", block_size);
  }

  template <class T>
  ContextWeights<T> weights() const {
    return {static_cast<const float*>(fusion_probs.const_data_ptr()),
            static_cast<const T*>(norm_weight.const_data_ptr()),
            static_cast<float>(eps),
            static_cast<const T*>(kv_weight.const_data_ptr()),
            kv_bias ? static_cast<const T*>(kv_bias->const_data_ptr()) : nullptr,
            static_cast<const T*>(k_norm_weight.const_data_ptr()),
            static_cast<float>(k_norm_eps)};
  }
};

// The operator as Torch calls it, for the implementation `run` of a device.
template <class Tensor, void (*run)(AppendContextKv<Tensor>)>
void append_context_kv(const Tensor& target_hidden, const Tensor& fusion_probs,
                       const Tensor& norm_weight, double eps, const Tensor& kv_weight,
                       const std::optional<Tensor>& kv_bias, const Tensor& k_norm_weight,
                       double k_norm_eps, const Tensor& cos_sin_cache, const Tensor& positions,
                       const Tensor& cache_loc, const std::optional<Tensor>& commit_lens,
                       int64_t block_size, const std::vector<Tensor>& k_pools,
                       const std::vector<Tensor>& v_pools) {
  run({target_hidden, fusion_probs, norm_weight, eps, kv_weight, kv_bias, k_norm_weight, k_norm_eps,
       cos_sin_cache, positions, cache_loc, commit_lens, block_size, k_pools, v_pools});
}

}  // namespace dflare
