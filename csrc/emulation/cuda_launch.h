// How a kernel is launched on the emulator; the test device has a file of the same name.
#pragma once

#include "emulator.h"

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params),
                               const Params& params) {
  const auto most_shared = static_cast<size_t>(dflare::most_shared_bytes());
  if (config->dynamicSmemBytes > most_shared || config->gridDim.y > 65535 ||
      config->gridDim.z > 65535 || config->blockDim.x > 1024) {
    return cudaErrorInvalidValue;
  }
  dflare::emulation::Launch launch{.grid = config->gridDim,
                                   .block = config->blockDim,
                                   .shared_bytes = config->dynamicSmemBytes,
                                   .body = [kernel, params] { kernel(params); }};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      launch.overlap_prior = attribute.val.programmaticStreamSerializationAllowed != 0;
    } else {
      launch.shared_carveout = attribute.val.sharedMemCarveout;
    }
  }
  dflare::emulation::enqueue(std::move(launch));
  return cudaSuccess;
}
