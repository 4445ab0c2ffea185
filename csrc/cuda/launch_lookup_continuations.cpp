// torch.ops.dflare.lookup_continuations on CUDA.

#include "../contract/lookup_continuations.h"
#include "checks.h"
#include "params.h"

namespace dflare::cuda {
namespace {

Continuations<at::Tensor> look_up(LookupContinuations<at::Tensor> x) {
  const Checker check("lookup_continuations", kLimits, x.tokens);
  const DeviceGuard guard(check.device().index());
  overlaps_launches(check);
  x.check(check);
  const at::Tensor found = empty({x.batch, x.count}, at::kLong, x.anchors);
  const at::Tensor lengths = empty({x.batch}, at::kInt, x.anchors);
  if (x.batch == 0) return {found, lengths};
  LookupParams p{};
  p.tokens = x.tokens.const_data_ptr<int32_t>();
  p.req_to_token = x.req_to_token.const_data_ptr<int32_t>();
  p.req_to_token_stride = x.req_to_token.stride(0);
  p.req_pool_indices = x.req_pool_indices.const_data_ptr<int64_t>();
  p.seq_lens = x.seq_lens.const_data_ptr();
  p.seq_lens_64bit = x.seq_lens.scalar_type() == at::kLong;
  p.anchors = x.anchors.const_data_ptr<int64_t>();
  p.batch_size = static_cast<int>(x.batch);
  p.count = static_cast<int>(x.count);
  p.least_match = static_cast<int>(x.least_match);
  p.longest_match = static_cast<int>(x.longest_match);
  p.found = found.mutable_data_ptr<int64_t>();
  p.lengths = lengths.mutable_data_ptr<int32_t>();
  check_status(check.op, run_lookup_continuations(p, current_stream(check.device())));
  return {found, lengths};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dflare, CUDA, m) {
  m.impl("lookup_continuations", TORCH_BOX((&lookup_continuations<at::Tensor, look_up>)));
}

}  // namespace dflare::cuda
