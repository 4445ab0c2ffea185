// torch.ops.dflare.paged_attention: prefill, decode and verify attention of the target on the CPU.

#include <algorithm>
#include <cstring>

#include "cpu/run_attention.h"
#include "stable_torch.h"

namespace dflare::cpu {
namespace {

constexpr Checker kCheck{"paged_attention"};

// Depths and paths of the nodes of all requests' trees, as Request has them.
struct Trees {
  std::vector<int32_t> depths, paths;
  int64_t stride = 0;
};

Trees trees_of(const at::Tensor& parents, const Indices& starts, int64_t bs) {
  Trees trees;
  const Indices parent(parents);
  trees.depths.resize(starts[bs]);
  int32_t deepest = 0;
  for (int64_t b = 0; b < bs; ++b) {
    for (int64_t row = starts[b]; row < starts[b + 1]; ++row) {
      const int64_t node = row - starts[b], above = parent[row];
      TORCH_CHECK(node == 0 ? above == -1 : above >= 0 && above < node, "paged_attention: parents[",
                  row, "] is ", above, ", expected ",
                  node == 0 ? "-1 for a request's first query"
                            : "an earlier query of its request, counted from its first");
      trees.depths[row] = node == 0 ? 0 : trees.depths[starts[b] + above] + 1;
      deepest = std::max(deepest, trees.depths[row]);
    }
  }
  trees.stride = deepest + 1;
  trees.paths.resize(starts[bs] * trees.stride);
  for (int64_t b = 0; b < bs; ++b) {
    for (int64_t row = starts[b]; row < starts[b + 1]; ++row) {
      int32_t* path = trees.paths.data() + row * trees.stride;
      const int32_t depth = trees.depths[row];
      if (depth > 0) {
        const int64_t above = starts[b] + parent[row];
        std::copy_n(trees.paths.data() + above * trees.stride, depth, path);
      }
      path[depth] = static_cast<int32_t>(row - starts[b]);
    }
  }
  return trees;
}

template <typename T>
at::Tensor paged_attention_as(const at::Tensor& q, const at::Tensor& k_pool,
                              const at::Tensor& v_pool, const at::Tensor& req_to_token,
                              const at::Tensor& req_pool_indices, const at::Tensor& seq_lens,
                              const at::Tensor& query_start, int64_t window, bool causal,
                              double scale, double logit_cap,
                              const std::optional<at::Tensor>& parents) {
  AttentionParams<T> p{};
  set_pools(kCheck, k_pool, v_pool, p);
  check_page_table(kCheck, req_to_token, req_pool_indices, seq_lens);
  const int64_t bs = seq_lens.size(0), rows = q.size(0), q_heads = q.size(1);
  kCheck.shape("q", q, {kAny, kAny, p.head_dim}, "[Nq, q_heads, head_dim]");
  TORCH_CHECK(q_heads > 0 && q_heads % p.kv_heads == 0, "paged_attention: q has ", q_heads,
              " heads, expected a positive multiple of the pool's ", p.kv_heads);
  kCheck.packed("q", q, 2);
  kCheck.shape("query_start", query_start, {bs + 1}, "[bs + 1]");
  kCheck.integer("query_start", query_start);
  kCheck.device("query_start", query_start);

  const Indices lengths(seq_lens), pool_rows(req_pool_indices), starts(query_start);
  TORCH_CHECK(starts[0] == 0, "paged_attention: query_start[0] is ", starts[0], ", expected 0");
  for (int64_t b = 0; b < bs; ++b) {
    TORCH_CHECK(starts[b] <= starts[b + 1] && starts[b + 1] <= rows,
                "paged_attention: query_start[", b, "] and [", b + 1, "] are ", starts[b], " and ",
                starts[b + 1], ", expected non-decreasing values up to the ", rows, " rows of q");
  }
  Trees trees;
  if (parents) {
    kCheck.shape("parents", *parents, {rows}, "[Nq]");
    kCheck.dtype("parents", *parents, at::kInt);
    kCheck.device("parents", *parents);
    TORCH_CHECK(causal, "paged_attention: parents were given with causal = false, expected true");
    trees = trees_of(*parents, starts, bs);
  }
  std::vector<Request> requests;
  requests.reserve(bs);
  for (int64_t b = 0; b < bs; ++b) {
    const int64_t begin = starts[b], end = starts[b + 1];
    if (begin == end) continue;
    const int64_t length = lengths[b], queries = end - begin;
    TORCH_CHECK(length >= queries, "paged_attention: seq_lens[", b, "] is ", length,
                ", expected at least the request's ", queries, " queries, which it includes");
    requests.push_back({request_slots(kCheck, req_to_token, pool_rows, b, length), length, begin,
                        queries, length - queries});
    if (parents) {
      requests.back().depths = trees.depths.data() + begin;
      requests.back().paths = trees.paths.data() + begin * trees.stride;
      requests.back().path_stride = trees.stride;
    }
  }
  p.q = static_cast<const T*>(q.const_data_ptr());
  p.q_stride = q.stride(0);
  p.group = q_heads / p.kv_heads;
  p.window = window;
  p.causal = causal;
  p.scale = static_cast<float>(scale);
  p.logit_cap = static_cast<float>(logit_cap);
  const int64_t width = q_heads * p.head_dim;
  at::Tensor out = at::empty({rows, width}, q);
  p.out = static_cast<T*>(out.mutable_data_ptr());
  run_attention(kCheck, p, requests);
  std::memset(p.out + starts[bs] * width, 0, sizeof(T) * (rows - starts[bs]) * width);
  return out;
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_pool, const at::Tensor& v_pool,
                           const at::Tensor& req_to_token, const at::Tensor& req_pool_indices,
                           const at::Tensor& seq_lens, const at::Tensor& query_start,
                           int64_t window, bool causal, double scale, double logit_cap,
                           const std::optional<at::Tensor>& parents) {
  kCheck.shape("q", q, {kAny, kAny, kAny}, "[Nq, q_heads, head_dim]");
  kCheck.shape("k_pool", k_pool, {kAny, kAny, kAny}, "[slots, kv_heads, head_dim]");
  kCheck.dtype("k_pool", k_pool, q.scalar_type());
  auto run = [&](auto element) {
    return paged_attention_as<decltype(element)>(q, k_pool, v_pool, req_to_token, req_pool_indices,
                                                 seq_lens, query_start, window, causal, scale,
                                                 logit_cap, parents);
  };
  return with_element_type(kCheck, "q", q, run);
}

}  // namespace
}  // namespace dflare::cpu

STABLE_TORCH_LIBRARY_IMPL(dflare, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&dflare::cpu::paged_attention));
}
