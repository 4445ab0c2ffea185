// The arithmetic of one key tile: scores, online softmax, values.
//
// Scores have two layouts. Wide, for many rows: vectors run along the rows, scores are [key][row]
// and the softmax needs no horizontal sums. Narrow, for the few rows of a decode step: vectors run
// along head_dim, scores are [row][key].
//
// The online softmax keeps, for each row, the running maximum m, the sum l of exp(score - m) and
// the output o, not yet divided by l.
#pragma once

#include "cpu/kernels/dot_tile.h"
#include "cpu/params.h"

namespace dflare::cpu::DFLARE_ISA {

// Above this many rows, half a vector, the wide layout costs less (64 products a key and vector of
// rows against head_dim / lanes products and 4 shuffles a key and row).
constexpr int64_t kNarrowRows = kLanes / 2;
constexpr int kScoreKeys = kRegisters == 32 ? 8 : 4;
constexpr int64_t kScoreChannels = 32;  // summed in one go: short sums round less
constexpr int kValueRows = 6;
constexpr int kValueVecs = kRegisters == 32 ? 4 : 2;
constexpr float kLowest = -3.40282347e38f;  // finite: exp(lowest - lowest) is 1, not NaN

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Where things of one item lie in the thread's scratch.
struct Workspace {
  bool wide;
  int64_t rows, padded_rows;
  float* q;                  // wide [head_dim][padded_rows], narrow [rows][head_dim]
  float* q_rows;             // [rows][head_dim]; wide, and no tree: until o is begun
  float* scores;             // wide [kKeyTile][padded_rows], narrow [rows][kKeyTile]
  float *o, *m, *l, *alpha;  // o [rows][head_dim]; alpha: factor by which this tile shrinks o
  int32_t *first, *last;     // key range that each row sees
  float *block_k, *block_v;  // [block][head_dim]
  float *tile_k, *tile_v;    // [kKeyTile][head_dim], bfloat16 pools only
  float* zeros;              // [head_dim], stands in for keys past the end
  const float *k[kKeyTile], *v[kKeyTile];
};

// Adds channels [begin, end) to scores[key][row], for kScoreKeys keys and VECS vectors of rows.
template <int VECS>
inline void score_channels(const float* q, int64_t padded_rows, const float* const* k,
                           int64_t begin, int64_t end, float* scores) {
  Vec sums[kScoreKeys][VECS] = {};
  for (int64_t c = begin; c < end; ++c) {
    Vec x[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) x[v] = load(q + c * padded_rows + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kScoreKeys; ++i) {
      const Vec y = broadcast(k[i][c]);
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) sums[i][v] += x[v] * y;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kScoreKeys; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      float* x = scores + i * padded_rows + v * kLanes;
      store(x, begin == 0 ? sums[i][v] : load(x) + sums[i][v]);
    }
  }
}

template <int VECS>
inline void score_tile(const float* q, int64_t padded_rows, const float* const* k, int64_t head_dim,
                       float* scores) {
  for (int64_t c = 0; c < head_dim; c += kScoreChannels) {
    score_channels<VECS>(q, padded_rows, k, c, min(c + kScoreChannels, head_dim), scores);
  }
}

inline void score_wide(const Workspace& w, int64_t head_dim, int64_t count) {
  for (int64_t i = 0; i < count; i += kScoreKeys) {
    float* scores = w.scores + i * w.padded_rows;
    for (int64_t r = 0; r < w.padded_rows;) {
      const int64_t vecs = (w.padded_rows - r) / kLanes;
      if (vecs == 1) {
        score_tile<1>(w.q + r, w.padded_rows, w.k + i, head_dim, scores + r);
        r += kLanes;
      } else if (vecs == 2 || vecs == 4) {
        score_tile<2>(w.q + r, w.padded_rows, w.k + i, head_dim, scores + r);
        r += 2 * kLanes;
      } else {
        score_tile<3>(w.q + r, w.padded_rows, w.k + i, head_dim, scores + r);
        r += 3 * kLanes;
      }
    }
  }
}

