// The part of CUDA's language and runtime that csrc/cuda uses, for a host compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define DFLARE_DYNAMIC_SHARED_MEMORY(name) \
  unsigned char* name = dflare::emulation::dynamic_shared_memory()

// Of the running thread; the scheduler sets them.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// ------------------------------------------------------------ vector types

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// ------------------------------------------------------------ device functions

using std::max;
using std::min;

inline void __syncthreads() { dflare::emulation::block_barrier(); }

// Every lane receives the value of the lane that it names.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source) {
  if (mask != 0xffffffffu) dflare::emulation::fail("shuffle among part of a warp");
  struct Operand {
    T in, out;
    int source;
  } mine{value, value, source & 31};
  dflare::emulation::warp_operation("shuffle", &mine, [](void* const* operands) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* o = static_cast<Operand*>(operands[lane]);
      o->out = static_cast<Operand*>(operands[o->source])->in;
    }
  });
  return mine.out;
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ lanes);
}

// ------------------------------------------------------------ host functions

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributePreferredSharedMemoryCarveout,
};
enum { cudaSharedmemCarveoutDefault = -1, cudaSharedmemCarveoutMaxShared = 100 };
using cudaStream_t = void*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    int programmaticStreamSerializationAllowed;
    int sharedMemCarveout;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// The most that every supported GPU gives a block (consumer parts: 100 KiB an SM, 1 of it
// reserved).
constexpr int kMaxSharedBytes = 99 * 1024;

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= kMaxSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};

// A small device of compute capability 9.0, or DFLARE_EMULATED_CAPABILITY (major version) and 0.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* major = std::getenv("DFLARE_EMULATED_CAPABILITY");
  const int values[] = {16, 228 * 1024, major ? std::atoi(major) : 9, 0};
  *value = values[attribute];
  return cudaSuccess;
}

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params),
                               const Params& params) {
  if (config->dynamicSmemBytes > kMaxSharedBytes || config->gridDim.y > 65535 ||
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
