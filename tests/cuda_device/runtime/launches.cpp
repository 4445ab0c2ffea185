// The CUDA API: kernels. Those that were registered with a stand-in run; a launch of another one
// names it and fails.
#include <cstdlib>
#include <cstring>
#include <optional>
#include <unordered_map>

#include "limits.h"
#include "state.h"

using namespace testdevice;

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;  // of <<<...>>>

struct Function {
  std::string name = "an unknown kernel";
  std::optional<Kernel> kernel;
  size_t shared_bytes_allowed = kSharedBytes;
};

std::unordered_map<const void*, Function>& functions() {
  static auto* all = new std::unordered_map<const void*, Function>;
  return *all;
}

// Why a GPU would refuse the launch, or an empty string.
std::string find_fault(const cudaLaunchConfig_t& c, const Function& function) {
  const auto is_none = [](const dim3& d) { return d.x == 0 || d.y == 0 || d.z == 0; };
  if (is_none(c.gridDim) || is_none(c.blockDim)) return "an empty grid or block";
  if (c.gridDim.x > 2147483647u || c.gridDim.y > 65535 || c.gridDim.z > 65535) {
    return "a grid beyond (2^31 - 1, 65535, 65535)";
  }
  if (size_t{c.blockDim.x} * c.blockDim.y * c.blockDim.z > kThreadsBlock) {
    return "more than " + std::to_string(kThreadsBlock) + " threads a block";
  }
  if (c.dynamicSmemBytes > function.shared_bytes_allowed) {
    return std::to_string(c.dynamicSmemBytes) + " bytes of dynamic shared memory, allowed are " +
           std::to_string(function.shared_bytes_allowed) +
           ": see cudaFuncAttributeMaxDynamicSharedMemorySize";
  }
  return {};
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* address, void** arguments) {
  Lock lock;
  const Function& function = functions()[address];
  if (const std::string fault = find_fault(config, function); !fault.empty()) {
    return refuse(cudaErrorInvalidValue, "launch of " + function.name + " with " + fault);
  }
  if (!function.kernel) {
    return refuse(cudaErrorNotSupported,
                  "the kernel " + function.name + " is launched and has no stand-in");
  }
  Launch launch{.grid = config.gridDim,
                .block = config.blockDim,
                .shared_bytes = config.dynamicSmemBytes,
                .overlap_prior = false,
                .shared_carveout = -1,
                .cluster = dim3(1)};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    switch (attribute.id) {
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        launch.overlap_prior = attribute.val.programmaticStreamSerializationAllowed != 0;
        break;
      case cudaLaunchAttributePreferredSharedMemoryCarveout:
        launch.shared_carveout = static_cast<int>(attribute.val.sharedMemCarveout);
        break;
      case cudaLaunchAttributeClusterDimension: {
        const auto& c = attribute.val.clusterDim;
        const dim3& g = config.gridDim;
        if (c.x * c.y * c.z > 8 || g.x % c.x != 0 || g.y % c.y != 0 || g.z % c.z != 0) {
          return refuse(cudaErrorInvalidClusterSize, "launch of " + function.name +
                                                         " with clusters of more than 8 blocks, or "
                                                         "a grid that is no whole number of them");
        }
        launch.cluster = dim3(c.x, c.y, c.z);
        break;
      }
      default:
        return refuse(cudaErrorNotSupported, "launch of " + function.name + " with attribute " +
                                                 std::to_string(attribute.id));
    }
  }
  const char* where = site();
  try {
    return enqueue(config.stream, {.name = function.name,
                                   .run = function.kernel->bind(launch, arguments),
                                   .accesses = {},
                                   .finish = function.kernel->finish,
                                   .overlaps_prior = launch.overlap_prior});
  } catch (const std::exception& error) {  // it ran at once
    state().failure =
        function.name + " failed on the test device, launched at " + where + ": " + error.what();
    return sticky();
  }
}

}  // namespace

namespace testdevice {

void register_kernel(const void* function, Kernel kernel) {
  Lock lock;
  Function& known = functions()[function];
  if (known.kernel) return;
  known.name = kernel.name;
  known.kernel = std::move(kernel);
}

}  // namespace testdevice

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
  functions()[function].name = name;
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

CUDA_API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                         void** arguments) {
  return launch(*config, kernel, arguments);
}

CUDA_API cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                      size_t shared_bytes, cudaStream_t stream) {
  return launch({.gridDim = grid,
                 .blockDim = block,
                 .dynamicSmemBytes = shared_bytes,
                 .stream = stream,
                 .attrs = nullptr,
                 .numAttrs = 0},
                kernel, arguments);
}

CUDA_API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block,
                                        void** arguments, size_t shared_bytes,
                                        cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}

CUDA_API cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute,
                                          int value) {
  Lock lock;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > kSharedBytesOptIn) {
    return refuse(cudaErrorInvalidValue, std::to_string(value) +
                                             " bytes of dynamic shared memory asked for, the "
                                             "device has " +
                                             std::to_string(kSharedBytesOptIn));
  }
  functions()[kernel].shared_bytes_allowed = static_cast<size_t>(value);
  return cudaSuccess;
}

CUDA_API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = kThreadsBlock;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                            const void*, int,
                                                                            size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}
