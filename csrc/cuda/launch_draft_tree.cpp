// torch.ops.dflare.{build_draft_tree, walk_draft_tree, write_tree_mask} on CUDA.

#include "../contract/draft_tree.h"
#include "checks.h"
#include "params.h"

namespace dflare::cuda {
namespace {

Tree<at::Tensor> build(BuildDraftTree<at::Tensor> x) {
  const Checker check("build_draft_tree", kLimits, x.anchors);
  const DeviceGuard guard(check.device().index());
  overlaps_launches(check);
  x.check(check);
  check.require(!x.scores, "got scores, which are written on the CPU only");
  const at::Tensor tokens = empty({x.batch, x.nodes + 1}, at::kLong, x.anchors);
  const at::Tensor parents = empty({x.batch, x.nodes + 1}, at::kInt, x.anchors);
  const at::Tensor depths = empty({x.batch, x.nodes + 1}, at::kInt, x.anchors);
  if (x.batch == 0) return {tokens, parents, depths};
  BuildTreeParams p{};
  p.anchors = x.anchors.const_data_ptr<int64_t>();
  p.tokens = x.tokens.const_data_ptr<int64_t>();
  p.log_probs = x.log_probs.const_data_ptr<float>();
  if (x.branch) {
    p.branch = x.branch->const_data_ptr<int64_t>();
    p.branch_log_probs = x.branch_log_probs->const_data_ptr<float>();
    p.branch_lens = x.branch_lens->const_data_ptr<int32_t>();
    p.longest = static_cast<int>(x.longest);
  }
  p.batch_size = static_cast<int>(x.batch);
  p.depths = static_cast<int>(x.depths);
  p.ranks = static_cast<int>(x.ranks);
  p.nodes = static_cast<int>(x.nodes);
  p.out_tokens = tokens.mutable_data_ptr<int64_t>();
  p.parents = parents.mutable_data_ptr<int32_t>();
  p.out_depths = depths.mutable_data_ptr<int32_t>();
  check_status(check.op, run_build_draft_tree(p, current_stream(check.device())));
  return {tokens, parents, depths};
}

Tree<at::Tensor> walk(WalkDraftTree<at::Tensor> x) {
  const Checker check("walk_draft_tree", kLimits, x.tokens);
  const DeviceGuard guard(check.device().index());
  overlaps_launches(check);
  x.check(check);
  const at::Tensor path = empty({x.batch, x.stride}, at::kInt, x.tokens);
  const at::Tensor lengths = empty({x.batch}, at::kInt, x.tokens);
  const at::Tensor committed = empty({x.batch, x.stride}, at::kLong, x.tokens);
  if (x.batch == 0) return {path, lengths, committed};
  WalkTreeParams p{};
  p.tokens = x.tokens.const_data_ptr<int64_t>();
  p.parents = x.parents.const_data_ptr<int32_t>();
  p.target_tokens = x.target_tokens.const_data_ptr<int64_t>();
  p.batch_size = static_cast<int>(x.batch);
  p.width = static_cast<int>(x.width);
  p.stride = static_cast<int>(x.stride);
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
  check.tree(width);
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
  m.impl("build_draft_tree", TORCH_BOX((&build_draft_tree<at::Tensor, build>)));
  m.impl("walk_draft_tree", TORCH_BOX((&walk_draft_tree<at::Tensor, walk>)));
  m.impl("write_tree_mask", TORCH_BOX(&write_tree_mask));
}

}  // namespace dflare::cuda
