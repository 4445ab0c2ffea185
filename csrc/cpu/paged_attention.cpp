// torch.ops.dflare.paged_attention: prefill, decode and verify attention of the target on the CPU.

#include <cstring>

#include "cpu/paged_queries.h"
#include "cpu/run_attention.h"
#include "stable_torch.h"

namespace dflare::cpu {
namespace {

constexpr const char* kOp = "paged_attention";

struct Arguments {
  const at::Tensor& q;
  PagedContext<at::Tensor> context;
  const at::Tensor& query_start;
  int64_t window;
  bool causal;
  double scale, logit_cap;
  const std::optional<at::Tensor>& parents;

  void check(Checker check) {
    check.element("q", q);
    context.check(check);
    check.rows("q", q, {kAny, kAny, context.head_dim}, "[Nq, q_heads, head_dim]");
    check.require(q.size(1) > 0 && q.size(1) % context.kv_heads == 0, "q has ", q.size(1),
                  " heads, expected a positive multiple of the pool's ", context.kv_heads);
    check.integers("query_start", query_start, {context.batch + 1}, "[bs + 1]");
    if (!parents) return;
    check.int32s("parents", *parents, {q.size(0)}, "[Nq]");
    check.require(causal, "parents were given with causal = false, expected true");
  }
};

template <typename T>
at::Tensor attend_as(const Arguments& x) {
  AttentionParams<T> p{};
  set_pools(x.context, x.q.size(1), p);
  const PagedQueries queries = paged_queries(kOp, x.context, x.query_start, x.parents, x.q.size(0));
  p.q = static_cast<const T*>(x.q.const_data_ptr());
  p.q_stride = x.q.stride(0);
  p.window = clamp_window(x.window);
  p.causal = x.causal;
  p.scale = static_cast<float>(x.scale);
  p.logit_cap = static_cast<float>(x.logit_cap);
  const int64_t rows = x.q.size(0), width = x.q.size(1) * p.head_dim;
  at::Tensor out = at::empty({rows, width}, x.q);
  p.out = static_cast<T*>(out.mutable_data_ptr());
  run_attention(kOp, p, queries.requests);
  const int64_t used = queries.used;
  std::memset(p.out + used * width, 0, sizeof(T) * (rows - used) * width);
  return out;
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_pool, const at::Tensor& v_pool,
                           const at::Tensor& req_to_token, const at::Tensor& req_pool_indices,
                           const at::Tensor& seq_lens, const at::Tensor& query_start,
                           int64_t window, bool causal, double scale, double logit_cap,
                           const std::optional<at::Tensor>& parents) {
  Arguments x{q,           {k_pool, v_pool, req_to_token, req_pool_indices, seq_lens},
              query_start, window,
              causal,      scale,
              logit_cap,   parents};
  x.check(Checker(kOp, kLimits, q));
  return with_element_type(q, [&](auto element) { return attend_as<decltype(element)>(x); });
}

}  // namespace
}  // namespace dflare::cpu

STABLE_TORCH_LIBRARY_IMPL(dflare, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&dflare::cpu::paged_attention));
}
