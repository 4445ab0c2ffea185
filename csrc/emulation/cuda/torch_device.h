// Stands in for csrc/cuda/torch_device.h where launchers run on the emulator: a launch that is
// checked is also executed.
#pragma once

#include "../cuda_runtime.h"
#include "stable_torch.h"

namespace dflare::cuda {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline cudaStream_t current_stream(const at::Device&) { return nullptr; }

inline void check_status(const char* op, cudaError_t status) {
  static uint64_t seed = 0;
  TORCH_CHECK(status == cudaSuccess, op, ": emulator: the launch was refused");
  const std::string error = emulation::synchronize(seed++);
  TORCH_CHECK(error.empty(), op, ": emulator: ", error);
}

}  // namespace dflare::cuda
