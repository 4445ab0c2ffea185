// torch.ops.dflare.{build_draft_tree, cut_draft_tree, walk_draft_tree, move_tree_path} on the CPU.

#include "contract/draft_tree.h"

#include <algorithm>
#include <cstring>

#include "cpu/checks.h"

namespace dflare::cpu {
namespace {

// What one request's tree grows from.
struct Growth {
  const int64_t* tokens;   // [depths, ranks]
  const float* log_probs;  // the same
  int64_t depths, ranks;
  const int64_t* branch;          // [branch_len]
  const float* branch_log_probs;  // the same
  int64_t branch_len;
};

constexpr int32_t kBranch = -1;
constexpr int64_t kNothing = -1;  // a token that no target says

// A node that may come next, behind `parent` at depth `depth`: the `rank`th token of the drafter
// there, or the branch's.
struct Candidate {
  float score;   // log-probability of its prefix
  float before;  // of its parent's
  int32_t parent, depth, rank;

  bool operator<(const Candidate& other) const { return score < other.score; }
};

// Reused from request to request.
struct Workspace {
  std::vector<Candidate> heap;
  std::vector<int32_t> branch_nodes;  // of each prefix of the branch from the empty one on, or -1
};

// Fills rows of `width` entries that hold the anchor already.
void grow(const Growth& g, int64_t width, int64_t* tokens, int32_t* parents, int32_t* depths,
          float* scores, Workspace& w) {
  w.heap.clear();
  w.branch_nodes.assign(g.branch_len + 1, -1);
  w.branch_nodes[0] = 0;
  auto push = [&](float before, int32_t parent, int32_t depth, int32_t rank) {
    const float log_prob =
        rank == kBranch ? g.branch_log_probs[depth] : g.log_probs[depth * g.ranks + rank];
    w.heap.push_back({before + log_prob, before, parent, depth, rank});
    std::push_heap(w.heap.begin(), w.heap.end());
  };
  auto push_children = [&](float score, int32_t node, int32_t depth) {
    if (depth < g.depths) push(score, node, depth, 0);
    if (depth < g.branch_len && w.branch_nodes[depth] == node) push(score, node, depth, kBranch);
  };
  if (width > 1) push_children(0.0f, 0, 0);
  for (int64_t count = 1; count < width;) {
    std::pop_heap(w.heap.begin(), w.heap.end());
    const Candidate best = w.heap.back();
    w.heap.pop_back();
    if (best.rank != kBranch && best.rank + 1 < g.ranks) {
      push(best.before, best.parent, best.depth, best.rank + 1);
    }
    const int64_t token =
        best.rank == kBranch ? g.branch[best.depth] : g.tokens[best.depth * g.ranks + best.rank];
    // A prefix that both propose is one node: that of the higher score, which comes first.
    const bool of_branch = best.depth < g.branch_len && g.branch[best.depth] == token &&
                           w.branch_nodes[best.depth] == best.parent;
    if (of_branch && w.branch_nodes[best.depth + 1] >= 0) continue;
    const int32_t node = static_cast<int32_t>(count++);
    if (of_branch) w.branch_nodes[best.depth + 1] = node;
    tokens[node] = token;
    parents[node] = best.parent;
    depths[node] = best.depth + 1;
    if (scores) scores[node] = best.score;
    push_children(best.score, node, best.depth + 1);
  }
}

Tree<at::Tensor> build(BuildDraftTree<at::Tensor> x) {
  x.check(Checker("build_draft_tree", kLimits, x.anchors));
  const int64_t width = x.nodes + 1;
  at::Tensor tokens = at::empty({x.batch, width}, at::kLong, x.tokens);
  at::Tensor parents = at::empty({x.batch, width}, at::kInt, x.tokens);
  at::Tensor depths = at::empty({x.batch, width}, at::kInt, x.tokens);
  Workspace workspace;
  for (int64_t b = 0; b < x.batch; ++b) {
    const int64_t table = b * x.depths * x.ranks;
    Growth growth{x.tokens.const_data_ptr<int64_t>() + table,
                  x.log_probs.const_data_ptr<float>() + table,
                  x.depths,
                  x.ranks,
                  nullptr,
                  nullptr,
                  0};
    if (x.branch) {
      const int64_t length = Indices(*x.branch_lens)[b];
      TORCH_CHECK(length >= 0 && length <= x.longest, "build_draft_tree: branch_lens[", b, "] is ",
                  length, ", expected 0 to ", x.longest, ", the columns of branch");
      growth.branch = x.branch->const_data_ptr<int64_t>() + b * x.longest;
      growth.branch_log_probs = x.branch_log_probs->const_data_ptr<float>() + b * x.longest;
      growth.branch_len = length;
    }
    int64_t* own_tokens = tokens.mutable_data_ptr<int64_t>() + b * width;
    int32_t* own_parents = parents.mutable_data_ptr<int32_t>() + b * width;
    int32_t* own_depths = depths.mutable_data_ptr<int32_t>() + b * width;
    own_tokens[0] = x.anchors.const_data_ptr<int64_t>()[b];
    own_parents[0] = -1;
    own_depths[0] = 0;
    float* own_scores = x.scores ? x.scores->mutable_data_ptr<float>() + b * width : nullptr;
    if (own_scores) own_scores[0] = 0.0f;
    grow(growth, width, own_tokens, own_parents, own_depths, own_scores, workspace);
  }
  return {tokens, parents, depths};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> cut(const at::Tensor& tokens,
                                                               const at::Tensor& parents,
                                                               const at::Tensor& depths,
                                                               const at::Tensor& counts) {
  const Checker check("cut_draft_tree", kLimits, tokens);
  check.int64s("tokens", tokens, {kAny, kAny}, "[bs, nodes + 1]");
  const int64_t bs = tokens.size(0), width = tokens.size(1);
  check.int32s("parents", parents, tokens.sizes(), "shape of tokens");
  check.int32s("depths", depths, tokens.sizes(), "shape of tokens");
  check.int64s("counts", counts, {bs}, "[bs]");
  const int64_t* count = counts.const_data_ptr<int64_t>();
  int64_t kept = 0, all = 0;
  for (int64_t b = 0; b < bs; ++b) {
    TORCH_CHECK(count[b] >= 1 && count[b] <= width, "cut_draft_tree: counts[", b, "] is ", count[b],
                ", expected 1 to ", width, ", the columns of tokens");
    kept = std::max(kept, count[b]);
    all += count[b];
  }
  at::Tensor kept_tokens = at::empty({bs, kept}, at::kLong, tokens);
  at::Tensor kept_parents = at::empty({bs, kept}, at::kInt, tokens);
  at::Tensor kept_depths = at::empty({bs, kept}, at::kInt, tokens);
  at::Tensor rows = at::empty({all}, at::kLong, tokens);
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  const int32_t* parent = parents.const_data_ptr<int32_t>();
  const int32_t* depth = depths.const_data_ptr<int32_t>();
  int64_t* out_token = kept_tokens.mutable_data_ptr<int64_t>();
  int32_t* out_parent = kept_parents.mutable_data_ptr<int32_t>();
  int32_t* out_depth = kept_depths.mutable_data_ptr<int32_t>();
  int64_t* row = rows.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < bs; ++b, token += width, parent += width, depth += width) {
    for (int64_t i = 0; i < kept; ++i) {
      const bool there = i < count[b];
      if (there) *row++ = b * kept + i;
      *out_token++ = there ? token[i] : kNothing;
      *out_parent++ = there ? parent[i] : static_cast<int32_t>(i);
      *out_depth++ = there ? depth[i] : 0;
    }
  }
  return {kept_tokens, kept_parents, kept_depths, rows};
}

Tree<at::Tensor> walk(WalkDraftTree<at::Tensor> x) {
  x.check(Checker("walk_draft_tree", kLimits, x.tokens));
  const int64_t width = x.width, stride = x.stride;
  at::Tensor path = at::empty({x.batch, stride}, at::kInt, x.tokens);
  at::Tensor committed = at::empty({x.batch, stride}, at::kLong, x.tokens);
  at::Tensor lengths = at::empty({x.batch}, at::kInt, x.tokens);
  for (int64_t b = 0; b < x.batch; ++b) {
    const int64_t* token = x.tokens.const_data_ptr<int64_t>() + b * width;
    const int32_t* parent = x.parents.const_data_ptr<int32_t>() + b * width;
    const int64_t* target = x.target_tokens.const_data_ptr<int64_t>() + b * width;
    int32_t* own_path = path.mutable_data_ptr<int32_t>() + b * stride;
    int64_t* own_committed = committed.mutable_data_ptr<int64_t>() + b * stride;
    int64_t length = 0, node = 0;
    while (node < width) {
      TORCH_CHECK(length < stride, "walk_draft_tree: request ", b,
                  " commits more than stride = ", stride,
                  " tokens, expected a stride above every node's depth");
      own_path[length] = static_cast<int32_t>(node);
      own_committed[length++] = target[node];
      const int64_t last = node;
      do ++node;
      while (node < width && (parent[node] != last || token[node] != target[last]));
    }
    lengths.mutable_data_ptr<int32_t>()[b] = static_cast<int32_t>(length);
    std::fill(own_path + length, own_path + stride, own_path[length - 1]);
    std::fill(own_committed + length, own_committed + stride, 0);
  }
  return {path, lengths, committed};
}

// Bytes of one slot of a pool, and from one slot to the next.
struct Rows {
  char* data;
  int64_t bytes, step;
};

void move_tree_path(const at::Tensor& path, const at::Tensor& commit_lens, const at::Tensor& slots,
                    at::TensorList pools) {
  const Checker check("move_tree_path", kLimits, path);
  check.int32s("path", path, {kAny, kAny}, "[bs, stride]");
  const int64_t bs = path.size(0), stride = path.size(1);
  check.int32s("commit_lens", commit_lens, {bs}, "[bs]");
  check.int64s("slots", slots, {bs, kAny}, "[bs, nodes + 1]");
  const int64_t width = slots.size(1);
  std::vector<Rows> rows;
  int64_t num_slots = INT64_MAX;
  for (const at::Tensor& pool : pools) {
    check.any_rows("pools", pool, {kAny, kAny, kAny}, "[slots, heads, head_dim]");
    num_slots = std::min(num_slots, pool.size(0));
    rows.push_back({static_cast<char*>(pool.mutable_data_ptr()),
                    pool.size(1) * pool.size(2) * static_cast<int64_t>(pool.element_size()),
                    pool.stride(0) * static_cast<int64_t>(pool.element_size())});
  }
  std::vector<std::pair<int64_t, int64_t>> moves;  // from slot, to slot
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < bs; ++b) {
    const int64_t length = Indices(commit_lens)[b];
    TORCH_CHECK(length >= 0 && length <= std::min(stride, width), "move_tree_path: commit_lens[", b,
                "] is ", length, ", expected 0 to ", std::min(stride, width),
                ", the columns that path and slots have");
    for (int64_t i = 0; i < length; ++i) {
      const int64_t node = path.const_data_ptr<int32_t>()[b * stride + i];
      // Ascending, so that nothing is overwritten before it has moved.
      TORCH_CHECK(node >= i && node < width, "move_tree_path: path[", b, "][", i, "] is ", node,
                  ", expected ", i, " to ", width - 1);
      if (node == i) continue;
      const int64_t from = slot[b * width + node], to = slot[b * width + i];
      TORCH_CHECK(std::min(from, to) >= 0 && std::max(from, to) < num_slots,
                  "move_tree_path: request ", b, " moves slot ", from, " to ", to,
                  ", but the pools have ", num_slots, " slots");
      moves.push_back({from, to});
    }
  }
  for (const Rows& pool : rows) {
    for (const auto& [from, to] : moves) {
      std::memcpy(pool.data + to * pool.step, pool.data + from * pool.step, pool.bytes);
    }
  }
}

}  // namespace
}  // namespace dflare::cpu

STABLE_TORCH_LIBRARY_IMPL(dflare, CPU, m) {
  m.impl("build_draft_tree",
         TORCH_BOX((&dflare::build_draft_tree<dflare::at::Tensor, dflare::cpu::build>)));
  m.impl("cut_draft_tree", TORCH_BOX(&dflare::cpu::cut));
  m.impl("walk_draft_tree",
         TORCH_BOX((&dflare::walk_draft_tree<dflare::at::Tensor, dflare::cpu::walk>)));
  m.impl("move_tree_path", TORCH_BOX(&dflare::cpu::move_tree_path));
}
