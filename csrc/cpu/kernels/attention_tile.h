// The arithmetic of one key tile by vectors: scores, online softmax, values; attention_tile_amx.h
// has it by the tile unit.
//
// Vectors run along head_dim in scores and values, along the keys in the softmax. No row's sums
// depend on the rows beside it, so a token has the same bits in prefill, verify and decode.
//
// The online softmax keeps, for each row, the running maximum m, the sum l of exp(score - m) and
// the output o, not yet divided by l.
#pragma once

#include "cpu/kernels/dot_tile.h"
#include "cpu/kernels/head.h"
#include "cpu/params.h"

namespace dflare::cpu::DFLARE_ISA {

constexpr int kValueRows = 6;
constexpr int kValueVecs = kRegisters == 32 ? 4 : 2;
constexpr float kLowest = -3.40282347e38f;  // finite: exp(lowest - lowest) is 1, not NaN

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Rows over some of their keys, at `part_size` floats.
struct Part {
  float *o, *m, *l;  // o [rows][head_dim]
};

inline Part part_at(float* data, int64_t rows, int64_t head_dim) {
  return {data, data + rows * head_dim, data + rows * (head_dim + 1)};
}

inline void clear(const Part& part, int64_t rows, int64_t head_dim) {
  memset(part.o, 0, sizeof(float) * rows * head_dim);
  for (int64_t r = 0; r < rows; ++r) {
    part.m[r] = kLowest;
    part.l[r] = 0.0f;
  }
}

// Adds to `total` a part that follows it. Never inlined: its products must not be contracted one
// way here and another way there.
__attribute__((noinline)) inline void add_part(const Part& total, const Part& part, int64_t rows,
                                               int64_t head_dim) {
  for (int64_t r = 0; r < rows; ++r) {
    const float m = part.m[r] > total.m[r] ? part.m[r] : total.m[r];
    const Vec before = exp(broadcast(total.m[r] - m)), after = exp(broadcast(part.m[r] - m));
    float* o = total.o + r * head_dim;
    for (int64_t c = 0; c < head_dim; c += kLanes) {
      store(o + c, load(o + c) * before + load(part.o + r * head_dim + c) * after);
    }
    total.l[r] = total.l[r] * before[0] + part.l[r] * after[0];
    total.m[r] = m;
  }
}

// o[row] = o[row] * alpha[row] + sum_key probability[row][key] * v[key], for ROWS rows, VECS
// vectors. Each tile is summed by itself first: over long contexts that rounds less than one
// running sum.
template <int ROWS, int VECS>
inline void value_tile(const float* probs, const float* const* v, int64_t count, int64_t column,
                       float* o, int64_t head_dim, const float* alpha) {
  Vec sums[ROWS][VECS] = {};
  for (int64_t key = 0; key < count; ++key) {
    Vec y[VECS];
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) y[j] = load(v[key] + column + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vec x = broadcast(probs[i * kKeyTile + key]);
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) sums[i][j] += x * y[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) {
      float* x = o + i * head_dim + j * kLanes;
      store(x, load(x) * alpha[i] + sums[i][j]);
    }
  }
}

// Some query rows, and what is known of them so far.
struct QueryRows {
  int64_t count, head_dim;
  float* q;  // [count][head_dim]
  Part part;
  const int32_t *first, *last;  // key range that each row sees

  QueryRows from(int64_t row, int64_t rows) const {
    const Part rest = {part.o + row * head_dim, part.m + row, part.l + row};
    return {rows, head_dim, q + row * head_dim, rest, first + row, last + row};
  }
};

// The keys of a tile: rows of the pool or of the draft block, or zeros. There are `count`; up to
// kKeyTile follow that are zeros.
template <typename Row>
struct KeyRows {
  int64_t begin, count;
  bool masked;  // whether some row may not see some of them
  const Row *k[kKeyTile], *v[kKeyTile];
};

// What is computed with keys that are rows of `Row`.
template <typename Row>
class TileMath;

template <>
class TileMath<float> {
 public:
  static int64_t scratch_floats(int64_t rows, int64_t) { return rows * (kKeyTile + 1); }

