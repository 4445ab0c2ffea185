// Argument checks of the CPU operators. Each failure names the operator, the argument, what was
// given and what was expected; a check that passes builds no string.
#pragma once

#include "cpu/params.h"
#include "stable_torch.h"

namespace dflare::cpu {

constexpr int64_t kAny = -1;

struct Checker {
  const char* op;

  void device(const char* name, const at::Tensor& x) const {
    TORCH_CHECK(x.is_cpu(), op, ": ", name, " is on ", x.device(), ", expected cpu");
  }

  void dtype(const char* name, const at::Tensor& x, at::ScalarType expected) const {
    TORCH_CHECK(x.scalar_type() == expected, op, ": ", name, " has dtype ", x.scalar_type(),
                ", expected ", expected);
  }

  void integer(const char* name, const at::Tensor& x) const {
    TORCH_CHECK(x.scalar_type() == at::kLong || x.scalar_type() == at::kInt, op, ": ", name,
                " has dtype ", x.scalar_type(), ", expected Long or Int");
  }

  // kAny in `expected` accepts every size; `meaning` names the dimensions.
  void shape(const char* name, const at::Tensor& x, at::IntArrayRef expected,
             const char* meaning) const {
    bool same = x.dim() == static_cast<int64_t>(expected.size());
    for (size_t i = 0; same && i < expected.size(); ++i) {
      same = expected[i] == kAny || x.size(i) == expected[i];
    }
    TORCH_CHECK(same, op, ": ", name, " has shape ", x.sizes(), ", expected ", expected, " = ",
                meaning, expected_any(expected));
  }

  void contiguous(const char* name, const at::Tensor& x) const {
    TORCH_CHECK(x.is_contiguous(), op, ": ", name, " of shape ", x.sizes(), " has strides ",
                x.strides(), ", expected a contiguous tensor: call .contiguous()");
  }

  // The last `inner` dimensions are packed; the others may have any stride.
  void packed(const char* name, const at::Tensor& x, int64_t inner) const {
    int64_t expected = 1;
    for (int64_t i = x.dim() - 1; i >= x.dim() - inner; --i) {
      TORCH_CHECK(x.size(i) <= 1 || x.stride(i) == expected, op, ": ", name, " of shape ",
                  x.sizes(), " has strides ", x.strides(), ", expected ", expected,
                  " for dimension ", i, ": the last ", inner, " dimension(s) must be contiguous");
      expected *= x.size(i);
    }
  }

  // Of the pools, [slots, kv_heads, head_dim].
  void heads(int64_t kv_heads, int64_t head_dim) const {
    TORCH_CHECK(kv_heads > 0, op, ": the pools have 0 heads, expected at least one");
    TORCH_CHECK(head_dim > 0 && head_dim % 16 == 0, op, ": the pools have head_dim ", head_dim,
                ", expected a positive multiple of 16");
  }

 private:
  static const char* expected_any(at::IntArrayRef expected) {
    for (int64_t size : expected) {
      if (size == kAny) return " (-1: any size)";
    }
    return "";
  }
};

// Elements of a 1-d int32 or int64 tensor of any stride.
class Indices {
 public:
  explicit Indices(const at::Tensor& x)
      : data_(x.const_data_ptr()),
        stride_(x.dim() == 1 ? x.stride(0) : 0),
        is_long_(x.scalar_type() == at::kLong) {}

  int64_t operator[](int64_t i) const {
    return is_long_ ? static_cast<const int64_t*>(data_)[i * stride_]
                    : static_cast<const int32_t*>(data_)[i * stride_];
  }

 private:
  const void* data_;
  int64_t stride_;
  bool is_long_;
};

// Checks a RoPE table and the positions of `rows` rows; check_position those that are used.
inline Rope make_rope(const Checker& check, const at::Tensor& cos_sin_cache,
                      const at::Tensor& positions, int64_t rows, int64_t head_dim) {
  check.device("cos_sin_cache", cos_sin_cache);
  check.dtype("cos_sin_cache", cos_sin_cache, at::kFloat);
  check.shape("cos_sin_cache", cos_sin_cache, {kAny, kAny}, "[max_pos, rotary]");
  check.contiguous("cos_sin_cache", cos_sin_cache);
  const int64_t rotary = cos_sin_cache.size(1);
  TORCH_CHECK(rotary % 2 == 0 && rotary <= head_dim, check.op, ": cos_sin_cache has ", rotary,
              " columns, expected an even rotary dimension of at most head_dim = ", head_dim);
  check.device("positions", positions);
  check.dtype("positions", positions, at::kLong);
  check.shape("positions", positions, {rows}, "[rows]");
  check.contiguous("positions", positions);
  return {cos_sin_cache.const_data_ptr<float>(), rotary, positions.const_data_ptr<int64_t>()};
}

inline void check_position(const Checker& check, const Rope& rope, int64_t row, int64_t max_pos) {
  const int64_t position = rope.positions[row];
  TORCH_CHECK(position >= 0 && position < max_pos, check.op, ": positions[", row, "] is ", position,
              ", but cos_sin_cache has ", max_pos, " rows");
}

// Calls `run` with a value of the element type of `x`.
template <typename Run>
auto with_element_type(const Checker& check, const char* name, const at::Tensor& x,
                       const Run& run) {
  check.device(name, x);
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, check.op, ": ",
              name, " has dtype ", x.scalar_type(), ", expected Float or BFloat16");
  return x.scalar_type() == at::kFloat ? run(float{}) : run(BFloat16{});
}

}  // namespace dflare::cpu
