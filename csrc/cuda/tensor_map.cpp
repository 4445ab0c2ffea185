// encode_tensor_map by the driver, which is asked for its function: the library links no libcuda
// and loads where there is none.
#include "tensor_map.h"

#include <cuda.h>

namespace dflare {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) &&
              alignof(TensorMap) >= alignof(CUtensorMap));

cudaError_t encode_tensor_map(TensorMap& map, const void* tensor, int outer, int rows, int columns,
                              int box_rows) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    const bool usable = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(usable ? found : nullptr);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;

  const cuuint64_t row_bytes = cuuint64_t{2} * columns;
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(outer)};
  const cuuint64_t strides[] = {row_bytes, row_bytes * rows};
  const cuuint32_t box[] = {kBoxColumns, cuuint32_t(box_rows), 1}, steps[] = {1, 1, 1};
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
             const_cast<void*>(tensor), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace dflare
