// Checks of the operators' arguments. Each failure names the operator, the argument, what was given
// and what was expected; a check that passes builds no string and never waits for a device, so
// values in device memory (positions, slots, lengths) are the caller's promise there.
#pragma once

#include <limits>

#include "arguments.h"
#include "stable_torch.h"

namespace dflare {

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

// What the kernels of a device take.
struct Limits {
  at::ScalarType elements[2];
  bool (*head_dim)(int64_t);
  const char* head_dims;  // in words
  int64_t rotary_multiple, hidden_multiple;
  int64_t row_multiple;                             // elements between rows, under 2^31 if over 1
  int64_t alignment;                                // bytes of a tensor's start
  int64_t layers, taps, hidden, block, query_rows;  // at most
  int64_t tree, stride;                             // rows of a tree and of its path, at most
  int64_t continuation, match;                      // tokens of a look-up, at most
};

class Checker {
 public:
  const char* const op;
  const Limits& limits;

  // All tensors must be on the device of `first`.
  Checker(const char* op, const Limits& limits, const at::Tensor& first)
      : op(op), limits(limits), device_(first.device()) {}

  const at::Device& device() const { return device_; }

  template <class... Parts>
  void require(bool holds, const Parts&... message) const {
    if (!holds) [[unlikely]]
      detail::fail(op, ": ", message...);
  }

  // The element type of x is that of all weights and rows after it.
  void element(const char* name, const at::Tensor& x) {
    dtype_ = x.scalar_type();
    require(dtype_ == limits.elements[0] || dtype_ == limits.elements[1], name, " has dtype ",
            dtype_, ", expected ", limits.elements[0], " or ", limits.elements[1]);
  }

  using Sizes = at::IntArrayRef;

  // Of the element type, contiguous.
  void weight(const char* name, const at::Tensor& x, Sizes sizes, const char* meaning) const {
    tensor(name, x, dtype_, sizes, meaning);
    contiguous(name, x);
    aligned(name, x);
  }

  // Of the element type; the first dimension may have any stride that kernels can step by.
  void rows(const char* name, const at::Tensor& x, Sizes sizes, const char* meaning) const {
    tensor(name, x, dtype_, sizes, meaning);
    packed_rows(name, x);
    const int64_t stride = x.stride(0), most = std::numeric_limits<int>::max();
    require(limits.row_multiple == 1 ||
                (stride % limits.row_multiple == 0 && stride >= 0 && stride <= most),
            name, " has a row stride of ", stride, " elements, expected a multiple of ",
            limits.row_multiple, " under 2^31");
    aligned(name, x);
  }

  // Contiguous float32.
  void table(const char* name, const at::Tensor& x, Sizes sizes, const char* meaning) const {
    tensor(name, x, at::kFloat, sizes, meaning);
    contiguous(name, x);
    aligned(name, x);
  }

  void int64s(const char* name, const at::Tensor& x, Sizes sizes, const char* meaning) const {
    tensor(name, x, at::kLong, sizes, meaning);
    contiguous(name, x);
  }

  void int32s(const char* name, const at::Tensor& x, Sizes sizes, const char* meaning) const {
    tensor(name, x, at::kInt, sizes, meaning);
    contiguous(name, x);
  }

  void bytes(const char* name, const at::Tensor& x, Sizes sizes, const char* meaning) const {
    tensor(name, x, at::kByte, sizes, meaning);
    contiguous(name, x);
  }

  void integers(const char* name, const at::Tensor& x, Sizes sizes, const char* meaning) const {
    const at::ScalarType dtype = x.scalar_type();
    require(dtype == at::kLong || dtype == at::kInt, name, " has dtype ", dtype,
            ", expected Long or Int");
    tensor(name, x, dtype, sizes, meaning);
    contiguous(name, x);
  }

  void int32_rows(const char* name, const at::Tensor& x, Sizes sizes, const char* meaning) const {
    tensor(name, x, at::kInt, sizes, meaning);
    packed_rows(name, x);
  }

  // Rows of elements of any type.
  void any_rows(const char* name, const at::Tensor& x, Sizes sizes, const char* meaning) const {
    tensor(name, x, x.scalar_type(), sizes, meaning);
    packed_rows(name, x);
  }

  // kAny in `sizes` accepts every size; `meaning` names the dimensions.
  void shape(const char* name, const at::Tensor& x, Sizes sizes, const char* meaning) const {
    bool same = x.dim() == static_cast<int64_t>(sizes.size()), any = false;
    int64_t dimension = 0;
    for (const int64_t size : sizes) {
      any |= size == kAny;
      same = same && (size == kAny || x.size(dimension) == size);
      ++dimension;
    }
    TORCH_CHECK(same, op, ": ", name, " has shape ", x.sizes(), ", expected ", sizes, " = ",
                meaning, any ? " (-1: any size)" : "");
  }

