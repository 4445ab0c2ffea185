// Context lengths of a batch, as SGLang has them: int32 or int64.
#pragma once

#include "heuristics.h"
#include "ptx.cuh"

namespace dflare {

// Whatever the length is, what is derived from it neither overflows nor leaves the schedule.
__device__ __forceinline__ int load_seq_len(const void* seq_lens, bool is_64bit, int request) {
  if (is_64bit) {
    const int64_t length = static_cast<const int64_t*>(seq_lens)[request];
    return static_cast<int>(length < 0 ? 0 : length < kMaxContext ? length : kMaxContext);
  }
  return min(max(static_cast<const int32_t*>(seq_lens)[request], 0), kMaxContext);
}

}  // namespace dflare
