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
    } else if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& c = attribute.val.clusterDim;
      launch.cluster = dim3(c.x, c.y, c.z);
    } else {
      launch.shared_carveout = attribute.val.sharedMemCarveout;
    }
  }
  const dim3 c = launch.cluster, g = launch.grid;
  const unsigned blocks = c.x * c.y * c.z;
  const bool whole = g.x % c.x == 0 && g.y % c.y == 0 && g.z % c.z == 0;
  if (blocks > 1 && (blocks > 8 || !whole || dflare::emulated_device.capability < 9)) {
    return cudaErrorInvalidValue;
  }
  dflare::emulation::enqueue(std::move(launch));
  return cudaSuccess;
}
