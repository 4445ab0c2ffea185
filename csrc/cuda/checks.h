// What the CUDA operators check beside their contracts, and the device that they run on.
#pragma once

#include "../contract/checker.h"
#include "params.h"

#include <cstdlib>
#include <cstring>

#include <cuda/torch_device.h>

namespace dflare::cuda {

inline constexpr Limits kLimits{
    .elements = {at::kBFloat16, at::kHalf},
    .head_dim = [](int64_t given) { return given == 64 || given == 128 || given == 256; },
    .head_dims = "64, 128 or 256",
    .rotary_multiple = 16,
    .hidden_multiple = 8,
    .row_multiple = 8,  // keeps 16-byte loads aligned
    .alignment = 16,
    .layers = kMaxLayers,
    .taps = kMaxTaps,
    .hidden = kMaxHidden,
    .block = kMaxBlock,
    .query_rows = kMaxQueryRows,
    .tree = kMaxTreeWidth,
    .stride = kMaxContext,
    .continuation = kMaxContext,
    .match = kLookupMatch,
};

inline ElementType element_type(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 ? ElementType::kBf16 : ElementType::kFp16;
}

inline int device_attribute(const Checker& check, cudaDeviceAttr attribute) {
  int value = 0;
  check_status(check.op, cudaDeviceGetAttribute(&value, attribute, check.device().index()));
  return value;
}

// Whether kernels can start while the one before them still runs (programmatic dependent launch).
// Raises where the library has no machine code for the device.
inline bool overlaps_launches(const Checker& check) {
  const int major = device_attribute(check, cudaDevAttrComputeCapabilityMajor);
  TORCH_CHECK(major >= 8, check.op, ": ", check.device(), " has compute capability ", major, ".",
              device_attribute(check, cudaDevAttrComputeCapabilityMinor),
              ", the kernels need 8.0 or later");
  return major >= 9;
}

// Whether an environment variable is 1: asks for what no GPU has measured. Read at every call, so
// that a benchmark can measure both.
inline bool asked_for(const char* variable) {
  const char* value = std::getenv(variable);
  return value != nullptr && std::strcmp(value, "1") == 0;
}

// Whether DFLARE_WGMMA=1 asks for the products of warpgroups, on a device of sm_90, which has them.
inline bool wants_wgmma(const Checker& check) {
  return asked_for("DFLARE_WGMMA") &&
         device_attribute(check, cudaDevAttrComputeCapabilityMajor) == 9;
}

}  // namespace dflare::cuda
