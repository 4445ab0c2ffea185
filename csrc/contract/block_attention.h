// block_attention and its schedule, once for every device: schema, arguments, and what must hold
// for them. What it computes stands in python/dflare/ops/block_attention.py.
//
// Templates over the tensor keep Torch out of this header, which kernels include for what they are
// given: a new setting or weight is a field here, and the launchers pass it on.
#pragma once

#include <optional>

#include "arguments.h"
#include "paged_context.h"

namespace dflare {

inline constexpr char kBlockAttention[] =
    "block_attention(Tensor qkv, Tensor q_norm_weight, Tensor k_norm_weight, float eps,"
    " Tensor cos_sin_cache, Tensor positions, Tensor k_pool, Tensor v_pool,"
    " Tensor req_to_token, Tensor req_pool_indices, Tensor seq_lens, int block_size, int window,"
    " bool causal, float scale, Tensor? schedule=None) -> Tensor";
inline constexpr char kBlockAttentionSchedule[] =
    "block_attention_schedule(Tensor seq_lens, int block_size, int num_heads, int kv_heads,"
    " int head_dim, int window) -> Tensor";

// Weights and settings as kernels read them; T is the element type, void where that is chosen
// later. An attention without norms and RoPE has none of the weights.
template <class T>
struct BlockAttentionInputs {
  const T* q_norm_weight;  // [head_dim]
  const T* k_norm_weight;  // [head_dim]
  float eps;
  Rope rope;
  int window;  // negative: none
  bool causal;
  float scale;
};

template <class Tensor>
struct BlockAttention {
  const Tensor& qkv;
  const Tensor& q_norm_weight;
  const Tensor& k_norm_weight;
  double eps;
  const Tensor& cos_sin_cache;
  const Tensor& positions;
  PagedContext<Tensor> context;
  int64_t block_size;
  int64_t window;
  bool causal;
  double scale;
  const std::optional<Tensor>& schedule;
  // What `check` reads from them.
  int64_t rows = 0, num_heads = 0;
  Rope rope{};

  template <class Checker>
  void check(Checker&& check) {
    check.element("qkv", qkv);
    context.check(check);
    check.block(block_size);
    rows = context.batch * block_size;
    check.rows("qkv", qkv, {rows, kAny}, "[bs * block_size, (q_heads + 2 * kv_heads) * head_dim]");
    const int64_t kv_heads = context.kv_heads, head_dim = context.head_dim;
    num_heads = qkv.size(1) / head_dim - 2 * kv_heads;
    check.require(
        qkv.size(1) % head_dim == 0 && num_heads > 0 && num_heads % kv_heads == 0, "qkv has ",
        qkv.size(1),
        " columns, expected (q_heads + 2 * kv_heads) * head_dim with kv_heads = ", kv_heads,
        ", head_dim = ", head_dim, " and q_heads a positive multiple of kv_heads");
    check.query_rows(num_heads / kv_heads, block_size);
    check.weight("q_norm_weight", q_norm_weight, {head_dim}, "[head_dim]");
    check.weight("k_norm_weight", k_norm_weight, {head_dim}, "[head_dim]");
    rope = check.rope(cos_sin_cache, positions, rows, head_dim);
    check.require(scale > 0, "scale is ", scale, ", expected a positive number");
  }

  template <class T>
  BlockAttentionInputs<T> inputs() const {
    return {static_cast<const T*>(q_norm_weight.const_data_ptr()),
            static_cast<const T*>(k_norm_weight.const_data_ptr()),
            static_cast<float>(eps),
            rope,
            clamp_window(window),
            causal,
            static_cast<float>(scale)};
  }
};

// The operator as Torch calls it, for the implementation `run` of a device.
template <class Tensor, Tensor (*run)(BlockAttention<Tensor>)>
Tensor block_attention(const Tensor& qkv, const Tensor& q_norm_weight, const Tensor& k_norm_weight,
                       double eps, const Tensor& cos_sin_cache, const Tensor& positions,
                       const Tensor& k_pool, const Tensor& v_pool, const Tensor& req_to_token,
                       const Tensor& req_pool_indices, const Tensor& seq_lens, int64_t block_size,
                       int64_t window, bool causal, double scale,
                       const std::optional<Tensor>& schedule) {
  return run({qkv,
              q_norm_weight,
              k_norm_weight,
              eps,
              cos_sin_cache,
              positions,
              {k_pool, v_pool, req_to_token, req_pool_indices, seq_lens},
              block_size,
              window,
              causal,
              scale,
              schedule});
}

}  // namespace dflare
