// Tiles of 16-bit elements in shared memory, swizzled so that ldmatrix and 16-byte stores hit all
// banks.
//
// A row of kColumns elements is cut into 16-byte chunks of 8. ldmatrix reads the same chunk of 8
// consecutive rows; unswizzled, with rows of 128 bytes or more, all 8 would lie in the same 4
// banks. So chunk c of row r is stored at place c ^ (r % 8): the 8 rows then use the 8 different
// 16-byte columns of the 32 banks. Rows of 64 bytes lie two to a 128-byte line: there c ^ (r / 2 %
// 4).
#pragma once

#include "ptx.cuh"

namespace dflare {

// Where element `column` of `row` is, in elements.
template <int kColumns>
__device__ __forceinline__ int tile_offset(int row, int column) {
  static_assert(kColumns == 32 || kColumns % 64 == 0, "a row is half a line or whole lines");
  const int chunk = (column / 8) ^ (kColumns == 32 ? row / 2 % 4 : row % 8);
  return row * kColumns + chunk * 8 + column % 8;
}

// The A operand (16 rows x 16 columns, row major) of mma_m16n8k16 at (row, column) of a tile.
template <int kColumns, class T>
__device__ __forceinline__ void load_fragment_a(uint32_t (&a)[4], const T* tile, int row,
                                                int column) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(a, tile + tile_offset<kColumns>(row + lane % 16, column + lane / 16 * 8));
}

// The B operands of two neighbouring products from a tile that holds B's columns as rows: b[0..1]
// multiplies rows row .. row+7 of the tile, b[2..3] rows row+8 .. row+15, both at 16 columns.
template <int kColumns, class T>
__device__ __forceinline__ void load_fragments_b(uint32_t (&b)[4], const T* tile, int row,
                                                 int column) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(
      b, tile + tile_offset<kColumns>(row + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8));
}

// The same from a tile that holds B's rows as rows: b[0..1] multiplies columns column .. column+7,
// b[2..3] columns column+8 .. column+15, both at rows row .. row+15.
template <int kColumns, class T>
__device__ __forceinline__ void load_fragments_b_transposed(uint32_t (&b)[4], const T* tile,
                                                            int row, int column) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4_transposed(
      b, tile + tile_offset<kColumns>(row + lane % 16, column + lane / 16 * 8));
}

}  // namespace dflare
