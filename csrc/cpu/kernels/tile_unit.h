// Products of bfloat16 matrices by the tile unit of the processor (AMX): one instruction multiplies
// 16 outputs with 16 rows over 32 inputs, in the time in which vectors multiply two rows.
//
// A tile of weights is 16 rows of 64 bytes as they lie in memory. The other operand must hold pairs
// of inputs, one pair of all rows after the other, so the few rows of x are packed that way, once
// an operator, and the result is a tile of outputs x rows. An output is summed over the inputs in
// order, alone: what stands in the other columns of its tile does not change its bits.
#pragma once

#include "cpu/kernels/simd.h"

#if defined(__AMX_BF16__)

namespace dflare::cpu::DFLARE_ISA {

constexpr int64_t kTileRows = 16;    // of x, and outputs
constexpr int64_t kTileInputs = 32;  // 64 bytes
constexpr int64_t kTileWords = kTileRows * 16;

// Eight tiles of 16 rows of 64 bytes, for as long as this lives.
class TileUnit {
 public:
  TileUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileUnit() { _tile_release(); }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

// Words [16][16] transposed in place. Interleaving row i with row i + 8 rotates the eight bits of
// (row, column) by one, so four times exchange the two.
inline void transpose(IntVec (&rows)[kTileRows]) {
  for (int round = 0; round < 4; ++round) {
    IntVec next[kTileRows];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = __builtin_shufflevector(rows[i], rows[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20,
                                            5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + 8], 8, 24, 9, 25, 10, 26, 11, 27,
                                                12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) rows[i] = next[i];
  }
}

inline int64_t tile_steps(int64_t inputs) { return (inputs + kTileInputs - 1) / kTileInputs; }

// Rows of x as tiles [groups of 16 rows][steps of 32 inputs][pairs][rows]; missing rows are zeros.
inline void pack_rows(const LinearParams<BFloat16>& p, uint32_t* packed) {
  const int64_t steps = tile_steps(p.inputs);
  for (int64_t row = 0; row < p.rows; row += kTileRows) {
    for (int64_t step = 0; step < steps; ++step, packed += kTileWords) {
      IntVec words[kTileRows] = {};
      const BFloat16* x = p.x + row * p.x_stride + step * kTileInputs;
      const int64_t rows = min(p.rows - row, kTileRows);
      for (int64_t r = 0; r < rows; ++r)
        words[r] = *reinterpret_cast<const IntVecMem*>(x + r * p.x_stride);
      transpose(words);
      for (int64_t pair = 0; pair < kTileRows; ++pair)
        *reinterpret_cast<IntVecMem*>(packed + pair * kTileRows) = words[pair];
    }
  }
}

// Some weights as a tile: in their place, or, where the tile is larger than the matrix, a copy.
struct WeightTile {
  const void* data;
  int64_t stride;  // bytes

  WeightTile(const BFloat16* weight, int64_t inputs, int64_t outputs, int64_t step,
             BFloat16* copy) {
    const BFloat16* first = weight + step * kTileInputs;
    const int64_t depth = min(inputs - step * kTileInputs, kTileInputs);
    data = first, stride = inputs * sizeof(BFloat16);
    if (outputs >= kTileRows && depth == kTileInputs) return;
    memset(copy, 0, sizeof(BFloat16) * kTileRows * kTileInputs);
    for (int64_t o = 0; o < min(outputs, kTileRows); ++o)
      memcpy(copy + o * kTileInputs, first + o * inputs, sizeof(BFloat16) * depth);
    data = copy, stride = kTileInputs * sizeof(BFloat16);
  }
};

// sums[r][o] of GROUPS groups of packed rows, of which `rows` count, and 32 outputs, of which
// `outputs` exist. Tiles 0 to 5 hold the sums: of a group the first 16 outputs, then the others.
template <int GROUPS>
inline void multiply_groups(const BFloat16* weight, int64_t inputs, int64_t outputs,
                            const uint32_t* packed, bool prefetch, float* sums, int64_t stride,
                            int64_t rows) {
  const int64_t steps = tile_steps(inputs);
  alignas(64) BFloat16 copy[2][kTileRows * kTileInputs];
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (GROUPS > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  if constexpr (GROUPS > 2) {
    _tile_zero(4);
    _tile_zero(5);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const WeightTile low(weight, inputs, outputs, step, copy[0]);
    const WeightTile high(weight + kTileRows * inputs, inputs, outputs - kTileRows, step, copy[1]);
    const auto rows_of = [&](int64_t group) {
      return packed + (group * steps + step) * kTileWords;
    };
    // A tile that is loaded anew does not wait for those who read the old one.
    _tile_loadd(6, low.data, low.stride);
    _tile_loadd(7, rows_of(0), 64);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (GROUPS > 1) {
      _tile_loadd(7, rows_of(1), 64);
      _tile_dpbf16ps(2, 6, 7);
    }
    if constexpr (GROUPS > 2) {
      _tile_loadd(7, rows_of(2), 64);
      _tile_dpbf16ps(4, 6, 7);
    }
    _tile_loadd(6, high.data, high.stride);
    if constexpr (GROUPS > 2) _tile_dpbf16ps(5, 6, 7);
    if constexpr (GROUPS > 1) {
      if constexpr (GROUPS > 2) _tile_loadd(7, rows_of(1), 64);
      _tile_dpbf16ps(3, 6, 7);
      _tile_loadd(7, rows_of(0), 64);
    }
    _tile_dpbf16ps(1, 6, 7);
    if (prefetch) {
      const BFloat16* next = weight + 2 * kTileRows * inputs + step * kTileInputs;
#pragma GCC unroll 4
      for (int64_t o = 0; o < 2 * kTileRows; ++o) __builtin_prefetch(next + o * inputs, 0, 2);
    }
  }
  const auto finish = [&](int64_t group, int64_t half, IntVec(&words)[kTileRows]) {
    transpose(words);
    const int64_t first = group * kTileRows;
    for (int64_t r = first; r < min(rows, first + kTileRows); ++r)
      store(sums + r * stride + half * kTileRows, reinterpret_cast<Vec>(words[r - first]));
  };
  alignas(64) IntVec words[kTileRows];
  _tile_stored(0, words, 64);
  finish(0, 0, words);
  _tile_stored(1, words, 64);
  finish(0, 1, words);
  if constexpr (GROUPS > 1) {
    _tile_stored(2, words, 64);
    finish(1, 0, words);
    _tile_stored(3, words, 64);
    finish(1, 1, words);
  }
  if constexpr (GROUPS > 2) {
    _tile_stored(4, words, 64);
    finish(2, 0, words);
    _tile_stored(5, words, 64);
    finish(2, 1, words);
  }
}

}  // namespace dflare::cpu::DFLARE_ISA

#endif
