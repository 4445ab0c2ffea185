#pragma once

#include <stdint.h>

namespace dflare::cpu {

// At least `floats` floats of this thread, 64-byte aligned, kept until it asks for more.
float* thread_scratch(int64_t floats);

}  // namespace dflare::cpu
