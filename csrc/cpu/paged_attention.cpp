// torch.ops.dflare.paged_attention: prefill, decode and verify attention of the target on the CPU.

#include <algorithm>
#include <cstring>

#include "cpu/run_attention.h"
#include "stable_torch.h"

namespace dflare::cpu {
namespace {

constexpr const char* kOp = "paged_attention";

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
      TORCH_CHECK(node == 0 ? above == -1 : above >= 0 && above < node, kOp, ": parents[", row,
                  "] is ", above, ", expected ",
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

void check_starts(const Indices& starts, int64_t bs, int64_t rows) {
  TORCH_CHECK(starts[0] == 0, kOp, ": query_start[0] is ", starts[0], ", expected 0");
  for (int64_t b = 0; b < bs; ++b) {
    TORCH_CHECK(starts[b] <= starts[b + 1] && starts[b + 1] <= rows, kOp, ": query_start[", b,
                "] and [", b + 1, "] are ", starts[b], " and ", starts[b + 1],
                ", expected non-decreasing values up to the ", rows, " rows of q");
  }
}

// The requests that have queries; what they point to lies in `trees`.
std::vector<Request> requests_of(const Arguments& x, const Indices& starts, const Trees& trees) {
  const Indices lengths(x.context.seq_lens);
  std::vector<Request> requests;
  requests.reserve(x.context.batch);
  for (int64_t b = 0; b < x.context.batch; ++b) {
    const int64_t begin = starts[b], queries = starts[b + 1] - begin, length = lengths[b];
    if (queries == 0) continue;
    TORCH_CHECK(length >= queries, kOp, ": seq_lens[", b, "] is ", length,
                ", expected at least the request's ", queries, " queries, which it includes");
    const int32_t* slots =
        request_slots(kOp, x.context.req_to_token, x.context.req_pool_indices, b, length);
    requests.push_back({slots, length, begin, queries, length - queries});
    if (trees.stride == 0) continue;
    requests.back().depths = trees.depths.data() + begin;
    requests.back().paths = trees.paths.data() + begin * trees.stride;
    requests.back().path_stride = trees.stride;
  }
  return requests;
}

template <typename T>
at::Tensor attend_as(const Arguments& x) {
  AttentionParams<T> p{};
  set_pools(x.context, x.q.size(1), p);
  const Indices starts(x.query_start);
  check_starts(starts, x.context.batch, x.q.size(0));
  const Trees trees = x.parents ? trees_of(*x.parents, starts, x.context.batch) : Trees{};
  const std::vector<Request> requests = requests_of(x, starts, trees);
  p.q = static_cast<const T*>(x.q.const_data_ptr());
  p.q_stride = x.q.stride(0);
  p.window = clamp_window(x.window);
  p.causal = x.causal;
  p.scale = static_cast<float>(x.scale);
  p.logit_cap = static_cast<float>(x.logit_cap);
  const int64_t rows = x.q.size(0), width = x.q.size(1) * p.head_dim;
  at::Tensor out = at::empty({rows, width}, x.q);
  p.out = static_cast<T*>(out.mutable_data_ptr());
  run_attention(kOp, p, requests);
  const int64_t used = starts[x.context.batch];
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
