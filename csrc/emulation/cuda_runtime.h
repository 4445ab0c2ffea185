// The part of CUDA's language and runtime that csrc/cuda uses, for a host compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "emulator.h"

// The real runtime's headers define some of these for a host compiler.
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __grid_constant__
#undef __launch_bounds__
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

#include <cuda_launch.h>
