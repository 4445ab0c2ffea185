// The one way a kernel is launched.
#pragma once

#include <cuda_runtime.h>

namespace dflare {

// Launches kernel(params). Every kernel asks for the same split of an SM's memory, all of it
// shared: an SM cannot change the split while blocks run on it, so a kernel that asked for another
// one than its predecessor would wait for the SM to drain and could not overlap it. With
// overlap_prior the grid may start while the kernel before it in the stream still runs
// (programmatic dependent launch; needs sm_90), so the kernel itself must call
// ptx::wait_for_prior_kernels in every thread block before it touches anything that may be
// changing. Blocks of a cluster start together (sm_90); the grid is a multiple of it.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                   bool overlap_prior, const Params& params, cudaStream_t stream,
                   dim3 cluster = dim3(1)) {
  constexpr int kWithoutOptIn = 48 * 1024;
  if (shared_bytes > kWithoutOptIn) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[3] = {};
  unsigned count = 0;
  attributes[count].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
  attributes[count++].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  if (overlap_prior) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster.x * cluster.y * cluster.z > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = cluster.x;
    attributes[count].val.clusterDim.y = cluster.y;
    attributes[count++].val.clusterDim.z = cluster.z;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace dflare
