// torch.ops.dflare.lookup_continuations on CUDA.

#include "checks.h"
#include "params.h"

namespace dflare::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor> lookup_continuations(
    const at::Tensor& tokens, const at::Tensor& req_to_token, const at::Tensor& req_pool_indices,
    const at::Tensor& seq_lens, const at::Tensor& anchors, int64_t count, int64_t least_match,
    int64_t longest_match) {
  const Checker check("lookup_continuations", kLimits, tokens);
  const DeviceGuard guard(check.device().index());
  overlaps_launches(check);
  check.int32s("tokens", tokens, {kAny}, "[slots]");
  const int64_t bs = check.page_table(req_to_token, req_pool_indices, seq_lens);
  check.int64s("anchors", anchors, {bs}, "[bs]");
  check.require(count >= 1 && count <= kMaxContext, "count is ", count, ", expected 1 to ",
                kMaxContext);
  check.require(longest_match <= kLookupMatch, "longest_match is ", longest_match,
                ", expected at most ", kLookupMatch);
  check.require(least_match >= 1 && least_match <= longest_match, "least_match is ", least_match,
                ", expected 1 to longest_match = ", longest_match);

  const at::Tensor found = empty({bs, count}, at::kLong, anchors);
  const at::Tensor lengths = empty({bs}, at::kInt, anchors);
  if (bs == 0) return {found, lengths};
  LookupParams p{};
  p.tokens = tokens.const_data_ptr<int32_t>();
  p.req_to_token = req_to_token.const_data_ptr<int32_t>();
  p.req_to_token_stride = req_to_token.stride(0);
  p.req_pool_indices = req_pool_indices.const_data_ptr<int64_t>();
  p.seq_lens = seq_lens.const_data_ptr();
  p.seq_lens_64bit = seq_lens.scalar_type() == at::kLong;
  p.anchors = anchors.const_data_ptr<int64_t>();
  p.batch_size = static_cast<int>(bs);
  p.count = static_cast<int>(count);
  p.least_match = static_cast<int>(least_match);
  p.longest_match = static_cast<int>(longest_match);
  p.found = found.mutable_data_ptr<int64_t>();
  p.lengths = lengths.mutable_data_ptr<int32_t>();
  check_status(check.op, run_lookup_continuations(p, current_stream(check.device())));
  return {found, lengths};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dflare, CUDA, m) {
  m.impl("lookup_continuations", TORCH_BOX(&lookup_continuations));
}

}  // namespace dflare::cuda
