// The parts of a transformer layer on rows, split over the team's threads. Parameters are complete
// and have been checked.
#pragma once

#include "cpu/params.h"
#include "stable_torch.h"

namespace dflare::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kVector = 32;  // elements of the longest vector of any level

// Rows [rows, inputs] that end with zeros where a vector would reach beyond them.
inline at::Tensor padded_rows(const at::Tensor& x) {
  const int64_t rest = x.size(1) % kVector;
  return rest == 0 ? x : at::pad(x, {0, kVector - rest});
}

// p.packed is set there.
template <typename T>
void run_linear(LinearParams<T> p);
template <typename T>
void run_head_argmax(HeadParams<T> p);
template <typename T>
void run_norm(const NormParams<T>& p, int64_t rows);
template <typename T>
void run_gate(const GateParams<T>& p, int64_t rows);
template <typename T>
void run_rotary(const RotaryParams<T>& p, int64_t rows);

}  // namespace dflare::cpu
