// The arithmetic of one key tile: scores, online softmax, values.
//
// Vectors run along head_dim in scores and values, along the keys in the softmax. No row's sums
// depend on the rows beside it, so a token has the same bits in prefill, verify and decode.
//
// The online softmax keeps, for each row, the running maximum m, the sum l of exp(score - m) and
// the output o, not yet divided by l.
#pragma once

#include "cpu/kernels/dot_tile.h"
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

// Where things of one item lie in the thread's scratch.
struct Workspace {
  int64_t rows;
  float* q;       // [rows][head_dim]
  float* scores;  // [rows][kKeyTile]
  float* alpha;   // [rows], by which this tile shrinks o
  Part part, total;
  int32_t *first, *last;     // key range that each row sees
  float *block_k, *block_v;  // [block][head_dim]
  float *tile_k, *tile_v;    // [kKeyTile][head_dim], bfloat16 pools only
  float* zeros;              // [head_dim], stands in for keys that no row sees
  const float *k[kKeyTile], *v[kKeyTile];
};

inline void score(const Workspace& w, int64_t head_dim, int64_t count) {
  for (int64_t i = 0; i < count; i += 4) {
    dot_rows(w.q, head_dim, w.rows, w.k + i, head_dim, w.scores + i, kKeyTile);
  }
}

inline void cap_logits(float* scores, int64_t size, float cap) {
  for (int64_t i = 0; i < size; i += kLanes) store(scores + i, cap * tanh(load(scores + i) / cap));
}

// Turns scores into exp(score - m), hiding what a row must not see if `masked`.
inline void softmax(const Workspace& w, int64_t begin, int64_t count, bool masked) {
  const int64_t padded = round_up(count, kLanes);
  for (int64_t r = 0; r < w.rows; ++r) {
    float* x = w.scores + r * kKeyTile;
    for (int64_t i = count; i < padded; ++i) x[i] = -__builtin_inff();
    if (masked) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t key = begin + i;
        if (key < w.first[r] || key > w.last[r]) x[i] = -__builtin_inff();
      }
    }
    Vec best = broadcast(w.part.m[r]);
    for (int64_t i = 0; i < padded; i += kLanes) best = max(load(x + i), best);
    const float m = max_lane(best);
    Vec l = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Vec y = exp(load(x + i) - m);
      store(x + i, y);
      l += y;
    }
    const float alpha = exp(broadcast(w.part.m[r] - m))[0];
    w.part.l[r] = w.part.l[r] * alpha + sum(l);
    w.part.m[r] = m;
    w.alpha[r] = alpha;
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

template <int ROWS>
inline void value_rows(const Workspace& w, int64_t head_dim, int64_t count, int64_t row) {
  const float* probs = w.scores + row * kKeyTile;
  float* o = w.part.o + row * head_dim;
  int64_t c = 0;
  for (; c + kValueVecs * kLanes <= head_dim; c += kValueVecs * kLanes) {
    value_tile<ROWS, kValueVecs>(probs, w.v, count, c, o + c, head_dim, w.alpha + row);
  }
  for (; c < head_dim; c += kLanes) {
    value_tile<ROWS, 1>(probs, w.v, count, c, o + c, head_dim, w.alpha + row);
  }
}

inline void add_values(const Workspace& w, int64_t head_dim, int64_t count) {
  int64_t row = 0;
  for (; row + kValueRows <= w.rows; row += kValueRows) {
    value_rows<kValueRows>(w, head_dim, count, row);
  }
  switch (w.rows - row) {
    case 5: return value_rows<5>(w, head_dim, count, row);
    case 4: return value_rows<4>(w, head_dim, count, row);
    case 3: return value_rows<3>(w, head_dim, count, row);
    case 2: return value_rows<2>(w, head_dim, count, row);
    case 1: return value_rows<1>(w, head_dim, count, row);
  }
}

}  // namespace dflare::cpu::DFLARE_ISA
