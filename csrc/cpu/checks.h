// What the CPU operators check beside their contracts: values, which a host can read.
#pragma once

#include "contract/checker.h"
#include "cpu/params.h"

namespace dflare::cpu {

inline constexpr Limits kLimits{
    .elements = {at::kFloat, at::kBFloat16},
    .head_dim = [](int64_t given) { return given > 0 && given % 16 == 0; },
    .head_dims = "a positive multiple of 16",
    .rotary_multiple = 2,
    .hidden_multiple = 1,
    .row_multiple = 1,
    .alignment = 1,
    .layers = kUnlimited,
    .taps = kUnlimited,
    .hidden = kUnlimited,
    .block = kUnlimited,
    .query_rows = kUnlimited,
    .tree = kUnlimited,
    .stride = kUnlimited,
    .continuation = kUnlimited,
    .match = kUnlimited,
};

// Elements of a contiguous 1-d int32 or int64 tensor.
class Indices {
 public:
  explicit Indices(const at::Tensor& x)
      : data_(x.const_data_ptr()), is_long_(x.scalar_type() == at::kLong) {}

  int64_t operator[](int64_t i) const {
    return is_long_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }

 private:
  const void* data_;
  bool is_long_;
};

inline void check_position(const char* op, const Rope& rope, int64_t row, int64_t max_pos) {
  const int64_t position = rope.positions[row];
  TORCH_CHECK(position >= 0 && position < max_pos, op, ": positions[", row, "] is ", position,
              ", but cos_sin_cache has ", max_pos, " rows");
}

// Calls `run` with a value of the element type of `x`, which was checked.
template <typename Run>
auto with_element_type(const at::Tensor& x, const Run& run) {
  return x.scalar_type() == at::kFloat ? run(float{}) : run(BFloat16{});
}

}  // namespace dflare::cpu
