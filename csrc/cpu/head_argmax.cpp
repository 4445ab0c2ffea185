// torch.ops.dflare.head_argmax on the CPU.

#include "contract/head_argmax.h"

#include <algorithm>

#include "cpu/checks.h"
#include "cpu/run_layer.h"
#include "stable_torch.h"

namespace dflare::cpu {
namespace {

// The best of each block of outputs; [rows, blocks].
template <typename T>
at::Tensor best_of_blocks(const HeadArgmax<at::Tensor>& x, int64_t blocks) {
  const at::Tensor padded = padded_rows(x.hidden);
  at::Tensor best = at::empty({x.rows, blocks}, at::kLong, x.hidden);
  HeadParams<T> p{};
  p.x = static_cast<const T*>(padded.const_data_ptr());
  p.x_stride = padded.stride(0);
  p.weight = static_cast<const T*>(x.weight.const_data_ptr());
  p.rows = x.rows;
  p.inputs = x.inputs;
  p.outputs = x.vocabulary;
  p.head_tokens = x.head_tokens();
  p.best = best.mutable_data_ptr<int64_t>();
  run_head_argmax(p);
  return best;
}

at::Tensor argmax(HeadArgmax<at::Tensor> x) {
  x.check(Checker("head_argmax", kLimits, x.hidden));
  const at::Tensor keys = at::empty({x.drafted}, at::kLong, x.hidden);
  const int64_t blocks = ceil_div(x.vocabulary, kLinearOutputs);
  const at::Tensor best = with_element_type(
      x.hidden, [&](auto element) { return best_of_blocks<decltype(element)>(x, blocks); });
  const int64_t* all = best.const_data_ptr<int64_t>();
  const int block_size = static_cast<int>(x.block_size);
  for (int drafted = 0; drafted < x.drafted; ++drafted) {
    const int64_t* row = all + drafting_row(drafted, block_size) * blocks;
    const int64_t key = *std::max_element(row, row + blocks);
    keys.mutable_data_ptr<int64_t>()[drafted] = key;
    x.tokens.mutable_data_ptr<int64_t>()[drafted] = argmax_token(key);
  }
  return keys;
}

}  // namespace
}  // namespace dflare::cpu

STABLE_TORCH_LIBRARY_IMPL(dflare, CPU, m) {
  m.impl("head_argmax", TORCH_BOX((&dflare::head_argmax<dflare::at::Tensor, dflare::cpu::argmax>)));
}
