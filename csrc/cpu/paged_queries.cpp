// Who asks, and what they see.

#include "cpu/paged_queries.h"

#include <algorithm>

#include "cpu/run_attention.h"

namespace dflare::cpu {
namespace {

Trees trees_of(const char* op, const at::Tensor& parents, const Indices& starts, int64_t bs) {
  Trees trees;
  const Indices parent(parents);
  trees.depths.resize(starts[bs]);
  int32_t deepest = 0;
  for (int64_t b = 0; b < bs; ++b) {
    for (int64_t row = starts[b]; row < starts[b + 1]; ++row) {
      const int64_t node = row - starts[b], above = parent[row];
      TORCH_CHECK(node == 0 ? above == -1 : above >= 0 && above < node, op, ": parents[", row,
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

void check_starts(const char* op, const Indices& starts, int64_t bs, int64_t rows) {
  TORCH_CHECK(starts[0] == 0, op, ": query_start[0] is ", starts[0], ", expected 0");
  for (int64_t b = 0; b < bs; ++b) {
    TORCH_CHECK(starts[b] <= starts[b + 1] && starts[b + 1] <= rows, op, ": query_start[", b,
                "] and [", b + 1, "] are ", starts[b], " and ", starts[b + 1],
                ", expected non-decreasing values up to the ", rows, " rows of q");
  }
}

}  // namespace

PagedQueries paged_queries(const char* op, const PagedContext<at::Tensor>& context,
                           const at::Tensor& query_start, const std::optional<at::Tensor>& parents,
                           int64_t rows) {
  const Indices starts(query_start), lengths(context.seq_lens);
  check_starts(op, starts, context.batch, rows);
  PagedQueries result;
  if (parents) result.trees = trees_of(op, *parents, starts, context.batch);
  const Trees& trees = result.trees;
  result.used = starts[context.batch];
  result.requests.reserve(context.batch);
  for (int64_t b = 0; b < context.batch; ++b) {
    const int64_t begin = starts[b], queries = starts[b + 1] - begin, length = lengths[b];
    if (queries == 0) continue;
    TORCH_CHECK(length >= queries, op, ": seq_lens[", b, "] is ", length,
                ", expected at least the request's ", queries, " queries, which it includes");
    const int32_t* slots =
        request_slots(op, context.req_to_token, context.req_pool_indices, b, length);
    result.requests.push_back({slots, length, begin, queries, length - queries});
    if (trees.stride == 0) continue;
    result.requests.back().depths = trees.depths.data() + begin;
    result.requests.back().paths = trees.paths.data() + begin * trees.stride;
    result.requests.back().path_stride = trees.stride;
  }
  return result;
}

}  // namespace dflare::cpu
