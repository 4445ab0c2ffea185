// torch.ops.dflare.lookup_continuations on CUDA.

#include "checks.h"
#include "params.h"
#include "stable_torch.h"

namespace dflare::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor> lookup_continuations(
    const at::Tensor& tokens, const at::Tensor& req_to_token, const at::Tensor& req_pool_indices,
    const at::Tensor& seq_lens, const at::Tensor& anchors, int64_t count, int64_t least_match,
    int64_t longest_match) {
  const Checker check{"lookup_continuations", tokens.device()};
  const DeviceGuard guard(check.device.index());
  overlaps_launches(check);
  LookupParams p{};
  check.tensor("tokens", tokens, at::kInt, {kAny}, "[slots]");
  check.contiguous("tokens", tokens);
  check.tensor("req_to_token", req_to_token, at::kInt, {kAny, kAny}, "[rows, max_len]");
  TORCH_CHECK(req_to_token.size(1) <= 1 || req_to_token.stride(1) == 1, check.op,
              ": req_to_token has strides ", req_to_token.strides(), ", expected contiguous rows");
  p.seq_lens_64bit = check.indices("seq_lens", seq_lens, kAny, "[bs]");
  const int64_t bs = seq_lens.size(0);
  check.tensor("req_pool_indices", req_pool_indices, at::kLong, {bs}, "[bs]");
  check.contiguous("req_pool_indices", req_pool_indices);
  check.tensor("anchors", anchors, at::kLong, {bs}, "[bs]");
  check.contiguous("anchors", anchors);
  TORCH_CHECK(count >= 1 && count <= kMaxContext, check.op, ": count is ", count,
              ", expected 1 to ", kMaxContext);
  TORCH_CHECK(longest_match <= kLookupMatch, check.op, ": longest_match is ", longest_match,
              ", expected at most ", kLookupMatch);
  TORCH_CHECK(least_match >= 1 && least_match <= longest_match, check.op, ": least_match is ",
              least_match, ", expected 1 to longest_match = ", longest_match);

  const at::Tensor found = at::empty({bs, count}, at::kLong, anchors);
  const at::Tensor lengths = at::empty({bs}, at::kInt, anchors);
  if (bs == 0) return {found, lengths};
  p.tokens = tokens.const_data_ptr<int32_t>();
  p.req_to_token = req_to_token.const_data_ptr<int32_t>();
  p.req_to_token_stride = req_to_token.stride(0);
  p.req_pool_indices = req_pool_indices.const_data_ptr<int64_t>();
  p.seq_lens = seq_lens.const_data_ptr();
  p.anchors = anchors.const_data_ptr<int64_t>();
  p.batch_size = static_cast<int>(bs);
  p.count = static_cast<int>(count);
  p.least_match = static_cast<int>(least_match);
  p.longest_match = static_cast<int>(longest_match);
  p.found = found.mutable_data_ptr<int64_t>();
  p.lengths = lengths.mutable_data_ptr<int32_t>();
  check_status(check.op, run_lookup_continuations(p, current_stream(check.device)));
  return {found, lengths};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dflare, CUDA, m) {
  m.impl("lookup_continuations", TORCH_BOX(&lookup_continuations));
}

}  // namespace dflare::cuda
