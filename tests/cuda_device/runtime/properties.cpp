// The CUDA API: what the device is. It describes itself as an H100, whose code paths are tested.
#include <cstdio>
#include <cstring>

#include "limits.h"
#include "state.h"

using namespace testdevice;

CUDA_API cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : fail(cudaErrorInvalidDevice);
}

CUDA_API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::memset(p, 0, sizeof *p);
  std::strcpy(p->name, "NVIDIA H100 (test device)");
  p->uuid.bytes[0] = 1;
  size_t unused;
  cudaMemGetInfo(&unused, &p->totalGlobalMem);
  p->major = 9;
  p->multiProcessorCount = kProcessors;
  p->warpSize = kWarp;
  p->sharedMemPerBlock = kSharedBytes;
  p->sharedMemPerBlockOptin = kSharedBytesOptIn;
  p->sharedMemPerMultiprocessor = kSharedBytesSm;
  p->reservedSharedMemPerBlock = kReservedSharedBytes;
  p->regsPerBlock = p->regsPerMultiprocessor = kRegisters;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = kThreadsBlock;
  p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = kThreadsSm;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->l2CacheSize = kL2Bytes;
  p->memoryBusWidth = 5120;
  p->textureAlignment = 512;
  p->asyncEngineCount = 3;
  p->concurrentKernels = p->unifiedAddressing = p->canMapHostMemory = 1;
  p->cooperativeLaunch = p->clusterLaunch = p->streamPrioritiesSupported = 1;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = kProcessors; break;
    case cudaDevAttrWarpSize: *value = kWarp; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = kThreadsBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = kThreadsSm; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kSharedBytes; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kSharedBytesOptIn; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = kSharedBytesSm; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = kReservedSharedBytes; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = kRegisters; break;
    case cudaDevAttrL2CacheSize: *value = kL2Bytes; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

CUDA_API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) {
  std::snprintf(id, static_cast<size_t>(size), "0000:01:00.0");
  return cudaSuccess;
}

CUDA_API cudaError_t cudaProfilerStart() { return cudaSuccess; }
CUDA_API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// PyTorch asks for driver functions by name and calls some of them unconditionally.
CUDA_API cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                                      unsigned long long,
                                                      cudaDriverEntryPointQueryResult* status) {
  constexpr int kNotSupported = 801;  // CUDA_ERROR_NOT_SUPPORTED
  *function = reinterpret_cast<void*>(+[]() -> int { return kNotSupported; });
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
