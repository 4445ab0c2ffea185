// Stands in for PyTorch's header of this name where launchers run on the emulator: a launch that is
// checked is also executed.
#pragma once

#include <c10/util/Exception.h>

#include "../../cuda_runtime.h"

namespace dflare::emulation {

inline uint64_t next_seed() {
  static uint64_t seed = 0;
  return seed++;
}

inline void check(cudaError_t status) {
  TORCH_CHECK(status == cudaSuccess, "emulator: the launch was refused");
  const std::string error = synchronize(next_seed());
  TORCH_CHECK(error.empty(), "emulator: ", error);
}

}  // namespace dflare::emulation

#define C10_CUDA_CHECK(status) dflare::emulation::check(status)
