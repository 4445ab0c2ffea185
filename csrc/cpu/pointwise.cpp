// torch.ops.dflare.{add_rms_norm, silu_and_mul, rotate_heads} on the CPU.

#include <algorithm>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/run_layer.h"
#include "cpu/team.h"
#include "stable_torch.h"

namespace dflare::cpu {
namespace {

// Elements that are worth waking a thread for: a few microseconds.
constexpr int64_t kThreadElements = 1 << 14;

template <typename Params, typename Kernel>
void run_rows(const Params& p, Kernel kernel, int64_t rows, int64_t row_elements) {
  const int64_t grain = std::max<int64_t>(1, kThreadElements / std::max<int64_t>(1, row_elements));
  parallel_for(at::get_num_threads(), rows, grain,
               [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

template <typename T>
void run_norm(const NormParams<T>& p, int64_t rows) {
  run_rows(p, kernels().get<T>().add_rms_norm, rows, p.hidden);
}

template <typename T>
void run_gate(const GateParams<T>& p, int64_t rows) {
  run_rows(p, kernels().get<T>().silu_and_mul, rows, 4 * p.width);
}

template <typename T>
void run_rotary(const RotaryParams<T>& p, int64_t rows) {
  run_rows(p, kernels().get<T>().rotate_heads, rows, p.heads * p.head_dim);
}

template void run_norm(const NormParams<float>&, int64_t);
template void run_norm(const NormParams<BFloat16>&, int64_t);
template void run_gate(const GateParams<float>&, int64_t);
template void run_gate(const GateParams<BFloat16>&, int64_t);
template void run_rotary(const RotaryParams<float>&, int64_t);
template void run_rotary(const RotaryParams<BFloat16>&, int64_t);

namespace {

at::Tensor add_rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                        const at::Tensor& weight, double eps) {
  Checker check("add_rms_norm", kLimits, x);
  check.element("x", x);
  check.weight("weight", weight, {kAny}, "[hidden]");
  const int64_t hidden = weight.size(0);
  check.rows("x", x, {kAny, hidden}, "[rows, hidden]");
  if (residual) check.rows("residual", *residual, {x.size(0), hidden}, "[rows, hidden]");
  at::Tensor out = at::empty({x.size(0), hidden}, x);
  with_element_type(x, [&](auto element) {
    using T = decltype(element);
    NormParams<T> p{};
    p.x = static_cast<const T*>(x.const_data_ptr());
    p.x_stride = x.stride(0);
    p.residual = residual ? static_cast<T*>(residual->mutable_data_ptr()) : nullptr;
    p.residual_stride = residual ? residual->stride(0) : 0;
    p.weight = static_cast<const T*>(weight.const_data_ptr());
    p.eps = static_cast<float>(eps);
    p.out = static_cast<T*>(out.mutable_data_ptr());
    p.hidden = hidden;
    run_norm(p, x.size(0));
  });
  return out;
}

at::Tensor silu_and_mul(const at::Tensor& x) {
  Checker check("silu_and_mul", kLimits, x);
  check.element("x", x);
  check.rows("x", x, {kAny, kAny}, "[rows, 2 * width]");
  check.require(x.size(1) % 2 == 0, "x has shape ", x.sizes(),
                ", expected an even number of columns: gates, then as many values");
  const int64_t width = x.size(1) / 2;
  at::Tensor out = at::empty({x.size(0), width}, x);
  with_element_type(x, [&](auto element) {
    using T = decltype(element);
    GateParams<T> p{};
    p.x = static_cast<const T*>(x.const_data_ptr());
    p.x_stride = x.stride(0);
    p.out = static_cast<T*>(out.mutable_data_ptr());
    p.width = width;
    run_gate(p, x.size(0));
  });
  return out;
}

void rotate_heads(const at::Tensor& x, const at::Tensor& cos_sin_cache, const at::Tensor& positions,
                  int64_t head_dim) {
  Checker check("rotate_heads", kLimits, x);
  check.element("x", x);
  check.rows("x", x, {kAny, kAny}, "[rows, heads * head_dim]");
  check.require(head_dim > 0 && x.size(1) % head_dim == 0, "x has shape ", x.sizes(),
                ", expected a multiple of head_dim = ", head_dim, " columns");
  const Rope rope = check.rope(cos_sin_cache, positions, x.size(0), head_dim);
  for (int64_t row = 0; row < x.size(0); ++row) {
    check_position(check.op, rope, row, cos_sin_cache.size(0));
  }
  with_element_type(x, [&](auto element) {
    using T = decltype(element);
    RotaryParams<T> p{};
    p.x = static_cast<T*>(x.mutable_data_ptr());
    p.x_stride = x.stride(0);
    p.heads = x.size(1) / head_dim;
    p.head_dim = head_dim;
    p.rope = rope;
    run_rotary(p, x.size(0));
  });
}

}  // namespace
}  // namespace dflare::cpu

STABLE_TORCH_LIBRARY_IMPL(dflare, CPU, m) {
  m.impl("add_rms_norm", TORCH_BOX(&dflare::cpu::add_rms_norm));
  m.impl("silu_and_mul", TORCH_BOX(&dflare::cpu::silu_and_mul));
  m.impl("rotate_heads", TORCH_BOX(&dflare::cpu::rotate_heads));
}
