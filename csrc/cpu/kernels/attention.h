// One attention item: the query rows (tokens x heads) that share a KV head, over a range of keys.
//
// Keys come in tiles of kKeyTile pointers gathered through the request's slots, so K and V are read
// in place and once for all rows; bfloat16 rows are widened into scratch first.
//
// attention_tile.h computes a tile. Tiles and splits begin at fixed indices of the context, each
// split is summed by itself and added to those before it: whether threads share an item's splits
// or one takes them all, the sums are the same.
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
  const int64_t block = p.block_k ? p.requests[item.request].num_queries * p.head_dim : 0;
  const int64_t tile = sizeof(T) == sizeof(float) ? 0 : kKeyTile * p.head_dim;
  const int64_t part = part_size(w.rows, p.head_dim);
  float* next = thread_scratch(2 * part + w.rows * (p.head_dim + kKeyTile + 3) +
                               2 * (block + tile) + p.head_dim);
  auto take = [&](int64_t size) {
    float* taken = next;
    next += size;
    return taken;
  };
  w.q = take(w.rows * p.head_dim);
  w.scores = take(w.rows * kKeyTile);
  w.part = part_at(take(part), w.rows, p.head_dim);
  w.total = part_at(take(part), w.rows, p.head_dim);
  w.alpha = take(w.rows);
  w.first = reinterpret_cast<int32_t*>(take(w.rows));
  w.last = reinterpret_cast<int32_t*>(take(w.rows));
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
  for (int64_t t = 0; t < item.num_tokens; ++t) {
    const int64_t row = request.first_row + item.first_token + t;
    const int64_t index = request.index_of(item.first_token + t);
    const T* heads = p.q + row * p.q_stride + item.kv_head * p.group * p.head_dim;
    for (int64_t g = 0; g < p.group; ++g) {
      const int64_t r = t * p.group + g;
      float* x = w.q + r * p.head_dim;
      load_row(x, heads + g * p.head_dim, p.head_dim);
      if (p.q_norm_weight) {
        head_norm(x, p.q_norm_weight, p.eps, p.head_dim);
        head_rope(x, p.rope, row);
      }
      store_row(x, x, p.scale, p.head_dim);
      w.first[r] = p.window < 0 ? INT32_MIN : clamp_index(index - p.window);
      w.last[r] = p.causal ? clamp_index(index) : INT32_MAX;
    }
  }
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
    if (index < item.key_begin) {  // left the window: the pool may have given the slot away
      w.k[i] = w.v[i] = w.zeros;
      continue;
    }
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
  for (int64_t i = count; i < round_up(count, 4); ++i) w.k[i] = w.zeros;
}

template <typename T>
void write_rows(const AttentionParams<T>& p, const AttentionItem& item, const Part& part) {
  for (int64_t r = 0; r < item.num_tokens * p.group; ++r) {
    const int64_t row = p.requests[item.request].first_row + item.first_token + r / p.group;
    const int64_t head = item.kv_head * p.group + r % p.group;
    T* out = p.out + (row * p.kv_heads * p.group + head) * p.head_dim;
    store_row(out, part.o + r * p.head_dim, 1.0f / part.l[r], p.head_dim);
  }
}

template <typename T>
void attend_tile(const AttentionParams<T>& p, const Workspace& w, int64_t key, int64_t count,
                 bool masked) {
  score(w, p.head_dim, count);
  if (p.logit_cap > 0) cap_logits(w.scores, w.rows * kKeyTile, p.logit_cap);
  softmax(w, key, count, masked);
  add_values(w, p.head_dim, count);
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
    own.rows = p.group;
    own.q = w.q + row * p.head_dim;
    own.part = {w.part.o + row * p.head_dim, w.part.m + row, w.part.l + row};
    own.alpha = w.alpha + row;
    own.first = w.first + row;
    own.last = w.last + row;
    gather(p, item, own, key, count, request.paths + node * request.path_stride);
    attend_tile(p, own, key, count, p.window >= 0);
  }
}

// Adds a split's key tiles to w.part.
template <typename T>
void attend_split(const AttentionParams<T>& p, const AttentionItem& item, Workspace& w,
                  int64_t split) {
  const Request& request = p.requests[item.request];
  const int64_t first_tile = item.key_begin / kKeyTile * kKeyTile;
  const int64_t begin = max(split * kSplitKeys, first_tile);
  const int64_t end = min((split + 1) * kSplitKeys, item.key_end);
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
    attend_tile(p, w, key, count, masked);
  }
}

// Attends over the item's splits split_begin .. split_end - 1. Without `parts` these are all, and
// the output is written; else each leaves its part there, of `part_size` floats.
template <typename T>
void attend(const AttentionParams<T>& p, const AttentionItem& item, int64_t split_begin,
            int64_t split_end, float* parts) {
  Workspace w = make_workspace(p, item);
  load_queries(p, item, w);
  if (min(split_end * kSplitKeys, item.key_end) > p.requests[item.request].pooled) {
    load_block(p, item, w);
  }
  const Part next = w.part;
  for (int64_t split = split_begin; split < split_end; ++split) {
    const bool first = split == split_begin;
    if (parts) {
      const int64_t at = (split - split_begin) * part_size(w.rows, p.head_dim);
      w.part = part_at(parts + at, w.rows, p.head_dim);
    } else {
      w.part = first ? w.total : next;
    }
    clear(w.part, w.rows, p.head_dim);
    attend_split(p, item, w, split);
    if (!parts && !first) add_part(w.total, w.part, w.rows, p.head_dim);
  }
  if (!parts) write_rows(p, item, w.total);
}

// Adds up the parts of an item's splits, in place, and writes its output.
template <typename T>
void merge(const AttentionParams<T>& p, const AttentionItem& item, float* parts, int64_t count) {
  const int64_t rows = item.num_tokens * p.group, size = part_size(rows, p.head_dim);
  const Part total = part_at(parts, rows, p.head_dim);
  for (int64_t i = 1; i < count; ++i) {
    add_part(total, part_at(parts + i * size, rows, p.head_dim), rows, p.head_dim);
  }
  write_rows(p, item, total);
}

}  // namespace dflare::cpu::DFLARE_ISA
