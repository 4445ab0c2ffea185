// build_draft_tree and walk_draft_tree, once for every device: schemas, arguments, and what must
// hold for them. What they compute stands in python/dflare/ops/draft_tree.py.
#pragma once

#include <optional>
#include <tuple>

#include "arguments.h"

namespace dflare {

inline constexpr char kBuildDraftTree[] =
    "build_draft_tree(Tensor anchors, Tensor tokens, Tensor log_probs, int nodes,"
    " Tensor? branch=None, Tensor? branch_log_probs=None, Tensor? branch_lens=None,"
    " Tensor(a!)? scores=None)"
    " -> (Tensor, Tensor, Tensor)";
inline constexpr char kWalkDraftTree[] =
    "walk_draft_tree(Tensor tokens, Tensor parents, Tensor target_tokens, int stride)"
    " -> (Tensor, Tensor, Tensor)";

template <class Tensor>
struct BuildDraftTree {
  const Tensor& anchors;
  const Tensor& tokens;
  const Tensor& log_probs;
  int64_t nodes;
  const std::optional<Tensor>& branch;
  const std::optional<Tensor>& branch_log_probs;
  const std::optional<Tensor>& branch_lens;
  const std::optional<Tensor>& scores;
  // What `check` reads from them; `longest` is 0 without a branch.
  int64_t batch = 0, depths = 0, ranks = 0, longest = 0;

  template <class Checker>
  void check(const Checker& check) {
    check.int64s("anchors", anchors, {kAny}, "[bs]");
    batch = anchors.size(0);
    check.int64s("tokens", tokens, {batch, kAny, kAny}, "[bs, depths, ranks]");
    check.table("log_probs", log_probs, tokens.sizes(), "shape of tokens");
    depths = tokens.size(1), ranks = tokens.size(2);
    check.require(nodes >= 0 && (nodes == 0 || (depths > 0 && ranks >= nodes)), "nodes is ", nodes,
                  " and tokens has shape ", tokens.sizes(),
                  ", expected 0 or more nodes, a depth, and at least as many ranks as nodes");
    check.tree(nodes + 1);
    if (scores) check.table("scores", *scores, {batch, nodes + 1}, "[bs, nodes + 1]");
    const bool has_branch = branch.has_value();
    check.require(
        has_branch == branch_log_probs.has_value() && has_branch == branch_lens.has_value(),
        "got some of branch, branch_log_probs and branch_lens, expected all or none");
    if (!has_branch) return;
    check.int64s("branch", *branch, {batch, kAny}, "[bs, longest]");
    check.table("branch_log_probs", *branch_log_probs, branch->sizes(), "shape of branch");
    check.int32s("branch_lens", *branch_lens, {batch}, "[bs]");
    longest = branch->size(1);
  }
};

template <class Tensor>
struct WalkDraftTree {
  const Tensor& tokens;
  const Tensor& parents;
  const Tensor& target_tokens;
  int64_t stride;
  // What `check` reads from them.
  int64_t batch = 0, width = 0;

  template <class Checker>
  void check(const Checker& check) {
    check.int64s("tokens", tokens, {kAny, kAny}, "[bs, nodes + 1]");
    check.int32s("parents", parents, tokens.sizes(), "shape of tokens");
    check.int64s("target_tokens", target_tokens, tokens.sizes(), "shape of tokens");
    batch = tokens.size(0), width = tokens.size(1);
    check.tree(width);
    check.require(stride >= 1, "stride is ", stride, ", expected at least 1");
    check.require(stride <= check.limits.stride, "stride is ", stride, ", expected at most ",
                  check.limits.stride);
  }
};

template <class Tensor>
using Tree = std::tuple<Tensor, Tensor, Tensor>;

// The operators as Torch calls them, for the implementation `run` of a device.
template <class Tensor, Tree<Tensor> (*run)(BuildDraftTree<Tensor>)>
Tree<Tensor> build_draft_tree(const Tensor& anchors, const Tensor& tokens, const Tensor& log_probs,
                              int64_t nodes, const std::optional<Tensor>& branch,
                              const std::optional<Tensor>& branch_log_probs,
                              const std::optional<Tensor>& branch_lens,
                              const std::optional<Tensor>& scores) {
  return run({anchors, tokens, log_probs, nodes, branch, branch_log_probs, branch_lens, scores});
}

template <class Tensor, Tree<Tensor> (*run)(WalkDraftTree<Tensor>)>
Tree<Tensor> walk_draft_tree(const Tensor& tokens, const Tensor& parents,
                             const Tensor& target_tokens, int64_t stride) {
  return run({tokens, parents, target_tokens, stride});
}

}  // namespace dflare