  TileMath(float* scratch, int64_t rows, int64_t)
      : scores_(scratch), alpha_(scratch + rows * kKeyTile) {}

  // Makes the rows of an item ready, once.
  void prepare(const QueryRows& rows, float scale) {
    for (int64_t r = 0; r < rows.count; ++r) {
      float* q = rows.q + r * rows.head_dim;
      store_row(q, q, scale, rows.head_dim);
    }
  }

  // Adds a tile's keys to the item's rows.
  void attend(const QueryRows& rows, const KeyRows<float>& keys, float logit_cap) {
    for (int64_t i = 0; i < keys.count; i += 4) {
      dot_rows(rows.q, rows.head_dim, rows.count, keys.k + i, rows.head_dim, scores_ + i, kKeyTile);
    }
    if (logit_cap > 0) {
      for (int64_t i = 0; i < rows.count * kKeyTile; i += kLanes)
        store(scores_ + i, logit_cap * tanh(load(scores_ + i) / logit_cap));
    }
    softmax(rows, keys);
    add_values(rows, keys.v, keys.count);
  }

  // The same for some of them, which see keys of their own.
  void attend_alone(const QueryRows& some, const KeyRows<float>& keys, float logit_cap) {
    attend(some, keys, logit_cap);
  }

 private:
  // Turns scores into exp(score - m), hiding what a row must not see.
  void softmax(const QueryRows& rows, const KeyRows<float>& keys) {
    const int64_t padded = round_up(keys.count, kLanes);
    const Part& part = rows.part;
    for (int64_t r = 0; r < rows.count; ++r) {
      float* x = scores_ + r * kKeyTile;
      for (int64_t i = keys.count; i < padded; ++i) x[i] = -__builtin_inff();
      if (keys.masked) {
        for (int64_t i = 0; i < keys.count; ++i) {
          const int64_t key = keys.begin + i;
          if (key < rows.first[r] || key > rows.last[r]) x[i] = -__builtin_inff();
        }
      }
      Vec best = broadcast(part.m[r]);
      for (int64_t i = 0; i < padded; i += kLanes) best = max(load(x + i), best);
      const float m = max_lane(best);
      Vec l = {};
      for (int64_t i = 0; i < padded; i += kLanes) {
        const Vec y = exp(load(x + i) - m);
        store(x + i, y);
        l += y;
      }
      const float alpha = exp(broadcast(part.m[r] - m))[0];
      part.l[r] = part.l[r] * alpha + sum(l);
      part.m[r] = m;
      alpha_[r] = alpha;
    }
  }

  template <int ROWS>
  void value_rows(const QueryRows& rows, const float* const* v, int64_t count, int64_t row) {
    const int64_t head_dim = rows.head_dim;
    const float* probs = scores_ + row * kKeyTile;
    float* o = rows.part.o + row * head_dim;
    int64_t c = 0;
    for (; c + kValueVecs * kLanes <= head_dim; c += kValueVecs * kLanes) {
      value_tile<ROWS, kValueVecs>(probs, v, count, c, o + c, head_dim, alpha_ + row);
    }
    for (; c < head_dim; c += kLanes) {
      value_tile<ROWS, 1>(probs, v, count, c, o + c, head_dim, alpha_ + row);
    }
  }

  void add_values(const QueryRows& rows, const float* const* v, int64_t count) {
    int64_t row = 0;
    for (; row + kValueRows <= rows.count; row += kValueRows) {
      value_rows<kValueRows>(rows, v, count, row);
    }
    switch (rows.count - row) {
      case 5: return value_rows<5>(rows, v, count, row);
      case 4: return value_rows<4>(rows, v, count, row);
      case 3: return value_rows<3>(rows, v, count, row);
      case 2: return value_rows<2>(rows, v, count, row);
      case 1: return value_rows<1>(rows, v, count, row);
    }
  }

  float* scores_;  // [rows][kKeyTile]
  float* alpha_;   // [rows], by which this tile shrinks o
};

}  // namespace dflare::cpu::DFLARE_ISA
