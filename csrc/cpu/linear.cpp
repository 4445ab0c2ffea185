// torch.ops.dflare.linear on the CPU, and how the tasks of a product are run.

#include <algorithm>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/run_layer.h"
#include "cpu/scratch.h"
#include "cpu/team.h"
#include "stable_torch.h"

namespace dflare::cpu {
namespace {

// Weight bytes that are worth waking a thread for: a few microseconds of reading.
constexpr int64_t kThreadBytes = 1 << 17;

// The caller packs: that takes a microsecond where a step has few rows.
template <typename T, typename Params>
void run_tasks(Params& p, void (*run)(const Params&, int64_t, int64_t)) {
  const KernelsFor<T>& kernel = kernels().get<T>();
  const int64_t words = kernel.packed_words(p.rows, p.inputs);
  auto* packed = reinterpret_cast<uint32_t*>(thread_scratch(words, Scratch::kOperator));
  kernel.pack(p, packed);
  p.packed = packed;
  const int64_t tasks = ceil_div(p.outputs, kLinearOutputs) * ceil_div(p.rows, kLinearRows);
  const int64_t task_bytes = kLinearOutputs * std::max<int64_t>(p.inputs, 1) * sizeof(T);
  parallel_for(at::get_num_threads(), tasks, std::max<int64_t>(1, kThreadBytes / task_bytes),
               [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace

template <typename T>
void run_linear(LinearParams<T> p) {
  run_tasks<T>(p, kernels().get<T>().linear);
}
template <typename T>
void run_head_argmax(HeadParams<T> p) {
  run_tasks<T>(p, kernels().get<T>().head_argmax);
}

template void run_linear(LinearParams<float>);
template void run_linear(LinearParams<BFloat16>);
template void run_head_argmax(HeadParams<float>);
template void run_head_argmax(HeadParams<BFloat16>);

namespace {

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias) {
  Checker check("linear", kLimits, x);
  check.element("x", x);
  check.rows("x", x, {kAny, kAny}, "[rows, inputs]");
  const int64_t rows = x.size(0), inputs = x.size(1);
  check.weight("weight", weight, {kAny, inputs}, "[outputs, inputs]");
  const int64_t outputs = weight.size(0);
  if (bias) check.weight("bias", *bias, {outputs}, "[outputs]");
  at::Tensor out = at::empty({rows, outputs}, x);
  const at::Tensor padded = padded_rows(x);
  with_element_type(x, [&](auto element) {
    using T = decltype(element);
    LinearParams<T> p{};
    p.x = static_cast<const T*>(padded.const_data_ptr());
    p.x_stride = padded.stride(0);
    p.weight = static_cast<const T*>(weight.const_data_ptr());
    p.bias = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
    p.out = static_cast<T*>(out.mutable_data_ptr());
    p.rows = rows;
    p.inputs = inputs;
    p.outputs = outputs;
    run_linear(p);
  });
  return out;
}

}  // namespace
}  // namespace dflare::cpu

STABLE_TORCH_LIBRARY_IMPL(dflare, CPU, m) { m.impl("linear", TORCH_BOX(&dflare::cpu::linear)); }
