// Compiled once for each instruction set, into the namespace DFLARE_ISA (see CMakeLists.txt).
#include "cpu/isa.h"
#include "cpu/kernels/append.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/linear.h"
#include "cpu/kernels/pointwise.h"

#define DFLARE_STRING_(x) #x
#define DFLARE_STRING(x) DFLARE_STRING_(x)

namespace dflare::cpu::DFLARE_ISA {

template <typename T>
constexpr KernelsFor<T> kTable = {
    &fuse_norm<T>, &project<T>,     &attend<T>,       &merge<T>,        &packed_words<T>, &pack<T>,
    &linear<T>,    &head_argmax<T>, &add_rms_norm<T>, &silu_and_mul<T>, &rotate_heads<T>};

extern const Kernels kernels;
constinit const Kernels kernels = {DFLARE_STRING(DFLARE_ISA), kTable<float>, kTable<BFloat16>};

}  // namespace dflare::cpu::DFLARE_ISA
