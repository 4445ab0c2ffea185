// What the copy engine of sm_90 is told about a tensor in global memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dflare {

// CUtensorMap, which is opaque, of this size and alignment. A kernel takes it as part of its
// parameters (__grid_constant__) and hands the copy engine its address there.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// Columns of a box: 128 bytes, the span of the swizzle.
constexpr int kBoxColumns = 64;

// Describes a contiguous tensor [outer, rows, columns] of 16-bit elements that is copied in boxes
// of [1, box_rows, kBoxColumns]. In shared memory a box's rows of 128 bytes follow each other,
// 16-byte piece c of row r at place c ^ (r % 8), as in tile.cuh; what lies beyond the tensor is
// zero. `columns` is a multiple of 8, `box_rows` at most 256.
cudaError_t encode_tensor_map(TensorMap& map, const void* tensor, int outer, int rows, int columns,
                              int box_rows);

}  // namespace dflare
