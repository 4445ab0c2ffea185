// One attention item: the query rows (tokens x heads) that share a KV head, over a range of keys.
//
// Keys come in tiles of kKeyTile pointers gathered through the request's slots, so K and V are read
// in place and once for all rows; bfloat16 rows are widened into scratch first.
//
// attention_tile.h computes a tile. A piece of an item leaves m, l and o of its rows for merge().
//
// The nodes of a draft tree share the tiles of their context. From the tile on in which the first
// node lies, each takes its own keys: the rest of the context, then its ancestors in the order of
// their depths. So a node's keys lie in the tiles in which plain decoding would have them.
#pragma once

#include "cpu/kernels/attention_tile.h"
#include "cpu/kernels/head.h"
#include "cpu/scratch.h"

namespace dflare::cpu::DFLARE_ISA {

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
