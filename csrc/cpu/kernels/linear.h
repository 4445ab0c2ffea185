// A linear layer of few rows, as decoding and verification have them: weights come from memory
// once, and every row meets them in the first-level cache.
#pragma once

#include "cpu/kernels/dot_tile.h"
#include "cpu/kernels/tile_unit.h"
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

// sums[r][o] of the rows and outputs of one task.
template <typename T>
struct TaskProduct {
  static int64_t packed_words(int64_t, int64_t) { return 0; }
  static void pack(const LinearParams<T>&, uint32_t*) {}

  void operator()(const LinearParams<T>& p, int64_t row, int64_t rows, int64_t output,
                  int64_t outputs, float* sums) const {
    const T* x = p.x + row * p.x_stride;
    for (int64_t o = 0; o < outputs; o += 4) {
      const T* four[4];
      for (int64_t j = 0; j < 4; ++j)
        four[j] = p.weight + (output + min(o + j, outputs - 1)) * p.inputs;
      // The next four rows of weights: rows are too short for the processor to see them coming.
      dot_rows<true>(x, p.x_stride, rows, four, p.inputs, sums + o, kLinearOutputs, 4 * p.inputs);
    }
  }
};

#if defined(__AMX_BF16__)
template <>
struct TaskProduct<BFloat16> {
  TileUnit unit;

  static int64_t packed_words(int64_t rows, int64_t inputs) {
    return (rows + kTileRows - 1) / kTileRows * tile_steps(inputs) * kTileWords;
  }
  static void pack(const LinearParams<BFloat16>& p, uint32_t* packed) { pack_rows(p, packed); }

  void operator()(const LinearParams<BFloat16>& p, int64_t row, int64_t rows, int64_t output,
                  int64_t outputs, float* sums) const {
    static_assert(kLinearOutputs == 2 * kTileRows && kLinearRows % kTileRows == 0);
    const BFloat16* weight = p.weight + output * p.inputs;
    const int64_t group_words = tile_steps(p.inputs) * kTileWords;
    for (int64_t r = 0; r < rows;) {
      const int64_t left = (rows - r + kTileRows - 1) / kTileRows;
      // Three groups are the most; four are better as two and two.
      const int64_t groups = left == 4 ? 2 : min(left, 3);
      const auto run = groups == 1   ? multiply_groups<1>
                       : groups == 2 ? multiply_groups<2>
                                     : multiply_groups<3>;
      run(weight, p.inputs, outputs, p.packed + (row + r) / kTileRows * group_words, r == 0,
          sums + r * kLinearOutputs, kLinearOutputs, rows - r);
      r += groups * kTileRows;
    }
  }
};
#endif

// Tasks are numbered block of outputs, chunk of rows: neighbours share weights. An output is summed
// in one order, whatever the number of rows: a row gives the same bits alone and beside others.
// finish(row, output, sums, outputs) takes the sums of a row.
template <typename T, typename Finish>
inline void multiply(const LinearParams<T>& p, int64_t begin, int64_t end, Finish finish) {
  const int64_t chunks = (p.rows + kLinearRows - 1) / kLinearRows;
  float* tile = thread_scratch(kLinearRows * kLinearOutputs);
  const TaskProduct<T> product;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t output = task / chunks * kLinearOutputs;
    const int64_t row = task % chunks * kLinearRows;
    const int64_t outputs = min(p.outputs - output, kLinearOutputs);
    const int64_t rows = min(p.rows - row, kLinearRows);
    product(p, row, rows, output, outputs, tile);
    for (int64_t r = 0; r < rows; ++r) {
      finish(row + r, output, tile + r * kLinearOutputs, outputs);
    }
  }
}

template <typename T>
int64_t packed_words(int64_t rows, int64_t inputs) {
  return TaskProduct<T>::packed_words(rows, inputs);
}

template <typename T>
void pack(const LinearParams<T>& p, uint32_t* packed) {
  TaskProduct<T>::pack(p, packed);
}

template <typename T>
void linear(const LinearParams<T>& p, int64_t begin, int64_t end) {
  multiply(p, begin, end, [&](int64_t row, int64_t output, const float* sums, int64_t outputs) {
    store_outputs(p.out + row * p.outputs + output, sums, p.bias ? p.bias + output : nullptr,
                  outputs);
  });
}

inline float widened(float x) { return x; }
inline float widened(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float wide;
  memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// Logits are compared as they would be stored. NaN is never the best.
template <typename T>
void head_argmax(const HeadParams<T>& p, int64_t begin, int64_t end) {
  const int64_t blocks = (p.outputs + kLinearOutputs - 1) / kLinearOutputs;
  multiply(p, begin, end, [&](int64_t row, int64_t output, const float* sums, int64_t outputs) {
    T logits[kLinearOutputs];
    store_outputs<T>(logits, sums, nullptr, outputs);
    int64_t best = 0;
    float highest = -__builtin_inff();
    for (int64_t i = 0; i < outputs; ++i) {
      if (const float logit = widened(logits[i]); logit > highest) highest = logit, best = i;
    }
    p.best[row * blocks + output / kLinearOutputs] =
        argmax_key(highest, p.head_tokens[output + best]);
  });
}

}  // namespace dflare::cpu::DFLARE_ISA