  void count(const char* name, int64_t given, const char* what, int64_t most) const {
    require(given >= 1, name, " has ", given, " ", what, ", expected at least 1");
    require(given <= most, name, " has ", given, " ", what, ", expected at most ", most);
  }

  void hidden(const char* name, int64_t given) const {
    count(name, given, "elements", limits.hidden);
    require(given % limits.hidden_multiple == 0, name, " has ", given,
            " elements, expected a multiple of ", limits.hidden_multiple);
  }

  void heads(int64_t kv_heads, int64_t head_dim) const {
    require(kv_heads > 0, "the pools have 0 heads, expected at least one");
    require(limits.head_dim(head_dim), "the pools have head_dim ", head_dim, ", expected ",
            limits.head_dims);
  }

  void block(int64_t given) const {
    require(given >= 1, "block_size is ", given, ", expected at least 1");
    require(given <= limits.block, "block_size is ", given, ", expected at most ", limits.block);
  }

  // Rows of a draft tree, its anchor's included.
  void tree(int64_t given) const {
    require(given >= 1, "a tree has no rows, expected at least its anchor's");
    require(given <= limits.tree, "a tree has ", given, " rows with its anchor, expected at most ",
            limits.tree);
  }

  void query_rows(int64_t group, int64_t block_size) const {
    require(group * block_size <= limits.query_rows, group,
            " query heads a KV head times block_size ", block_size, " exceeds ", limits.query_rows);
  }

  // Where the tokens of each request lie; returns how many requests there are.
  int64_t page_table(const at::Tensor& req_to_token, const at::Tensor& req_pool_indices,
                     const at::Tensor& seq_lens) const {
    integers("seq_lens", seq_lens, {kAny}, "[bs]");
    int64s("req_pool_indices", req_pool_indices, {seq_lens.size(0)}, "[bs]");
    int32_rows("req_to_token", req_to_token, {kAny, kAny}, "[rows, max_len]");
    return seq_lens.size(0);
  }

  // RoPE table and the positions of `rows` rows.
  Rope rope(const at::Tensor& cos_sin_cache, const at::Tensor& positions, int64_t rows,
            int64_t head_dim) const {
    table("cos_sin_cache", cos_sin_cache, {kAny, kAny}, "[max_pos, rotary]");
    const int64_t rotary = cos_sin_cache.size(1);
    require(rotary % limits.rotary_multiple == 0 && rotary <= head_dim, "cos_sin_cache has ",
            rotary, " columns, expected a multiple of ", limits.rotary_multiple,
            " of at most head_dim = ", head_dim);
    int64s("positions", positions, {rows}, "[rows]");
    return {cos_sin_cache.const_data_ptr<float>(), static_cast<int>(rotary),
            positions.const_data_ptr<int64_t>()};
  }

 private:
  const at::Device device_;
  at::ScalarType dtype_{};

  void tensor(const char* name, const at::Tensor& x, at::ScalarType dtype, Sizes sizes,
              const char* meaning) const {
    TORCH_CHECK(x.device() == device_, op, ": ", name, " is on ", x.device(), ", expected ",
                device_);
    TORCH_CHECK(x.scalar_type() == dtype, op, ": ", name, " has dtype ", x.scalar_type(),
                ", expected ", dtype);
    shape(name, x, sizes, meaning);
  }

  void contiguous(const char* name, const at::Tensor& x) const {
    TORCH_CHECK(x.is_contiguous(), op, ": ", name, " of shape ", x.sizes(), " has strides ",
                x.strides(), ", expected a contiguous tensor: call .contiguous()");
  }

  void packed_rows(const char* name, const at::Tensor& x) const {
    int64_t expected = 1;
    for (int64_t i = x.dim() - 1; i >= 1; --i) {
      TORCH_CHECK(x.size(i) <= 1 || x.stride(i) == expected, op, ": ", name, " of shape ",
                  x.sizes(), " has strides ", x.strides(), ", expected ", expected,
                  " for dimension ", i, ": all but the first must be contiguous");
      expected *= x.size(i);
    }
  }

  void aligned(const char* name, const at::Tensor& x) const {
    TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % limits.alignment == 0, op, ": ",
                name, " starts at an address that is no multiple of ", limits.alignment,
                " bytes: call .clone()");
  }
};

}  // namespace dflare
