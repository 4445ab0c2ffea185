// One attention item: the query rows (tokens x heads) that share a KV head, over a range of keys.
//
// Keys come in tiles of kKeyTile pointers gathered through the request's slots, so K and V are read
// in place and once for all rows; bfloat16 rows are widened into scratch first.
//
// Scores have two layouts. Wide, for many rows: vectors run along the rows, scores are [key][row]
// and the softmax needs no horizontal sums. Narrow, for the few rows of a decode step: vectors run
// along head_dim, scores are [row][key].
//
// The online softmax keeps, for each row, the running maximum m, the sum l of exp(score - m) and
// the output o, not yet divided by l. A piece of an item leaves these three for merge().
//
// The nodes of a draft tree share the tiles of their context. From the tile on in which the first
// node lies, each takes its own keys: the rest of the context, then its ancestors in the order of
// their depths. So a node's keys lie in the tiles in which plain decoding would have them.
#pragma once

#include "cpu/kernels/dot_tile.h"
#include "cpu/kernels/head.h"
#include "cpu/scratch.h"

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

template <typename T>
inline Workspace make_workspace(const AttentionParams<T>& p, const AttentionItem& item) {
  Workspace w;
  w.rows = item.num_tokens * p.group;
  w.wide = w.rows > kNarrowRows;
  w.padded_rows = round_up(w.rows, kLanes);
  const int64_t block = p.block_k ? p.requests[item.request].num_queries * p.head_dim : 0;
  const int64_t tile = sizeof(T) == sizeof(float) ? 0 : kKeyTile * p.head_dim;
  const int64_t o_size = w.padded_rows * p.head_dim;
  const int64_t q_rows = w.wide && p.requests[item.request].depths ? o_size : 0;
  float* next = thread_scratch(2 * o_size + q_rows + w.padded_rows * (kKeyTile + 5) +
                               2 * (block + tile) + p.head_dim);
  auto take = [&](int64_t size) {
    float* taken = next;
    next += size;
    return taken;
  };
  w.q = take(o_size);
  w.scores = take(w.padded_rows * kKeyTile);
  w.o = take(o_size);
  w.q_rows = q_rows ? take(q_rows) : w.wide ? w.o : w.q;
  w.m = take(w.padded_rows);
  w.l = take(w.padded_rows);
  w.alpha = take(w.padded_rows);
  w.first = reinterpret_cast<int32_t*>(take(w.padded_rows));
  w.last = reinterpret_cast<int32_t*>(take(w.padded_rows));
  w.block_k = take(block);
  w.block_v = take(block);
  w.tile_k = take(tile);
  w.tile_v = take(tile);
  w.zeros = take(p.head_dim);
  memset(w.zeros, 0, sizeof(float) * p.head_dim);
  return w;
}

inline int32_t clamp_index(int64_t index) {
  return static_cast<int32_t>(index < INT32_MIN   ? INT32_MIN
                              : index > INT32_MAX ? INT32_MAX
                                                  : index);
}

// Row t * group + g is head kv_head * group + g of token t.
template <typename T>
void load_queries(const AttentionParams<T>& p, const AttentionItem& item, Workspace& w) {
  const Request& request = p.requests[item.request];
  float* rows = w.q_rows;
  for (int64_t t = 0; t < item.num_tokens; ++t) {
    const int64_t row = request.first_row + item.first_token + t;
    const int64_t index = request.index_of(item.first_token + t);
    const T* heads = p.q + row * p.q_stride + item.kv_head * p.group * p.head_dim;
    for (int64_t g = 0; g < p.group; ++g) {
      const int64_t r = t * p.group + g;
      float* x = rows + r * p.head_dim;
      load_row(x, heads + g * p.head_dim, p.head_dim);
      if (p.q_norm_weight) {
        head_norm(x, p.q_norm_weight, p.eps, p.head_dim);
        head_rope(x, p.rope, row);
      }
      store_row(x, x, p.scale, p.head_dim);
      w.first[r] = p.window < 0 ? INT32_MIN : clamp_index(index - p.window);
      w.last[r] = p.causal ? clamp_index(index) : INT32_MAX;
      w.m[r] = kLowest;
      w.l[r] = 0.0f;
    }
  }
  for (int64_t r = w.rows; r < w.padded_rows; ++r) {
    w.first[r] = INT32_MIN;
    w.last[r] = INT32_MAX;
    w.m[r] = kLowest;
    w.l[r] = 0.0f;
  }
  if (w.wide) {
    for (int64_t c = 0; c < p.head_dim; ++c) {
      float* column = w.q + c * w.padded_rows;
      for (int64_t r = 0; r < w.rows; ++r) column[r] = rows[r * p.head_dim + c];
      for (int64_t r = w.rows; r < w.padded_rows; ++r) column[r] = 0.0f;
    }
  }
  memset(w.o, 0, sizeof(float) * w.rows * p.head_dim);
}

