// What the operators' contracts share: free of Torch, since kernels include them.
#pragma once

#include <cstdint>

// Always inlined by the host's compiler: the one copy that a linker keeps of an inline function
// could be that of another instruction set's kernels (csrc/cpu).
#if defined(__CUDACC__)
#define DFLARE_HOST_DEVICE __host__ __device__
#else
#define DFLARE_HOST_DEVICE [[gnu::always_inline]]
#endif

namespace dflare {

constexpr int64_t kAny = -1;  // a dimension of any size

// Neox-style rotary embedding: halves of the first `rotary` elements of a head turn together.
struct Rope {
  const float* cos_sin;  // [max_pos, rotary]: rotary / 2 cosines, then as many sines
  int rotary;
  const int64_t* positions;  // of each row
};

// Sliding windows fit 31 bits; a negative one is none.
inline int clamp_window(int64_t window) {
  return static_cast<int>(window < 0 ? -1 : window < (1 << 30) ? window : 1 << 30);
}

}  // namespace dflare
