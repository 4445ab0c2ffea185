// The device's state, its lock and its errors.
#include "state.h"

#include <cstdio>
#include <cstdlib>

namespace testdevice {

namespace {
thread_local cudaError_t last_error = cudaSuccess;
}

State::State() {
  if (const char* seed = std::getenv("DFLARE_TEST_DEVICE_LAZY")) {
    lazy = true;
    random.seed(std::strtoull(seed, nullptr, 10));
  }
}

State& state() {
  static State* state = new State;
  return *state;
}

Lock::Lock() {
  State& s = state();
  if (s.mutex.try_lock()) return;
  void* interpreter = s.hooks.release_interpreter ? s.hooks.release_interpreter() : nullptr;
  s.mutex.lock();
  if (interpreter) s.hooks.restore_interpreter(interpreter);
}

const char* site() {
  const char* found = state().hooks.site ? state().hooks.site() : nullptr;
  return found ? found : "an unknown place";
}

cudaError_t fail(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t refuse(cudaError_t error, const std::string& what) {
  std::fprintf(stderr, "test device: %s, at %s\n", what.c_str(), site());
  return fail(error);
}

cudaError_t missing(const char* what) {
  return refuse(cudaErrorNotSupported, std::string(what) + " is not there");
}

cudaError_t sticky() {
  return state().failure.empty() ? cudaSuccess : fail(cudaErrorLaunchFailure);
}

CUstream_st& stream_of(cudaStream_t handle) {
  const bool is_default =
      handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
  return is_default ? state().default_stream : *handle;
}

std::shared_ptr<CUevent_st> event_of(cudaEvent_t handle) { return state().events.at(handle); }

void set_hooks(const Hooks& hooks) {
  Lock lock;
  state().hooks = hooks;
}

Stats stats() {
  Lock lock;
  return state().stats;
}

}  // namespace testdevice

// ------------------------------------------------------------ the CUDA API

using namespace testdevice;

namespace {

struct Message {
  cudaError_t error;
  const char *name, *text;
};

const Message kMessages[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorIllegalState, "cudaErrorIllegalState",
     "an operation is not permitted in the object's current state"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorNotSupported, "cudaErrorNotSupported",
     "the test device does not have this part of CUDA; stderr names it"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched",
     "the capture was not initiated in this stream"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined",
     "capturing stream has unjoined work"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
};

}  // namespace

CUDA_API const char* cudaGetErrorName(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return "cudaErrorLaunchFailure";
  for (const Message& message : kMessages) {
    if (message.error == error) return message.name;
  }
  return "an error without a name on the test device";
}

CUDA_API const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return state().failure.c_str();
  for (const Message& message : kMessages) {
    if (message.error == error) return message.text;
  }
  return "an error without a text on the test device";
}

CUDA_API cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

CUDA_API cudaError_t cudaPeekAtLastError() { return last_error; }
