// torch.ops.dflare.{build_draft_tree, walk_draft_tree, write_tree_mask} on CUDA.

#include "checks.h"
#include "params.h"

namespace dflare::cuda {
namespace {

void check_width(const Checker& check, int64_t width) {
  check.require(width >= 1 && width <= kMaxTreeWidth, "a tree has ", width,
                " rows with its anchor, expected 1 to ", kMaxTreeWidth);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> build_draft_tree(
    const at::Tensor& anchors, const at::Tensor& tokens, const at::Tensor& log_probs, int64_t nodes,
    const std::optional<at::Tensor>& branch, const std::optional<at::Tensor>& branch_log_probs,
    const std::optional<at::Tensor>& branch_lens) {
  const Checker check("build_draft_tree", kLimits, anchors);
  const DeviceGuard guard(check.device().index());
  overlaps_launches(check);
  check.int64s("anchors", anchors, {kAny}, "[bs]");
  const int64_t bs = anchors.size(0);
  check.int64s("tokens", tokens, {bs, kAny, kAny}, "[bs, depths, ranks]");
  check.table("log_probs", log_probs, tokens.sizes(), "shape of tokens");
  const int64_t depths = tokens.size(1), ranks = tokens.size(2);
  check.require(nodes >= 0 && (nodes == 0 || (depths > 0 && ranks >= nodes)), "nodes is ", nodes,
                " and tokens has shape ", tokens.sizes(),
                ", expected 0 or more nodes, a depth, and at least as many ranks as nodes");
  check_width(check, nodes + 1);
  const bool has_branch = branch.has_value();
  check.require(has_branch == branch_log_probs.has_value() && has_branch == branch_lens.has_value(),
                "got some of branch, branch_log_probs and branch_lens, expected all or none");
  BuildTreeParams p{};
  if (has_branch) {
    check.int64s("branch", *branch, {bs, kAny}, "[bs, longest]");
    check.table("branch_log_probs", *branch_log_probs, branch->sizes(), "shape of branch");
    check.int32s("branch_lens", *branch_lens, {bs}, "[bs]");
    p.branch = branch->const_data_ptr<int64_t>();
    p.branch_log_probs = branch_log_probs->const_data_ptr<float>();
    p.branch_lens = branch_lens->const_data_ptr<int32_t>();
    p.longest = static_cast<int>(branch->size(1));
  }
  const at::Tensor out = empty({bs, nodes + 1}, at::kLong, anchors);
  const at::Tensor parents = empty({bs, nodes + 1}, at::kInt, anchors);
  const at::Tensor out_depths = empty({bs, nodes + 1}, at::kInt, anchors);
  if (bs == 0) return {out, parents, out_depths};
  p.anchors = anchors.const_data_ptr<int64_t>();
  p.tokens = tokens.const_data_ptr<int64_t>();
  p.log_probs = log_probs.const_data_ptr<float>();
  p.batch_size = static_cast<int>(bs);
  p.depths = static_cast<int>(depths);
  p.ranks = static_cast<int>(ranks);
  p.nodes = static_cast<int>(nodes);
  p.out_tokens = out.mutable_data_ptr<int64_t>();
  p.parents = parents.mutable_data_ptr<int32_t>();
  p.out_depths = out_depths.mutable_data_ptr<int32_t>();
  check_status(check.op, run_build_draft_tree(p, current_stream(check.device())));
  return {out, parents, out_depths};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> walk_draft_tree(const at::Tensor& tokens,
                                                               const at::Tensor& parents,
                                                               const at::Tensor& target_tokens,
                                                               int64_t stride) {
  const Checker check("walk_draft_tree", kLimits, tokens);
  const DeviceGuard guard(check.device().index());
  overlaps_launches(check);
  check.int64s("tokens", tokens, {kAny, kAny}, "[bs, nodes + 1]");
  check.int32s("parents", parents, tokens.sizes(), "shape of tokens");
  check.int64s("target_tokens", target_tokens, tokens.sizes(), "shape of tokens");
  const int64_t bs = tokens.size(0), width = tokens.size(1);
  check_width(check, width);
  check.require(stride > 0 && stride <= kMaxContext, "stride is ", stride, ", expected 1 to ",
                kMaxContext);
  const at::Tensor path = empty({bs, stride}, at::kInt, tokens);
  const at::Tensor lengths = empty({bs}, at::kInt, tokens);
  const at::Tensor committed = empty({bs, stride}, at::kLong, tokens);
  if (bs == 0) return {path, lengths, committed};
  WalkTreeParams p{};
  p.tokens = tokens.const_data_ptr<int64_t>();
  p.parents = parents.const_data_ptr<int32_t>();
  p.target_tokens = target_tokens.const_data_ptr<int64_t>();
  p.batch_size = static_cast<int>(bs);
  p.width = static_cast<int>(width);
  p.stride = static_cast<int>(stride);
  p.path = path.mutable_data_ptr<int32_t>();
  p.commit_lens = lengths.mutable_data_ptr<int32_t>();
  p.committed = committed.mutable_data_ptr<int64_t>();
  check_status(check.op, run_walk_draft_tree(p, current_stream(check.device())));
  return {path, lengths, committed};
}

void write_tree_mask(const at::Tensor& parents, const at::Tensor& seq_lens,
                     const at::Tensor& mask) {
  const Checker check("write_tree_mask", kLimits, parents);
  const DeviceGuard guard(check.device().index());
  overlaps_launches(check);
  check.int32s("parents", parents, {kAny, kAny}, "[bs, nodes + 1]");
  const int64_t bs = parents.size(0), width = parents.size(1);
  check_width(check, width);
  check.integers("seq_lens", seq_lens, {bs}, "[bs]");
  check.bytes("mask", mask, {kAny}, "[sum of (nodes + 1) * (seq_lens + nodes + 1)]");
  if (bs == 0) return;
  TreeMaskParams p{};
  p.parents = parents.const_data_ptr<int32_t>();
  p.seq_lens = seq_lens.const_data_ptr();
  p.seq_lens_64bit = seq_lens.scalar_type() == at::kLong;
  p.batch_size = static_cast<int>(bs);
  p.width = static_cast<int>(width);
  p.mask = mask.mutable_data_ptr<uint8_t>();
  check_status(check.op, run_write_tree_mask(p, current_stream(check.device())));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dflare, CUDA, m) {
  m.impl("build_draft_tree", TORCH_BOX(&build_draft_tree));
  m.impl("walk_draft_tree", TORCH_BOX(&walk_draft_tree));
  m.impl("write_tree_mask", TORCH_BOX(&write_tree_mask));
}

}  // namespace dflare::cuda
