// The CUDA API: kernels. They cannot run; a launch names the kernel and fails.
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "state.h"

using namespace testdevice;

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;  // of <<<...>>>

std::unordered_map<const void*, std::string>& kernels() {
  static auto* all = new std::unordered_map<const void*, std::string>;
  return *all;
}

cudaError_t no_stand_in(const void* function) {
  Lock lock;
  const auto found = kernels().find(function);
  const std::string name = found == kernels().end() ? "an unknown kernel" : found->second;
  return refuse(cudaErrorNotSupported, "the kernel " + name + " is launched and has no stand-in");
}

}  // namespace

// ------------------------------------------------------------ what nvcc's output calls at load

CUDA_API void** __cudaRegisterFatBinary(void*) {
  return static_cast<void**>(std::calloc(1, sizeof(void*)));
}
CUDA_API void __cudaRegisterFatBinaryEnd(void**) {}
CUDA_API void __cudaUnregisterFatBinary(void** handle) { std::free(handle); }
CUDA_API char __cudaInitModule(void**) { return 1; }
CUDA_API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
CUDA_API void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int,
                                     uint3*, uint3*, dim3*, dim3*, int*) {
  Lock lock;
  kernels()[function] = name;
}

CUDA_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                              cudaStream_t stream) {
  configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}

CUDA_API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                                void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared_bytes = last.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}

// ------------------------------------------------------------ launches

CUDA_API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

CUDA_API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t,
                                        cudaStream_t) {
  return no_stand_in(kernel);
}

CUDA_API cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t,
                                      cudaStream_t) {
  return no_stand_in(kernel);
}

CUDA_API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) {
  return no_stand_in(kernel);
}

CUDA_API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

CUDA_API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                            const void*, int,
                                                                            size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}
