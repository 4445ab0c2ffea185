// What lies between matrix products in a transformer layer, a row of a token at a time.
#pragma once

#include "cpu/kernels/head.h"

namespace dflare::cpu::DFLARE_ISA {

// Calls run(c, load, store) for every vector of a row; the last may be partial.
template <typename Run>
inline void each_vector(int64_t size, const Run& run) {
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) {
    run(c, [](const auto* p) { return load(p); }, [](auto* p, Vec x) { store(p, x); });
  }
  if (const int rest = static_cast<int>(size - whole)) {
    run(
        whole, [rest](const auto* p) { return load_partial(p, rest); },
        [rest](auto* p, Vec x) { store_partial(p, x, rest); });
  }
}

template <typename T>
void add_rms_norm(const NormParams<T>& p, int64_t begin, int64_t end) {
  float* sums = thread_scratch(p.hidden + kLanes);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = p.x + row * p.x_stride;
    T* residual = p.residual ? p.residual + row * p.residual_stride : nullptr;
    T* out = p.out + row * p.hidden;
    Vec squares = {};
    each_vector(p.hidden, [&](int64_t c, auto read, auto write) {
      Vec y = read(x + c);
      if (residual) {
        y += read(residual + c);
        write(residual + c, y);
      }
      squares += y * y;
      store(sums + c, y);
    });
    const float inverse = 1.0f / sqrt(sum(squares) / static_cast<float>(p.hidden) + p.eps);
    each_vector(p.hidden, [&](int64_t c, auto read, auto write) {
      write(out + c, load(sums + c) * inverse * read(p.weight + c));
    });
  }
}

template <typename T>
void silu_and_mul(const GateParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = p.x + row * p.x_stride;
    const T* up = gate + p.width;
    T* out = p.out + row * p.width;
    each_vector(p.width, [&](int64_t c, auto read, auto write) {
      const Vec x = read(gate + c);
      const Vec gated = x / (1.0f + exp(-x)) * read(up + c);
      write(out + c, x < -88.0f ? Vec{} : gated);  // the exponential ends at 88
    });
  }
}

// Both halves of a head turn together: neox style.
template <typename T>
void rotate_heads(const RotaryParams<T>& p, int64_t begin, int64_t end) {
  const int64_t half = p.rope.rotary / 2;
  for (int64_t row = begin; row < end; ++row) {
    const float* cos = p.rope.cos_sin + p.rope.positions[row] * p.rope.rotary;
    for (int64_t head = 0; head < p.heads; ++head) {
      T* first = p.x + row * p.x_stride + head * p.head_dim;
      T* second = first + half;
      each_vector(half, [&](int64_t c, auto read, auto write) {
        const Vec a = read(first + c), b = read(second + c);
        const Vec cosine = read(cos + c), sine = read(cos + half + c);
        write(first + c, a * cosine - b * sine);
        write(second + c, b * cosine + a * sine);
      });
    }
  }
}

}  // namespace dflare::cpu::DFLARE_ISA
