// What the operators use of torch, from its stable ABI alone: one build of the library serves every
// torch from TORCH_TARGET_VERSION on, and every Python. The names are ATen's, which readers of
// torch extensions know; where the ABI lacks something, this file alone makes up for it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace dflare::at {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::get_num_threads;
using torch::stable::matmul;
using torch::stable::narrow;
using torch::stable::pad;
using torch::stable::Tensor;
using torch::stable::transpose;
using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;
using TensorList = const std::vector<Tensor>&;

inline constexpr ScalarType kByte = ScalarType::Byte;
inline constexpr ScalarType kBFloat16 = ScalarType::BFloat16;
inline constexpr ScalarType kFloat = ScalarType::Float;
inline constexpr ScalarType kHalf = ScalarType::Half;
inline constexpr ScalarType kInt = ScalarType::Int;
inline constexpr ScalarType kLong = ScalarType::Long;

// An uninitialised contiguous tensor on the device of `like`.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  const Device device = like.device();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())),
      device.index(), &handle));
  return Tensor(handle);
}

inline Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like) {
  return empty(sizes, like.scalar_type(), like);
}

// Batched product [b, m, k] x [b, k, n], by the library of the tensors' device.
inline Tensor bmm(const Tensor& a, const Tensor& b) {
  StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace dflare::at

namespace dflare::detail {

template <class T>
void print(std::ostream& out, const T& value) {
  out << value;
}

inline void print(std::ostream& out, at::IntArrayRef values) {
  out << '[';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << ']';
}

inline void print(std::ostream& out, at::Device device) {
  switch (device.type()) {
    case at::DeviceType::CPU: out << "cpu"; break;
    case at::DeviceType::CUDA: out << "cuda"; break;
    case at::DeviceType::Meta: out << "meta"; break;
    default: out << "device type " << static_cast<int>(device.type());
  }
  if (device.has_index() && !device.is_cpu()) out << ':' << device.index();
}

template <class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (print(message, parts), ...);
  throw std::runtime_error(message.str());
}

}  // namespace dflare::detail

// As torch's, which the stable ABI only has with the source file in front of the message. Parts of
// the message are evaluated when the check fails.
#define TORCH_CHECK(condition, ...)      \
  do {                                   \
    if (!(condition)) [[unlikely]]       \
      dflare::detail::fail(__VA_ARGS__); \
  } while (false)
