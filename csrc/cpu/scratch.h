#pragma once

#include <stdint.h>

namespace dflare::cpu {

// Whose memory: a kernel's, or that of the operator which runs kernels, on the same thread too.
enum class Scratch { kKernel, kOperator };

// At least `floats` floats of this thread, 64-byte aligned, kept until it asks for more.
float* thread_scratch(int64_t floats, Scratch whose = Scratch::kKernel);

}  // namespace dflare::cpu
