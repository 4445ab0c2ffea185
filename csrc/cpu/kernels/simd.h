// Vectors of the instruction set that this translation unit is compiled for, by GNU vector
// extensions: the same source serves AVX-512, AVX2 and any other machine. No standard library here:
// an inline function of it, compiled for AVX-512, could be the copy that the linker keeps.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/params.h"

namespace dflare::cpu::DFLARE_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));
typedef float Vec4 __attribute__((vector_size(16)));
// The same at any address of any type.
typedef float VecMem __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntVecMem __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t HalfVecMem __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef float Vec4Mem __attribute__((vector_size(16), aligned(4), may_alias));

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec load(const float* p) { return *reinterpret_cast<const VecMem*>(p); }
inline Vec load(const BFloat16* p) {
  const HalfVec half = *reinterpret_cast<const HalfVecMem*>(p);
  // The generic form costs three instructions where these are one.
#if defined(__AVX512F__)
  const IntVec wide =
      reinterpret_cast<IntVec>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(half)));
#elif defined(__AVX2__)
  const IntVec wide =
      reinterpret_cast<IntVec>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(half)));
#else
  const IntVec wide = __builtin_convertvector(half, IntVec);
#endif
  return reinterpret_cast<Vec>(wide << 16);
}

inline void store(float* p, Vec x) { *reinterpret_cast<VecMem*>(p) = x; }
// Rounds to nearest even; a NaN stays one (rounding could carry its payload away).
inline void store(BFloat16* p, Vec x) {
  const IntVec bits = reinterpret_cast<IntVec>(x);
  const IntVec rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const IntVec kept = x == x ? rounded : (bits | 0x400000);
  *reinterpret_cast<HalfVecMem*>(p) = __builtin_convertvector((kept >> 16) & 0xffff, HalfVec);
}

// The first `count` < kLanes elements; the others read as zero, or are not written.
template <typename T>
inline Vec load_partial(const T* p, int count) {
  T padded[kLanes] = {};
  memcpy(padded, p, sizeof(T) * count);
  return load(padded);
}
template <typename T>
inline void store_partial(T* p, Vec x, int count) {
  T padded[kLanes];
  store(padded, x);
  memcpy(p, padded, sizeof(T) * count);
}

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// [a0+a1, a2+a3, b0+b1, b2+b3] in each group of four lanes.
inline Vec add_neighbours(Vec a, Vec b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// The sum of the groups of four lanes.
inline Vec4 fold(Vec x) {
#if defined(__AVX512F__)
  typedef float Vec8 __attribute__((vector_size(32)));
  const Vec8 y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
#else
  return x;
#endif
}

// [sum(a), sum(b), sum(c), sum(d)]
inline Vec4 sum4(Vec a, Vec b, Vec c, Vec d) {
  return fold(add_neighbours(add_neighbours(a, b), add_neighbours(c, d)));
}
inline float sum(Vec x) {
  const Vec4 y = fold(x);
  return (y[0] + y[1]) + (y[2] + y[3]);
}
inline float max_lane(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  float best = lanes[0];
  for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// e^x for x <= 88, within 1.5 ulp; 0 below the smallest normal number. NaN stays NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2; e^r = 1 + r + r^2 Q(r), Q fitted for the least relative error.
inline Vec exp(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504f + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec q = 0.001381459878757596f * r + 0.008368716575205326f;
  q = q * r + 0.04166838899254799f;
  q = q * r + 0.1666652113199234f;
  q = q * r + 0.4999999403953552f;
  const Vec mantissa = q * (r * r) + r + 1.0f;
  const IntVec exponent = reinterpret_cast<IntVec>(shifted) << 23;
  const Vec result = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(mantissa) + exponent);
  return x < -87.3f ? Vec{} : result;
}

// tanh x, relative error about 2e-7 everywhere: an odd polynomial near 0, where the exponential
// form would cancel.
inline Vec tanh(Vec x) {
  const Vec magnitude = x < 0.0f ? -x : x;
  const Vec y = x * x;
  Vec q = -0.005704986397176981f * y + 0.02063908614218235f;
  q = q * y - 0.05373971536755562f;
  q = q * y + 0.13331441581249237f;
  q = q * y - 0.3333328068256378f;
  const Vec near = q * (y * x) + x;
  const Vec bounded = magnitude > 10.0f ? broadcast(10.0f) : magnitude;
  const Vec far = 1.0f - 2.0f / (exp(bounded * 2.0f) + 1.0f);
  return magnitude < 0.625f ? near : (x < 0.0f ? -far : far);
}

}  // namespace dflare::cpu::DFLARE_ISA
