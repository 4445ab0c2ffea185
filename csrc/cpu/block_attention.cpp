// torch.ops.dflare.block_attention on the CPU.

#include "cpu/run_attention.h"
#include "stable_torch.h"

namespace dflare::cpu {
namespace {

constexpr Checker kCheck{"block_attention"};

template <typename T>
at::Tensor block_attention_as(const at::Tensor& qkv, const at::Tensor& q_norm_weight,
                              const at::Tensor& k_norm_weight, double eps,
                              const at::Tensor& cos_sin_cache, const at::Tensor& positions,
                              const at::Tensor& k_pool, const at::Tensor& v_pool,
                              const at::Tensor& req_to_token, const at::Tensor& req_pool_indices,
                              const at::Tensor& seq_lens, int64_t block_size, int64_t window,
                              bool causal, double scale) {
  AttentionParams<T> p{};
  set_pools(kCheck, k_pool, v_pool, p);
  check_page_table(kCheck, req_to_token, req_pool_indices, seq_lens);
  const int64_t bs = seq_lens.size(0), rows = qkv.size(0);
  const int64_t heads = qkv.size(1) / p.head_dim, q_heads = heads - 2 * p.kv_heads;
  TORCH_CHECK(block_size > 0 && rows == bs * block_size, "block_attention: qkv has ", rows,
              " rows, expected bs * block_size = ", bs, " * ", block_size);
  TORCH_CHECK(heads * p.head_dim == qkv.size(1) && q_heads > 0 && q_heads % p.kv_heads == 0,
              "block_attention: qkv has ", qkv.size(1),
              " columns, expected (q_heads + 2 * kv_heads) * head_dim with kv_heads = ", p.kv_heads,
              ", head_dim = ", p.head_dim, " and q_heads a positive multiple of kv_heads");
  kCheck.packed("qkv", qkv, 1);
  const struct {
    const char* name;
    const at::Tensor& x;
  } norms[] = {{"q_norm_weight", q_norm_weight}, {"k_norm_weight", k_norm_weight}};
  for (const auto& [name, x] : norms) {
    kCheck.device(name, x);
    kCheck.dtype(name, x, qkv.scalar_type());
    kCheck.shape(name, x, {p.head_dim}, "[head_dim]");
    kCheck.contiguous(name, x);
  }
  const Rope rope = make_rope(kCheck, cos_sin_cache, positions, rows, p.head_dim);
  const int64_t max_pos = cos_sin_cache.size(0);
  for (int64_t row = 0; row < rows; ++row) check_position(kCheck, rope, row, max_pos);

  const Indices lengths(seq_lens), pool_rows(req_pool_indices);
  std::vector<Request> requests(bs);
  for (int64_t b = 0; b < bs; ++b) {
    const int64_t length = lengths[b];
    requests[b] = {request_slots(kCheck, req_to_token, pool_rows, b, length), length,
                   b * block_size, block_size, length};
  }
  p.q = static_cast<const T*>(qkv.const_data_ptr());
  p.q_stride = qkv.stride(0);
  p.block_k = p.q + q_heads * p.head_dim;
  p.block_v = p.block_k + p.kv_heads * p.head_dim;
  p.q_norm_weight = static_cast<const T*>(q_norm_weight.const_data_ptr());
  p.k_norm_weight = static_cast<const T*>(k_norm_weight.const_data_ptr());
  p.eps = static_cast<float>(eps);
  p.rope = rope;
  p.group = q_heads / p.kv_heads;
  p.window = window;
  p.causal = causal;
  p.scale = static_cast<float>(scale);
  at::Tensor out = at::empty({rows, q_heads * p.head_dim}, qkv);
  p.out = static_cast<T*>(out.mutable_data_ptr());
  run_attention(kCheck, p, requests);
  return out;
}

at::Tensor block_attention(const at::Tensor& qkv, const at::Tensor& q_norm_weight,
                           const at::Tensor& k_norm_weight, double eps,
                           const at::Tensor& cos_sin_cache, const at::Tensor& positions,
                           const at::Tensor& k_pool, const at::Tensor& v_pool,
                           const at::Tensor& req_to_token, const at::Tensor& req_pool_indices,
                           const at::Tensor& seq_lens, int64_t block_size, int64_t window,
                           bool causal, double scale, const std::optional<at::Tensor>& schedule) {
  kCheck.shape("qkv", qkv, {kAny, kAny}, "[bs * block_size, (q_heads + 2 * kv_heads) * head_dim]");
  kCheck.shape("k_pool", k_pool, {kAny, kAny, kAny}, "[slots, kv_heads, head_dim]");
  kCheck.dtype("k_pool", k_pool, qkv.scalar_type());
  TORCH_CHECK(!schedule, "block_attention: schedule was given, expected None on the CPU");
  auto run = [&](auto element) {
    return block_attention_as<decltype(element)>(
        qkv, q_norm_weight, k_norm_weight, eps, cos_sin_cache, positions, k_pool, v_pool,
        req_to_token, req_pool_indices, seq_lens, block_size, window, causal, scale);
  };
  return with_element_type(kCheck, "qkv", qkv, run);
}

}  // namespace
}  // namespace dflare::cpu

STABLE_TORCH_LIBRARY_IMPL(dflare, CPU, m) {
  m.impl("block_attention", TORCH_BOX(&dflare::cpu::block_attention));
}
