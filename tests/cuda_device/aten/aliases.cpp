#include "aliases.h"

#include <ATen/ops/empty_strided.h>

namespace testdevice {

at::Tensor host_alias(const at::Tensor& x) {
  if (!x.defined()) return x;
  void* memory = const_cast<void*>(x.storage().data());
  c10::Storage storage(c10::Storage::use_byte_size_t(), x.storage().nbytes(),
                       c10::DataPtr(memory, c10::Device(c10::kCPU)), nullptr, false);
  at::Tensor alias = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), x.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return alias;
}

at::Tensor meta_alias(const at::Tensor& x) {
  if (!x.defined()) return x;
  return at::empty_strided(x.sizes(), x.strides(),
                           x.options().device(at::kMeta).pinned_memory(false));
}

c10::IValue map_tensors(const c10::IValue& value, c10::Device device,
                        const std::function<at::Tensor(const at::Tensor&)>& map) {
  if (value.isTensor()) return map(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> mapped;
    for (const at::Tensor& x : value.toTensorVector()) mapped.push_back(map(x));
    return mapped;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> mapped;
    for (const std::optional<at::Tensor>& x : value.toOptionalTensorList()) {
      mapped.push_back(x ? std::optional<at::Tensor>(map(*x)) : std::nullopt);
    }
    return mapped;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) return device;
  if (value.isGenerator()) return {};
  return value;
}

void add_accesses(const at::Tensor& x, bool write, std::vector<Access>& accesses) {
  if (!x.defined() || !x.is_cuda() || x.numel() == 0) return;
  // Dimensions of one contiguous piece, from the innermost on; the others repeat it.
  constexpr int64_t kMostPieces = 256;
  const auto base = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const auto item = static_cast<int64_t>(x.itemsize());
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) > 1 && x.stride(d) != 0) dims.emplace_back(x.stride(d), x.size(d));
  }
  std::ranges::sort(dims);
  int64_t piece = 1, pieces = 1, span = 1;
  size_t inner = 0;
  for (; inner < dims.size() && dims[inner].first <= piece; ++inner) {
    piece += dims[inner].first * (dims[inner].second - 1);
  }
  for (const auto& [stride, size] : dims) span += stride * (size - 1);
  for (size_t d = inner; d < dims.size(); ++d) pieces *= dims[d].second;
  if (pieces > kMostPieces) {
    accesses.push_back({base, base + static_cast<uintptr_t>(span * item), write});
    return;
  }
  for (int64_t i = 0; i < pieces; ++i) {
    int64_t rest = i, offset = 0;
    for (size_t d = inner; d < dims.size(); ++d) {
      offset += rest % dims[d].second * dims[d].first;
      rest /= dims[d].second;
    }
    const uintptr_t begin = base + static_cast<uintptr_t>(offset * item);
    accesses.push_back({begin, begin + static_cast<uintptr_t>(piece * item), write});
  }
}

void add_accesses(const c10::IValue& value, bool write, std::vector<Access>& accesses) {
  if (value.isTensor()) {
    add_accesses(value.toTensor(), write, accesses);
  } else if (value.isTensorList()) {
    for (const at::Tensor& x : value.toTensorVector()) add_accesses(x, write, accesses);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& x : value.toOptionalTensorList()) {
      if (x) add_accesses(*x, write, accesses);
    }
  }
}

}  // namespace testdevice
