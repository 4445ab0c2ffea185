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

// The same in a tile of kRows rows that products of sm_90a read: panels of 64 columns, one behind
// the other, whose rows are lines of 128 bytes.
template <int kRows>
__device__ __forceinline__ int panel_offset(int row, int column) {
  return column / 64 * (kRows * 64) + tile_offset<64>(row, column % 64);
}

// Which piece of a 16 x 16 part of a tile a lane passes to ldmatrix, for one of the two orders in
// which mma wants the pieces. It is computed once: moving by whole rows is then an immediate, and
// by 16 columns an exclusive or (the swizzle acts on bits within a 128-byte line, which are zero in
// a tile's address and in all offsets of rows).
template <int kColumns>
struct FragmentLane {
  uint32_t offset;  // bytes

  // Lanes 0-15: the 16 rows' first 8 columns; 16-31: their other 8. For load_fragment_a and
  // load_fragments_b_transposed.
  static __device__ __forceinline__ FragmentLane down(int lane) {
    return {ptx::keep(2u * tile_offset<kColumns>(lane % 16, lane / 16 * 8))};
  }
  // Lanes 0-15: the first 8 rows' 16 columns; 16-31: those of the other 8. For load_fragments_b.
  static __device__ __forceinline__ FragmentLane across(int lane) {
    return {ptx::keep(2u * tile_offset<kColumns>(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8))};
  }

  // Of the 16 columns from 16 * k of a tile (or of rows from a multiple of 16 of one).
  __device__ __forceinline__ ptx::SharedAddress at(ptx::SharedAddress tile, int k) const {
    constexpr int kInLine = kColumns == 32 ? 2 : 4;
    return ((tile + offset) ^ static_cast<uint32_t>(k % kInLine * 32)) + k / kInLine * 128;
  }
};

// The A operand (16 rows x 16 columns, row major) of mma_m16n8k16.
__device__ __forceinline__ void load_fragment_a(uint32_t (&a)[4], ptx::SharedAddress at) {
  ptx::ldmatrix_x4(a, at);
}

// The B operands of two neighbouring products from a tile that holds B's columns as rows: b[0..1]
// multiplies the first 8 rows, b[2..3] the other 8, both at 16 columns.
__device__ __forceinline__ void load_fragments_b(uint32_t (&b)[4], ptx::SharedAddress at) {
  ptx::ldmatrix_x4(b, at);
}

// The same from a tile that holds B's rows as rows: b[0..1] multiplies the first 8 columns, b[2..3]
// the other 8, both at 16 rows.
__device__ __forceinline__ void load_fragments_b_transposed(uint32_t (&b)[4],
                                                            ptx::SharedAddress at) {
  ptx::ldmatrix_x4_transposed(b, at);
}

}  // namespace dflare
