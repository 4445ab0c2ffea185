// One attention item: the query rows (tokens x heads) that share a KV head, over a range of keys.
//
// Keys come in tiles of kKeyTile pointers gathered through the request's slots, so K and V are read
// in place and once for all rows.
//
// TileMath computes a tile, by vectors (attention_tile.h) or by the tile unit
// (attention_tile_amx.h). Tiles and splits begin at fixed indices of the context, each split is
// summed by itself and added to those before it: whether threads share an item's splits or one
// takes them all, the sums are the same.
//
// The nodes of a draft tree share the tiles of their context. From the tile on in which the first
// node lies, each takes its own keys: the rest of the context, then its ancestors in the order of
// their depths. So a node's keys lie in the tiles in which plain decoding would have them.
#pragma once

#include "cpu/kernels/attention_tile.h"
#include "cpu/kernels/attention_tile_amx.h"
#include "cpu/kernels/head.h"
#include "cpu/scratch.h"

namespace dflare::cpu::DFLARE_ISA {

// Where things of one item lie in the thread's scratch. Keys are computed with as rows of `Row`.
template <typename Row>
struct Workspace {
  QueryRows rows;
  Part total;
  int32_t *first, *last;   // of rows
  Row *block_k, *block_v;  // [block][head_dim]
  Row *tile_k, *tile_v;    // [kKeyTile][head_dim], where the pool's rows are of another type
  Row* zeros;              // [head_dim], stands in for keys that no row sees
  TileMath<Row> math;
};

template <typename Row, typename T>
inline Workspace<Row> make_workspace(const AttentionParams<T>& p, const AttentionItem& item) {
  const int64_t rows = item.num_tokens * p.group, head_dim = p.head_dim;
  const int64_t block = p.block_k ? p.requests[item.request].num_queries * head_dim : 0;
  const int64_t tile = sizeof(T) == sizeof(Row) ? 0 : kKeyTile * head_dim;
  const int64_t part = part_size(rows, head_dim);
  float* next = thread_scratch(2 * part + rows * (head_dim + 2) + 2 * (block + tile) + head_dim +
                               TileMath<Row>::scratch_floats(rows, head_dim));
  auto take = [&](int64_t size) {
    float* taken = next;
    next += size;
    return taken;
  };
  const auto ints = [&] { return reinterpret_cast<int32_t*>(take(rows)); };
  const auto keys = [&](int64_t size) { return reinterpret_cast<Row*>(take(size)); };
  float* q = take(rows * head_dim);
  const Part current = part_at(take(part), rows, head_dim);
  const Part total = part_at(take(part), rows, head_dim);
  int32_t *first = ints(), *last = ints();
  Row *block_k = keys(block), *block_v = keys(block), *tile_k = keys(tile), *tile_v = keys(tile);
  Row* zeros = keys(head_dim);
  memset(zeros, 0, sizeof(Row) * head_dim);
  return {{rows, head_dim, q, current, first, last},
          total,
          first,
          last,
          block_k,
          block_v,
          tile_k,
          tile_v,
          zeros,
          TileMath<Row>(next, rows, head_dim)};
}

inline int32_t clamp_index(int64_t index) {
  return static_cast<int32_t>(index < INT32_MIN   ? INT32_MIN
                              : index > INT32_MAX ? INT32_MAX
                                                  : index);
}

// Row t * group + g is head kv_head * group + g of token t.
template <typename T, typename Row>
void load_queries(const AttentionParams<T>& p, const AttentionItem& item, Workspace<Row>& w) {
  const Request& request = p.requests[item.request];
  for (int64_t t = 0; t < item.num_tokens; ++t) {
    const int64_t row = request.first_row + item.first_token + t;
    const int64_t index = request.index_of(item.first_token + t);
    const T* heads = p.q + row * p.q_stride + item.kv_head * p.group * p.head_dim;
    for (int64_t g = 0; g < p.group; ++g) {
      const int64_t r = t * p.group + g;
      float* x = w.rows.q + r * p.head_dim;
      load_row(x, heads + g * p.head_dim, p.head_dim);
      if (p.q_norm_weight) {
        head_norm(x, p.q_norm_weight, p.eps, p.head_dim);
        head_rope(x, p.rope, row);
      }
      w.first[r] = p.window < 0 ? INT32_MIN : clamp_index(index - p.window);
      w.last[r] = p.causal ? clamp_index(index) : INT32_MAX;
    }
  }
  w.math.prepare(w.rows, p.scale);
}

// The block's own keys and values of one KV head; only a draft has them, in float.
template <typename T>
void load_block(const AttentionParams<T>& p, const AttentionItem& item, Workspace<float>& w) {
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

template <typename Row>
inline const Row* as_row(const Row* row, Row*, int64_t) {
  return row;
}
inline const float* as_row(const BFloat16* row, float* out, int64_t size) {
  load_row(out, row, size);
  return out;
}

// The keys begin .. begin + count - 1. `path` is that of a tree's node, or null. A key whose slot
// lies outside of the pool is noted and stays zeros.
template <typename T, typename Row>
void gather(const AttentionParams<T>& p, const AttentionItem& item, const Workspace<Row>& w,
            const int32_t* path, KeyRows<Row>& keys) {
  const Request& request = p.requests[item.request];
  const int64_t offset = item.kv_head * p.head_dim;
  for (int64_t i = 0; i < kKeyTile; ++i) {
    int64_t index = keys.begin + i;
    keys.k[i] = keys.v[i] = w.zeros;
    // What left the window: the pool may have given the slot away.
    if (i >= keys.count || index < item.key_begin) continue;
    if (path && index >= request.first_index) {
      index = request.first_index + path[index - request.first_index];
    }
    if (index >= request.pooled) {
      keys.k[i] = w.block_k + (index - request.pooled) * p.head_dim;
      keys.v[i] = w.block_v + (index - request.pooled) * p.head_dim;
      continue;
    }
    const int64_t slot = request.slots[index];
    if (static_cast<uint64_t>(slot) >= static_cast<uint64_t>(p.num_slots)) {
      if (!__atomic_exchange_n(&p.bad_slot->found, 1, __ATOMIC_RELAXED)) {
        p.bad_slot->request = item.request;
        p.bad_slot->index = index;
      }
      continue;
    }
    const int64_t at = i * p.head_dim;
    keys.k[i] = as_row(p.k_pool + slot * p.k_slot_stride + offset, w.tile_k + at, p.head_dim);
    keys.v[i] = as_row(p.v_pool + slot * p.v_slot_stride + offset, w.tile_v + at, p.head_dim);
  }
}

// Asks for the pool's rows of the keys begin .. end - 1, while others are computed with.
template <typename T>
void prefetch(const AttentionParams<T>& p, const AttentionItem& item, int64_t begin, int64_t end) {
  const Request& request = p.requests[item.request];
  const int64_t offset = item.kv_head * p.head_dim, line = 64 / sizeof(T);
  for (int64_t index = max(begin, item.key_begin); index < min(end, request.pooled); ++index) {
    const int64_t slot = request.slots[index];
    for (int64_t c = 0; c < p.head_dim; c += line) {
      __builtin_prefetch(p.k_pool + slot * p.k_slot_stride + offset + c);
      __builtin_prefetch(p.v_pool + slot * p.v_slot_stride + offset + c);
    }
  }
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

// One key tile, of which each node of a tree sees its own keys.
template <typename T, typename Row>
void attend_tree_tile(const AttentionParams<T>& p, const AttentionItem& item, Workspace<Row>& w,
                      int64_t key) {
  const Request& request = p.requests[item.request];
  for (int64_t t = 0; t < item.num_tokens; ++t) {
    const int64_t node = item.first_token + t;
    KeyRows<Row> keys{key, min(kKeyTile, request.index_of(node) + 1 - key), p.window >= 0, {}, {}};
    if (keys.count <= 0) continue;
    gather(p, item, w, request.paths + node * request.path_stride, keys);
    w.math.attend_alone(w.rows.from(t * p.group, p.group), keys, p.logit_cap);
  }
}

// Adds a split's key tiles to w.rows.part.
template <typename T, typename Row>
void attend_split(const AttentionParams<T>& p, const AttentionItem& item, Workspace<Row>& w,
                  int64_t split) {
  const Request& request = p.requests[item.request];
  const int64_t first_tile = item.key_begin / kKeyTile * kKeyTile;
  const int64_t begin = max(split * kSplitKeys, first_tile);
  const int64_t end = min((split + 1) * kSplitKeys, item.key_end);
  for (int64_t key = begin; key < end; key += kKeyTile) {
    const int64_t count = min(kKeyTile, end - key);
    prefetch(p, item, key + count, min(key + count + kKeyTile, item.key_end));
    if (request.depths && key + count > request.first_index) {
      attend_tree_tile(p, item, w, key);
      continue;
    }
    // Rows go by token: the last one's range starts last, the first one's ends first. Nodes of a
    // tree go by no order, but all of them see all of their context that is in the window.
    const bool masked = request.depths
                            ? p.window >= 0
                            : key < w.first[w.rows.count - 1] || key + count - 1 > w.last[0];
    KeyRows<Row> keys{key, count, masked, {}, {}};
    gather(p, item, w, nullptr, keys);
    w.math.attend(w.rows, keys, p.logit_cap);
  }
}

template <typename Row, typename T>
void attend_rows(const AttentionParams<T>& p, const AttentionItem& item, int64_t split_begin,
                 int64_t split_end, float* parts) {
  Workspace<Row> w = make_workspace<Row>(p, item);
  load_queries(p, item, w);
  if constexpr (sizeof(Row) == sizeof(float)) {
    if (min(split_end * kSplitKeys, item.key_end) > p.requests[item.request].pooled) {
      load_block(p, item, w);
    }
  }
  const int64_t rows = w.rows.count;
  const Part next = w.rows.part;
  for (int64_t split = split_begin; split < split_end; ++split) {
    const bool first = split == split_begin;
    if (parts) {
      const int64_t at = (split - split_begin) * part_size(rows, p.head_dim);
      w.rows.part = part_at(parts + at, rows, p.head_dim);
    } else {
      w.rows.part = first ? w.total : next;
    }
    clear(w.rows.part, rows, p.head_dim);
    attend_split(p, item, w, split);
    if (!parts && !first) add_part(w.total, w.rows.part, rows, p.head_dim);
  }
  if (!parts) write_rows(p, item, w.total);
}

// Attends over the item's splits split_begin .. split_end - 1. Without `parts` these are all, and
// the output is written; else each leaves its part there, of `part_size` floats. The block of a
// draft is normalised and turned here, which bfloat16 would round once more.
template <typename T>
void attend(const AttentionParams<T>& p, const AttentionItem& item, int64_t split_begin,
            int64_t split_end, float* parts) {
#if defined(__AMX_BF16__)
  if constexpr (sizeof(T) == sizeof(BFloat16)) {
    if (!p.block_k) return attend_rows<BFloat16>(p, item, split_begin, split_end, parts);
  }
#endif
  attend_rows<float>(p, item, split_begin, split_end, parts);
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
