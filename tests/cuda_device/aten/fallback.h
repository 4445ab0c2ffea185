// The function that answers for the CUDA kernels of PyTorch's operators.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>

#include "aliases.h"

namespace testdevice {

// Puts "run the CPU's kernel on the same memory" on the current stream.
//
// While work is deferred (lazy, or a capture) nothing runs, so shapes come from Meta kernels; a
// stand-in without one is run once on zeros. Operators whose result or whose host code needs values
// wait for the stream, as their CUDA kernels do.
void run_on_device(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack);

// aten::copy_ between the host and the device, and within it (copy.cpp).
void copy_on_device(const c10::OperatorHandle& op, Stack* stack);

// Calls the stand-in, an operator for CUDA tensors that launches kernels, and says what they touch.
void launch_on_device(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack);

// Makes `stand_in`, an operator of the same schema with a CPU kernel, run in place of `name`.
void redirect(const std::string& name, const std::string& overload, const std::string& stand_in);

// Fails with the operator's name if the runtime does.
void check(cudaError_t error, const c10::OperatorHandle& op);
[[noreturn]] void refuse_call(const c10::OperatorHandle& op, const std::string& why);

}  // namespace testdevice