// The block's own keys and values of one KV head.
template <typename T>
void load_block(const AttentionParams<T>& p, const AttentionItem& item, Workspace& w) {
  const Request& request = p.requests[item.request];
  for (int64_t t = 0; t < request.num_queries; ++t) {
    const int64_t row = request.first_row + t;
    const int64_t offset = row * p.q_stride + item.kv_head * p.head_dim;
    float* k = w.block_k + t * p.head_dim;
    load_row(k, p.block_k + offset, p.head_dim);
    head_norm(k, p.k_norm_weight, p.eps, p.head_dim);
    head_rope(k, p.rope, row);
    load_row(w.block_v + t * p.head_dim, p.block_v + offset, p.head_dim);
  }
}

inline const float* as_float(const float* row, float*, int64_t) { return row; }
inline const float* as_float(const BFloat16* row, float* out, int64_t size) {
  load_row(out, row, size);
  return out;
}

// Points k[i], v[i] at key `begin + i`, i < count; the rest of the tile at zeros. `path` is that of
// a tree's node, or null.
template <typename T>
void gather(const AttentionParams<T>& p, const AttentionItem& item, Workspace& w, int64_t begin,
            int64_t count, const int32_t* path) {
  const Request& request = p.requests[item.request];
  const int64_t offset = item.kv_head * p.head_dim;
  for (int64_t i = 0; i < count; ++i) {
    int64_t index = begin + i;
    if (path && index >= request.first_index) {
      index = request.first_index + path[index - request.first_index];
    }
    if (index >= request.pooled) {
      w.k[i] = w.block_k + (index - request.pooled) * p.head_dim;
      w.v[i] = w.block_v + (index - request.pooled) * p.head_dim;
      continue;
    }
    const int64_t slot = request.slots[index];
    if (static_cast<uint64_t>(slot) >= static_cast<uint64_t>(p.num_slots)) {
      if (!__atomic_exchange_n(&p.bad_slot->found, 1, __ATOMIC_RELAXED)) {
        p.bad_slot->request = item.request;
        p.bad_slot->index = index;
      }
      w.k[i] = w.v[i] = w.zeros;
      continue;
    }
    const int64_t at = i * p.head_dim;
    w.k[i] = as_float(p.k_pool + slot * p.k_slot_stride + offset, w.tile_k + at, p.head_dim);
    w.v[i] = as_float(p.v_pool + slot * p.v_slot_stride + offset, w.tile_v + at, p.head_dim);
  }
  for (int64_t i = count; i < round_up(count, kScoreKeys); ++i) w.k[i] = w.zeros;
}

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

template <typename T>
void write_row(const AttentionParams<T>& p, const AttentionItem& item, int64_t r, const float* o,
               float l) {
  const int64_t row = p.requests[item.request].first_row + item.first_token + r / p.group;
  const int64_t head = item.kv_head * p.group + r % p.group;
  T* out = p.out + (row * p.kv_heads * p.group + head) * p.head_dim;
  store_row(out, o, 1.0f / l, p.head_dim);
}

