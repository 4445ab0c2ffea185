// The kernels of one instruction set, and the choice between those that were compiled.
#pragma once

#include <type_traits>

#include "cpu/params.h"

namespace dflare::cpu {

template <typename T>
struct KernelsFor {
  // Rows (compacted) and tasks in [begin, end); see kernels/append.h.
  void (*fuse_norm)(const AppendParams<T>&, int64_t begin, int64_t end);
  void (*project)(const AppendParams<T>&, int64_t begin, int64_t end);
  // See kernels/attention.h.
  void (*attend)(const AttentionParams<T>&, const AttentionItem&, int64_t split_begin,
                 int64_t split_end, float* parts);
  void (*merge)(const AttentionParams<T>&, const AttentionItem&, float* parts, int64_t count);
  // Words that `pack` writes of so many rows; none where rows of x are read as they lie.
  int64_t (*packed_words)(int64_t rows, int64_t inputs);
  void (*pack)(const LinearParams<T>&, uint32_t* packed);
  // Tasks in [begin, end); see kernels/linear.h.
  void (*linear)(const LinearParams<T>&, int64_t begin, int64_t end);
  void (*head_argmax)(const HeadParams<T>&, int64_t begin, int64_t end);
  // Rows in [begin, end); see kernels/pointwise.h.
  void (*add_rms_norm)(const NormParams<T>&, int64_t begin, int64_t end);
  void (*silu_and_mul)(const GateParams<T>&, int64_t begin, int64_t end);
  void (*rotate_heads)(const RotaryParams<T>&, int64_t begin, int64_t end);
};

struct Kernels {
  const char* isa;
  KernelsFor<float> f32;
  KernelsFor<BFloat16> bf16;

  template <typename T>
  const KernelsFor<T>& get() const {
    if constexpr (std::is_same_v<T, float>) {
      return f32;
    } else {
      return bf16;
    }
  }
};

// The best level that this CPU has, or the one that the environment variable DFLARE_CPU_ISA names.
const Kernels& kernels();

}  // namespace dflare::cpu
