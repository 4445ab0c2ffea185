// In place of csrc/emulation/cuda_launch.h: a launch goes through the runtime, as nvcc's does, with
// the real configuration, attributes and arguments. The test device gives it back to the emulator.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <typeinfo>

#include "../runtime/device.h"
#include "emulator.h"

namespace testdevice {

// Runs what the emulator has queued; each time with other interleavings.
inline void finish_emulated_kernels() {
  static uint64_t seed = 0;
  const std::string error = dflare::emulation::synchronize(seed++);
  if (!error.empty()) throw std::runtime_error(error);
}

template <class Params>
Kernel emulated_kernel(void (*kernel)(Params)) {
  const auto bind = [kernel](const Launch& launch, void** arguments) {
    const Params params = *static_cast<const Params*>(arguments[0]);
    return [kernel, launch, params] {
      dflare::emulation::enqueue({.grid = launch.grid,
                                  .block = launch.block,
                                  .cluster = launch.cluster,
                                  .shared_bytes = launch.shared_bytes,
                                  .overlap_prior = launch.overlap_prior,
                                  .may_wait = false,
                                  .shared_carveout = launch.shared_carveout,
                                  .body = [kernel, params] { kernel(params); }});
    };
  };
  return {.name = typeid(Params).name(), .bind = bind, .finish = finish_emulated_kernels};
}

}  // namespace testdevice

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params),
                               const Params& params) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  testdevice::register_kernel(function, testdevice::emulated_kernel(kernel));
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernelExC(config, function, arguments);
}
