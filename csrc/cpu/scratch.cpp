#include "cpu/scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace dflare::cpu {

float* thread_scratch(int64_t floats, Scratch whose) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<float, Free> buffers[2];
  static thread_local int64_t capacities[2] = {};
  auto& buffer = buffers[static_cast<int>(whose)];
  int64_t& capacity = capacities[static_cast<int>(whose)];
  if (floats > capacity) {
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    buffer.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    capacity = buffer ? floats : 0;
    if (!buffer) throw std::bad_alloc();
  }
  return buffer.get();
}

}  // namespace dflare::cpu
