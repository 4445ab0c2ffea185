// The same bytes as another kind of tensor, and which bytes those are.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <functional>
#include <vector>

#include "../runtime/device.h"

namespace testdevice {

using Stack = torch::jit::Stack;

// Plain kernels, whatever mode the caller is in.
struct KernelGuard {
  c10::impl::ExcludeDispatchKeyGuard no_autograd{
      c10::autograd_dispatch_keyset_with_ADInplaceOrView};
  c10::impl::ExcludeDispatchKeyGuard no_python{
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot})};
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  c10::InferenceMode no_inference{false};
};

// A CPU tensor on a CUDA or pinned tensor's memory. It does not own it, as a kernel does not: what
// the caching allocator gives to another tensor meanwhile is overwritten, as on a device.
at::Tensor host_alias(const at::Tensor& x);

// A tensor's shape, strides and dtype without memory.
at::Tensor meta_alias(const at::Tensor& x);

// The value with all its tensors mapped, CUDA devices replaced and generators dropped.
c10::IValue map_tensors(const c10::IValue& value, c10::Device device,
                        const std::function<at::Tensor(const at::Tensor&)>& map);

// Adds what a kernel touches that reads or writes all elements of the value's CUDA tensors.
void add_accesses(const c10::IValue& value, bool write, std::vector<Access>& accesses);
void add_accesses(const at::Tensor& x, bool write, std::vector<Access>& accesses);

}  // namespace testdevice