inline void score_narrow(const Workspace& w, int64_t head_dim, int64_t count) {
  for (int64_t i = 0; i < count; i += 4) {
    dot_rows(w.q, head_dim, w.rows, w.k + i, head_dim, w.scores + i, kKeyTile);
  }
}

inline void cap_logits(float* scores, int64_t size, float cap) {
  for (int64_t i = 0; i < size; i += kLanes) store(scores + i, cap * tanh(load(scores + i) / cap));
}

// Turns scores [key][row] into exp(score - m), hiding what a row must not see if `masked`.
inline void softmax_wide(const Workspace& w, int64_t begin, int64_t count, bool masked) {
  for (int64_t r = 0; r < w.padded_rows; r += kLanes) {
    float* column = w.scores + r;
    if (masked) {
      const IntVec first = *reinterpret_cast<const IntVecMem*>(w.first + r);
      const IntVec last = *reinterpret_cast<const IntVecMem*>(w.last + r);
      for (int64_t i = 0; i < count; ++i) {
        const IntVec key = IntVec{} + static_cast<int32_t>(begin + i);
        const Vec score = load(column + i * w.padded_rows);
        store(column + i * w.padded_rows,
              (key < first) | (key > last) ? broadcast(-__builtin_inff()) : score);
      }
    }
    const Vec m_before = load(w.m + r);
    Vec m = m_before;
    for (int64_t i = 0; i < count; ++i) m = max(load(column + i * w.padded_rows), m);
    const Vec alpha = exp(m_before - m);
    Vec l = {};
    for (int64_t i = 0; i < count; ++i) {
      const Vec x = exp(load(column + i * w.padded_rows) - m);
      store(column + i * w.padded_rows, x);
      l += x;
    }
    store(w.m + r, m);
    store(w.l + r, load(w.l + r) * alpha + l);
    store(w.alpha + r, alpha);
  }
}

// The same for scores [row][key].
inline void softmax_narrow(const Workspace& w, int64_t begin, int64_t count, bool masked) {
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
    Vec best = broadcast(w.m[r]);
    for (int64_t i = 0; i < padded; i += kLanes) best = max(load(x + i), best);
    const float m = max_lane(best);
    Vec l = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Vec y = exp(load(x + i) - m);
      store(x + i, y);
      l += y;
    }
    const float alpha = exp(broadcast(w.m[r] - m))[0];
    w.l[r] = w.l[r] * alpha + sum(l);
    w.m[r] = m;
    w.alpha[r] = alpha;
  }
}

// o[row] = o[row] * alpha[row] + sum_key probability[row][key] * v[key], for ROWS rows, VECS
// vectors. Each tile is summed by itself first: over long contexts that rounds less than one
// running sum.
template <int ROWS, int VECS>
inline void value_tile(const float* probs, int64_t row_step, int64_t key_step,
                       const float* const* v, int64_t count, int64_t column, float* o,
                       int64_t head_dim, const float* alpha) {
  Vec sums[ROWS][VECS] = {};
  for (int64_t key = 0; key < count; ++key) {
    Vec y[VECS];
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) y[j] = load(v[key] + column + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vec x = broadcast(probs[i * row_step + key * key_step]);
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
  const int64_t row_step = w.wide ? 1 : kKeyTile, key_step = w.wide ? w.padded_rows : 1;
  const float* probs = w.scores + row * row_step;
  float* o = w.o + row * head_dim;
  int64_t c = 0;
  for (; c + kValueVecs * kLanes <= head_dim; c += kValueVecs * kLanes) {
    value_tile<ROWS, kValueVecs>(probs, row_step, key_step, w.v, count, c, o + c, head_dim,
                                 w.alpha + row);
  }
  for (; c < head_dim; c += kLanes) {
    value_tile<ROWS, 1>(probs, row_step, key_step, w.v, count, c, o + c, head_dim, w.alpha + row);
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
