// torch.ops.dflare.head_argmax on CUDA: part by part of the vocabulary, a GEMM of the library and
// our reduction of its logits. An own GEMM with a running maximum would save their way through L2,
// 5 MB of 1.2 GB for one request of Qwen3-8B, and lose to the library's where many rows make the
// head a matter of tensor cores (docs/kernels.md).

#include <algorithm>

#include "../contract/head_argmax.h"
#include "checks.h"
#include "params.h"

namespace dflare::cuda {
namespace {

at::Tensor argmax(HeadArgmax<at::Tensor> x) {
  const Checker check("head_argmax", kLimits, x.hidden);
  const DeviceGuard guard(check.device().index());
  overlaps_launches(check);
  x.check(Checker(check));
  const at::Tensor keys = empty({x.drafted}, at::kLong, x.hidden);
  if (x.drafted == 0) return keys;
  HeadArgmaxParams p{};
  p.element = element_type(x.hidden);
  p.drafted = static_cast<int>(x.drafted);
  p.block_size = static_cast<int>(x.block_size);
  p.head_tokens = x.head_tokens();
  p.keys = keys.mutable_data_ptr<int64_t>();
  p.tokens = x.tokens.mutable_data_ptr<int64_t>();
  const int64_t columns = head_argmax_columns(x.rows, x.vocabulary);
  for (int64_t first = 0; first < x.vocabulary; first += columns) {
    const int64_t count = std::min(columns, x.vocabulary - first);
    at::Tensor weight = x.weight;
    const at::Tensor part = at::transpose(at::narrow(weight, 0, first, count), 0, 1);
    const at::Tensor logits = cuda::matmul(x.hidden, part);
    p.logits = logits.const_data_ptr();
    p.columns = static_cast<int>(count);
    p.first_column = first;
    check_status(check.op, run_head_argmax(p, current_stream(check.device())));
  }
  return keys;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dflare, CUDA, m) {
  m.impl("head_argmax", TORCH_BOX((&head_argmax<at::Tensor, argmax>)));
}

}  // namespace dflare::cuda
