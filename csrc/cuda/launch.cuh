// The one way a kernel is launched.
#pragma once

#include <cuda_runtime.h>

namespace dflare {

// Launches kernel(params). With overlap_prior the grid may start while the kernel before it in the
// stream still runs (programmatic dependent launch; needs sm_90), so the kernel itself must call
// ptx::wait_for_prior_kernels in every thread block before it touches anything that may be
// changing.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                   bool overlap_prior, const Params& params, cudaStream_t stream) {
  constexpr int kWithoutOptIn = 48 * 1024;
  if (shared_bytes > kWithoutOptIn) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap_prior ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace dflare