// One key tile, of which each node of a tree sees its own keys.
template <typename T>
void attend_tree_tile(const AttentionParams<T>& p, const AttentionItem& item, Workspace& w,
                      int64_t key) {
  const Request& request = p.requests[item.request];
  for (int64_t t = 0; t < item.num_tokens; ++t) {
    const int64_t node = item.first_token + t, row = t * p.group;
    const int64_t count = min(kKeyTile, request.index_of(node) + 1 - key);
    if (count <= 0) continue;
    Workspace own = w;
    own.wide = false;
    own.rows = p.group;
    own.q = w.q_rows + row * p.head_dim;
    own.o = w.o + row * p.head_dim;
    own.m = w.m + row;
    own.l = w.l + row;
    own.alpha = w.alpha + row;
    own.first = w.first + row;
    own.last = w.last + row;
    gather(p, item, own, key, count, request.paths + node * request.path_stride);
    score_narrow(own, p.head_dim, count);
    if (p.logit_cap > 0) cap_logits(own.scores, own.rows * kKeyTile, p.logit_cap);
    softmax_narrow(own, key, count, p.window >= 0);
    add_values(own, p.head_dim, count);
  }
}

// Attends over the item's key tiles tile_begin .. tile_end - 1. Without `partial` writes the
// output; else leaves o [rows][head_dim], m [rows], l [rows] there.
template <typename T>
void attend(const AttentionParams<T>& p, const AttentionItem& item, int64_t tile_begin,
            int64_t tile_end, float* partial) {
  Workspace w = make_workspace(p, item);
  load_queries(p, item, w);
  const int64_t begin = item.key_begin + tile_begin * kKeyTile;
  const int64_t end = min(item.key_end, item.key_begin + tile_end * kKeyTile);
  const Request& request = p.requests[item.request];
  if (end > request.pooled) load_block(p, item, w);

  for (int64_t key = begin; key < end; key += kKeyTile) {
    const int64_t count = min(kKeyTile, end - key);
    if (request.depths && key + count > request.first_index) {
      attend_tree_tile(p, item, w, key);
      continue;
    }
    // Rows go by token: the last one's range starts last, the first one's ends first. Nodes of a
    // tree go by no order, but all of them see all of their context that is in the window.
    const bool masked =
        request.depths ? p.window >= 0 : key < w.first[w.rows - 1] || key + count - 1 > w.last[0];
    gather(p, item, w, key, count, nullptr);
    if (w.wide) {
      score_wide(w, p.head_dim, count);
      if (p.logit_cap > 0) cap_logits(w.scores, count * w.padded_rows, p.logit_cap);
      softmax_wide(w, key, count, masked);
    } else {
      score_narrow(w, p.head_dim, count);
      if (p.logit_cap > 0) cap_logits(w.scores, w.rows * kKeyTile, p.logit_cap);
      softmax_narrow(w, key, count, masked);
    }
    add_values(w, p.head_dim, count);
  }

  if (!partial) {
    for (int64_t r = 0; r < w.rows; ++r) write_row(p, item, r, w.o + r * p.head_dim, w.l[r]);
    return;
  }
  memcpy(partial, w.o, sizeof(float) * w.rows * p.head_dim);
  memcpy(partial + w.rows * p.head_dim, w.m, sizeof(float) * w.rows);
  memcpy(partial + w.rows * (p.head_dim + 1), w.l, sizeof(float) * w.rows);
}

// Combines the pieces of one item and writes its output.
template <typename T>
void merge(const AttentionParams<T>& p, const AttentionItem& item, const float* const* pieces,
           int64_t count) {
  const int64_t rows = item.num_tokens * p.group;
  const int64_t m_at = rows * p.head_dim, l_at = m_at + rows;
  float* o = thread_scratch(p.head_dim);
  for (int64_t r = 0; r < rows; ++r) {
    float m = kLowest;
    for (int64_t i = 0; i < count; ++i) m = pieces[i][m_at + r] > m ? pieces[i][m_at + r] : m;
    float l = 0.0f;
    memset(o, 0, sizeof(float) * p.head_dim);
    for (int64_t i = 0; i < count; ++i) {
      const float factor = exp(broadcast(pieces[i][m_at + r] - m))[0];
      l += factor * pieces[i][l_at + r];
      const float* piece = pieces[i] + r * p.head_dim;
      for (int64_t c = 0; c < p.head_dim; c += kLanes) {
        store(o + c, load(o + c) + factor * load(piece + c));
      }
    }
    write_row(p, item, r, o, l);
  }
}

}  // namespace dflare::cpu::DFLARE_ISA
