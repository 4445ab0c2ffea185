// What the launchers need of torch's CUDA side. csrc/emulation/cuda has the header of this name
// that stands in for it where launchers run on the emulator.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "stable_torch.h"

// Of libtorch_cuda (torch/csrc/inductor/aoti_torch/c/shim.h). Weak: under a torch without CUDA the
// library still loads, and no launcher is ever called.
extern "C" [[gnu::weak]] AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                           void** ret_stream);

namespace dflare::cuda {

using at::bmm;
using at::empty;  // until the kernels that are queued have used it, whoever lets go of it before
using at::matmul;

// Makes a device the current one for as long as it lives.
using DeviceGuard = torch::stable::accelerator::DeviceGuard;

// The stream that torch puts work on.
inline cudaStream_t current_stream(const at::Device& device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Raises what the CUDA runtime refuses; `op` names the operator.
inline void check_status(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // later calls must not report it again
  TORCH_CHECK(false, op, ": CUDA error: ", cudaGetErrorString(status));
}

}  // namespace dflare::cuda
