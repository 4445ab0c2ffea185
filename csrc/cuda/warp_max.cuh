#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dflare {

// The highest of a warp's numbers, in every lane.
__device__ __forceinline__ int64_t warp_max(int64_t x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const int64_t other = __shfl_xor_sync(0xffffffffu, x, lanes);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace dflare
