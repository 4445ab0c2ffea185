// A linear layer of few rows, as decoding and verification have them: weights come from memory
// once, and every row meets them in the first-level cache.
#pragma once

#include "cpu/kernels/dot_tile.h"
#include "cpu/scratch.h"

namespace dflare::cpu::DFLARE_ISA {


template <typename T>
inline void store_outputs(T* out, const float* sums, const T* bias, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    store(out + c, bias ? load(sums + c) + load(bias + c) : load(sums + c));
  }
  if (const int rest = static_cast<int>(count - c)) {
    const Vec x = load(sums + c);
    store_partial(out + c, bias ? x + load_partial(bias + c, rest) : x, rest);
  }
}

// Tasks are numbered block of outputs, chunk of rows: neighbours share weights. An output is summed
// in one order, whatever the number of rows: a row gives the same bits alone and beside others.
template <typename T>
void linear(const LinearParams<T>& p, int64_t begin, int64_t end) {
  const int64_t chunks = (p.rows + kLinearRows - 1) / kLinearRows;
  float* tile = thread_scratch(kLinearRows * kLinearOutputs);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t output = task / chunks * kLinearOutputs;
    const int64_t row = task % chunks * kLinearRows;
    const int64_t outputs = min(p.outputs - output, kLinearOutputs);
    const int64_t rows = min(p.rows - row, kLinearRows);
    const T* x = p.x + row * p.x_stride;
    for (int64_t o = 0; o < outputs; o += 4) {
      const T* four[4];
      for (int64_t j = 0; j < 4; ++j)
        four[j] = p.weight + (output + min(o + j, outputs - 1)) * p.inputs;
      // The next four rows of weights: rows are too short for the processor to see them coming.
      dot_rows<true>(x, p.x_stride, rows, four, p.inputs, tile + o, kLinearOutputs, 4 * p.inputs);
    }
    for (int64_t r = 0; r < rows; ++r) {
      store_outputs(p.out + (row + r) * p.outputs + output, tile + r * kLinearOutputs,
                    p.bias ? p.bias + output : nullptr, outputs);
    }
  }
}

}  // namespace dflare::cpu::DFLARE_ISA
