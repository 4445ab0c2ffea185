// Dot products of a few rows with four vectors at a time, all contiguous along the summed
// dimension: the core of the context projection and of attention scores with few query rows.
#pragma once

#include "cpu/kernels/simd.h"

namespace dflare::cpu::DFLARE_ISA {

// Four accumulators a row: 24 of 32 registers, or 12 of 16, leaving room for the operands.
constexpr int kDotRows = kRegisters == 32 ? 6 : 3;

// How a vector of A elements meets one of B elements: widened to float and multiplied, or, where
// the processor has it, as pairs of bfloat16 whose products are summed in float.
template <typename A, typename B>
struct Product {
  using Operand = Vec;
  static constexpr int kStep = kLanes;
  static Operand left(const A* a) { return load(a); }
  static Operand right(const B* b) { return load(b); }
  static Operand right_partial(const B* b, int count) { return load_partial(b, count); }
  static Vec add(Vec sum, Operand x, Operand y) { return sum + x * y; }
};

#if defined(__AVX512BF16__)
template <>
struct Product<BFloat16, BFloat16> {
  typedef uint16_t Operand __attribute__((vector_size(64)));
  typedef uint16_t OperandMem __attribute__((vector_size(64), aligned(2), may_alias));
  static constexpr int kStep = 2 * kLanes;
  static Operand left(const BFloat16* a) { return *reinterpret_cast<const OperandMem*>(a); }
  static Operand right(const BFloat16* b) { return *reinterpret_cast<const OperandMem*>(b); }
  static Operand right_partial(const BFloat16* b, int count) {
    BFloat16 padded[kStep] = {};
    memcpy(padded, b, sizeof(BFloat16) * count);
    return right(padded);
  }
  static Vec add(Vec sum, Operand x, Operand y) {
    return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                  reinterpret_cast<__m512bh>(x),
                                                  reinterpret_cast<__m512bh>(y)));
  }
};
#endif

// c[i][j] = sum_k a[i][k] * b[j][k], i < ROWS, j < 4. Rows of `a` are zero-padded to whole vectors;
// those of `b` end at `depth`. PREFETCH asks for what lies `ahead` elements behind each vector of
// `b`.
template <int ROWS, bool PREFETCH = false, typename A, typename B>
inline void dot_tile(const A* a, int64_t a_stride, const B* const* b, int64_t depth, float* c,
                     int64_t c_stride, int64_t ahead = 0) {
  using P = Product<A, B>;
  Vec sums[ROWS][4] = {};
  // One vector of `b` at a time: it and those of `a` are all that must be held beside the sums.
  auto add = [&](int64_t k, auto right) __attribute__((always_inline)) {
    typename P::Operand x[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) x[i] = P::left(a + i * a_stride + k);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const typename P::Operand y = right(b[j] + k);
      if constexpr (PREFETCH) __builtin_prefetch(b[j] + k + ahead);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) sums[i][j] = P::add(sums[i][j], x[i], y);
    }
  };
  const int64_t whole = depth / P::kStep * P::kStep;
  for (int64_t k = 0; k < whole; k += P::kStep) {
    add(k, [](const B* y) { return P::right(y); });
  }
  if (const int rest = static_cast<int>(depth - whole)) {
    add(whole, [rest](const B* y) { return P::right_partial(y, rest); });
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    *reinterpret_cast<Vec4Mem*>(c + i * c_stride) =
        sum4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
  }
}

// dot_tile for any number of rows; the first rows prefetch.
template <bool PREFETCH = false, typename A, typename B>
inline void dot_rows(const A* a, int64_t a_stride, int64_t rows, const B* const* b, int64_t depth,
                     float* c, int64_t c_stride, int64_t ahead = 0) {
  if (rows > kDotRows) {
    dot_tile<kDotRows, PREFETCH>(a, a_stride, b, depth, c, c_stride, ahead);
    a += kDotRows * a_stride;
    c += kDotRows * c_stride;
    rows -= kDotRows;
    return dot_rows(a, a_stride, rows, b, depth, c, c_stride);
  }
  switch (rows) {
    case 6: return dot_tile<6, PREFETCH>(a, a_stride, b, depth, c, c_stride, ahead);
    case 5: return dot_tile<5, PREFETCH>(a, a_stride, b, depth, c, c_stride, ahead);
    case 4: return dot_tile<4, PREFETCH>(a, a_stride, b, depth, c, c_stride, ahead);
    case 3: return dot_tile<3, PREFETCH>(a, a_stride, b, depth, c, c_stride, ahead);
    case 2: return dot_tile<2, PREFETCH>(a, a_stride, b, depth, c, c_stride, ahead);
    case 1: return dot_tile<1, PREFETCH>(a, a_stride, b, depth, c, c_stride, ahead);
  }
}

}  // namespace dflare::cpu::DFLARE_ISA
