// Storage types of tensor elements. Kernels never do arithmetic on them: they move 16-byte vectors
// and unpack pairs to fp32 (ptx::unpack), so no CUDA half header is needed.
#pragma once

#include <cstdint>

namespace dflare {

struct Bf16 {
  uint16_t bits;
};

struct Fp16 {
  uint16_t bits;
};

enum class ElementType : int { kBf16, kFp16 };

}  // namespace dflare
