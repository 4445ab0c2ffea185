// Dot products of a few rows with four vectors at a time, all contiguous along the summed
// dimension: the core of the context projection and of attention scores with few query rows.
#pragma once

#include "cpu/kernels/simd.h"

namespace dflare::cpu::DFLARE_ISA {

// Four accumulators a row: 24 of 32 registers, or 12 of 16, leaving room for the operands.
constexpr int kDotRows = kRegisters == 32 ? 6 : 3;

// c[i][j] = sum_k a[i][k] * b[j][k], i < ROWS, j < 4. Rows of `a` are zero-padded to whole vectors;
// those of `b` end at `depth`.
template <int ROWS, typename T>
inline void dot_tile(const float* a, int64_t a_stride, const T* const* b, int64_t depth, float* c,
                     int64_t c_stride) {
  Vec sums[ROWS][4] = {};
  const T *b0 = b[0], *b1 = b[1], *b2 = b[2], *b3 = b[3];
  const int64_t whole = depth / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    const Vec w0 = load(b0 + k), w1 = load(b1 + k), w2 = load(b2 + k), w3 = load(b3 + k);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vec x = load(a + i * a_stride + k);
      sums[i][0] += x * w0;
      sums[i][1] += x * w1;
      sums[i][2] += x * w2;
      sums[i][3] += x * w3;
    }
  }
  if (whole < depth) {
    const int rest = static_cast<int>(depth - whole);
    for (int i = 0; i < ROWS; ++i) {
      const Vec x = load(a + i * a_stride + whole);
      for (int j = 0; j < 4; ++j) sums[i][j] += x * load_partial(b[j] + whole, rest);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    *reinterpret_cast<Vec4Mem*>(c + i * c_stride) =
        sum4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
  }
}

// dot_tile for any number of rows.
template <typename T>
inline void dot_rows(const float* a, int64_t a_stride, int64_t rows, const T* const* b,
                     int64_t depth, float* c, int64_t c_stride) {
  while (rows >= kDotRows) {
    dot_tile<kDotRows>(a, a_stride, b, depth, c, c_stride);
    a += kDotRows * a_stride;
    c += kDotRows * c_stride;
    rows -= kDotRows;
  }
  switch (rows) {
    case 5:
      return dot_tile<5>(a, a_stride, b, depth, c, c_stride);
    case 4:
      return dot_tile<4>(a, a_stride, b, depth, c, c_stride);
    case 3:
      return dot_tile<3>(a, a_stride, b, depth, c, c_stride);
    case 2:
      return dot_tile<2>(a, a_stride, b, depth, c, c_stride);
    case 1:
      return dot_tile<1>(a, a_stride, b, depth, c, c_stride);
  }
}

}  // namespace dflare::cpu::DFLARE_ISA
