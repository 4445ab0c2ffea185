// Stands in for csrc/cuda/torch_device.h where launchers run on the emulator.
//
// While operators queue (entry.cpp), kernels run when the test says so, overlapping those before
// them; what they use is guarded memory that lives until then. Else a launch is executed at once.
#pragma once

#include <vector>

#include "../cuda_runtime.h"
#include "../guarded_memory.h"
#include "stable_torch.h"

namespace dflare::cuda {

struct Queue {
  bool open = false;
  uint64_t seed = 0;
  std::vector<void*> scratch;
  std::vector<at::Tensor> products;
};
inline Queue queue;

inline std::string run_queue() { return emulation::synchronize(queue.seed); }

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline cudaStream_t current_stream(const at::Device&) { return nullptr; }

inline void check_status(const char* op, cudaError_t status) {
  TORCH_CHECK(status == cudaSuccess, op, ": emulator: the launch was refused");
  if (queue.open) return;
  ++queue.seed;
  const std::string error = run_queue();
  TORCH_CHECK(error.empty(), op, ": emulator: ", error);
}

inline at::Tensor empty(const std::vector<int64_t>& sizes, at::ScalarType dtype,
                        const at::Tensor& like) {
  at::Tensor plain = at::empty(sizes, dtype, like);
  if (!queue.open) return plain;
  const size_t bytes = plain.numel() * plain.element_size();
  queue.scratch.push_back(emulation::allocate_guarded(bytes > 0 ? bytes : 1, 16, "scratch"));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      queue.scratch.back(), plain.dim(), plain.sizes().data(), plain.strides().data(), 0,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return at::Tensor(handle);
}

inline at::Tensor empty(const std::vector<int64_t>& sizes, const at::Tensor& like) {
  return empty(sizes, like.scalar_type(), like);
}

template <class Product>
at::Tensor product(Product multiply, const at::Tensor& a, const at::Tensor& b) {
  const std::string error = run_queue();
  TORCH_CHECK(error.empty(), "emulator: ", error);
  queue.products.push_back(multiply(a, b));
  return queue.products.back();
}
inline at::Tensor bmm(const at::Tensor& a, const at::Tensor& b) { return product(at::bmm, a, b); }
inline at::Tensor matmul(const at::Tensor& a, const at::Tensor& b) {
  return product(at::matmul, a, b);
}

// Implementations register themselves when a test asks for them (entry.cpp), not at load.
using Registration = void (*)(torch::stable::detail::StableLibrary&);
inline std::vector<Registration>& registrations() {
  static std::vector<Registration> all;
  return all;
}
struct Registrar {
  explicit Registrar(Registration registration) { registrations().push_back(registration); }
};

}  // namespace dflare::cuda

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(name, key, m)                              \
  static void register_operators(torch::stable::detail::StableLibrary&);     \
  static const dflare::cuda::Registrar register_##name(&register_operators); \
  static void register_operators(torch::stable::detail::StableLibrary& m)
