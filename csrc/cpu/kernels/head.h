// What happens to one head of one token: per-head RMSNorm and RoPE, in float.
#pragma once

#include "cpu/kernels/simd.h"

namespace dflare::cpu::DFLARE_ISA {

inline float sqrt(float x) { return __builtin_sqrtf(x); }

template <typename T>
inline void load_row(float* __restrict out, const T* in, int64_t size) {
  for (int64_t c = 0; c < size; c += kLanes) store(out + c, load(in + c));
}

template <typename T>
inline void store_row(T* out, const float* __restrict in, float factor, int64_t size) {
  for (int64_t c = 0; c < size; c += kLanes) store(out + c, load(in + c) * factor);
}

template <typename T>
inline void head_norm(float* x, const T* weight, float eps, int64_t head_dim) {
  Vec squares = {};
  for (int64_t c = 0; c < head_dim; c += kLanes) squares += load(x + c) * load(x + c);
  const float inverse = 1.0f / sqrt(sum(squares) / static_cast<float>(head_dim) + eps);
  for (int64_t c = 0; c < head_dim; c += kLanes)
    store(x + c, load(x + c) * inverse * load(weight + c));
}

inline void head_rope(float* __restrict x, const Rope& rope, int64_t row) {
  const int64_t half = rope.rotary / 2;
  const float* __restrict cos = rope.cos_sin + rope.positions[row] * rope.rotary;
  const float* __restrict sin = cos + half;
  float* __restrict second = x + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = second[i];
    x[i] = a * cos[i] - b * sin[i];
    second[i] = b * cos[i] + a * sin[i];
  }
}

}  // namespace dflare::cpu::DFLARE_ISA
