// Argument checks of the CUDA operators. Each failure names the operator, the argument, what was
// given and what was expected; a check that passes builds no string and never waits for the device,
// so values in device memory (positions, slots, lengths) are the caller's promise.
#pragma once

#include <limits>

#include "params.h"
#include "stable_torch.h"

#include <cuda/torch_device.h>

namespace dflare::cuda {

constexpr int64_t kAny = -1;

struct Checker {
  const char* op;
  at::Device device;  // that every tensor must be on

  void tensor(const char* name, const at::Tensor& x, at::ScalarType dtype, at::IntArrayRef expected,
              const char* meaning) const {
    TORCH_CHECK(x.device() == device, op, ": ", name, " is on ", x.device(), ", expected ", device);
    TORCH_CHECK(x.scalar_type() == dtype, op, ": ", name, " has dtype ", x.scalar_type(),
                ", expected ", dtype);
    bool same = x.dim() == static_cast<int64_t>(expected.size());
    bool any = false;
    for (size_t i = 0; same && i < expected.size(); ++i) {
      any |= expected[i] == kAny;
      same = expected[i] == kAny || x.size(i) == expected[i];
    }
    TORCH_CHECK(same, op, ": ", name, " has shape ", x.sizes(), ", expected ", expected, " = ",
                meaning, any ? " (-1: any size)" : "");
  }

  void contiguous(const char* name, const at::Tensor& x) const {
    TORCH_CHECK(x.is_contiguous(), op, ": ", name, " of shape ", x.sizes(), " has strides ",
                x.strides(), ", expected a contiguous tensor: call .contiguous()");
    const bool indices = x.scalar_type() == at::kLong || x.scalar_type() == at::kInt;
    if (!indices) aligned(name, x);  // indices are read one by one
  }

  // Rows (the first dimension) may have any stride that keeps 16-byte loads aligned and fits the
  // kernels' 32 bits; the dimensions after it are packed.
  int packed_rows(const char* name, const at::Tensor& x) const {
    int64_t expected = 1;
    for (int64_t i = x.dim() - 1; i >= 1; --i) {
      TORCH_CHECK(x.size(i) <= 1 || x.stride(i) == expected, op, ": ", name, " of shape ",
                  x.sizes(), " has strides ", x.strides(), ", expected ", expected,
                  " for dimension ", i, ": all but the first must be contiguous");
      expected *= x.size(i);
    }
    const int64_t stride = x.stride(0);
    TORCH_CHECK(stride % 8 == 0 && stride >= 0 && stride <= std::numeric_limits<int>::max(), op,
                ": ", name, " has a row stride of ", stride,
                " elements, expected a multiple of 8 under 2^31");
    aligned(name, x);
    return static_cast<int>(stride);
  }

  void aligned(const char* name, const at::Tensor& x) const {
    TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, op, ": ", name,
                " starts at an address that is no multiple of 16 bytes: call .clone()");
  }

  // int32 or int64; returns whether it is int64.
  bool indices(const char* name, const at::Tensor& x, int64_t size, const char* meaning) const {
    const bool is_64bit = x.scalar_type() == at::kLong;
    TORCH_CHECK(is_64bit || x.scalar_type() == at::kInt, op, ": ", name, " has dtype ",
                x.scalar_type(), ", expected Long or Int");
    tensor(name, x, x.scalar_type(), {size}, meaning);
    contiguous(name, x);
    return is_64bit;
  }

  ElementType element(const char* name, const at::Tensor& x) const {
    TORCH_CHECK(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf, op, ": ", name,
                " has dtype ", x.scalar_type(), ", expected BFloat16 or Half");
    return x.scalar_type() == at::kBFloat16 ? ElementType::kBf16 : ElementType::kFp16;
  }

  void head_dim(int64_t given) const {
    TORCH_CHECK(given == 64 || given == 128 || given == 256, op, ": the pools have head_dim ",
                given, ", expected 64, 128 or 256");
  }

  void block_size(int64_t given) const {
    TORCH_CHECK(given >= 1 && given <= kMaxBlock, op, ": block_size is ", given, ", expected 1 to ",
                kMaxBlock);
  }

  // RoPE table and positions; returns the rotary dimension.
  int rope(const at::Tensor& cos_sin_cache, const at::Tensor& positions, int64_t rows,
           int64_t head_dim) const {
    tensor("cos_sin_cache", cos_sin_cache, at::kFloat, {kAny, kAny}, "[max_pos, rotary]");
    contiguous("cos_sin_cache", cos_sin_cache);
    const int64_t rotary = cos_sin_cache.size(1);
    TORCH_CHECK(rotary % 16 == 0 && rotary <= head_dim, op, ": cos_sin_cache has ", rotary,
                " columns, expected a multiple of 16 of at most head_dim = ", head_dim);
    tensor("positions", positions, at::kLong, {rows}, "[rows]");
    contiguous("positions", positions);
    return static_cast<int>(rotary);
  }
};

inline int device_attribute(const Checker& check, cudaDeviceAttr attribute) {
  int value = 0;
  check_status(check.op, cudaDeviceGetAttribute(&value, attribute, check.device.index()));
  return value;
}

// Whether kernels can start while the one before them still runs (programmatic dependent launch).
// Raises where the library has no machine code for the device.
inline bool overlaps_launches(const Checker& check) {
  const int major = device_attribute(check, cudaDevAttrComputeCapabilityMajor);
  TORCH_CHECK(major >= 8, check.op, ": ", check.device, " has compute capability ", major, ".",
              device_attribute(check, cudaDevAttrComputeCapabilityMinor),
              ", the kernels need 8.0 or later");
  return major >= 9;
}

}  // namespace dflare::cuda
