// The parts of a transformer layer on rows, split over the team's threads. Parameters are complete
// and have been checked.
#pragma once

#include "cpu/params.h"

namespace dflare::cpu {

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
