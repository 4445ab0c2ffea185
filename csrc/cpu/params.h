// Arguments of the CPU kernels, free of torch: what csrc/cpu/*.cpp fill in and csrc/cpu/kernels
// read.
#pragma once

#include <stdint.h>

#include "contract/append_context_kv.h"
#include "contract/block_attention.h"
#include "contract/head_argmax.h"

namespace dflare::cpu {

struct BFloat16 {
  uint16_t bits;
};

// One operation over all draft layers; T is float or BFloat16.
template <typename T>
struct AppendParams : ContextWeights<T> {
  // Some of the rows that count: rows[m] indexes target_hidden, rope.positions and cache_loc.
  const int64_t* rows;
  int64_t num_rows;

  const T* target_hidden;  // [N, taps * hidden]
  int64_t target_hidden_stride;
  Rope rope;

  const int64_t* cache_loc;
  T* const* pools;              // 2 * layers: keys, then values
  const int64_t* slot_strides;  // 2 * layers

  int64_t layers, taps, hidden, kv_heads, head_dim;

  void* fused;           // scratch [layers, num_rows, fused_stride] of float or smaller elements
  int64_t fused_stride;  // hidden, padded with zeros to whole vectors of any level
  int64_t chunk_rows;    // rows that one projection task handles
};

// Queries first_row .. first_row + num_queries - 1 have the indices first_index .. ; the request's
// keys are `pooled` ones in the pool, then, for a draft block, its own `num_queries`.
//
// The queries of a tree are its nodes: query t has index first_index + depths[t], and in place of
// key first_index + d it sees that of node paths[t * path_stride + d], its ancestor at depth d.
struct Request {
  const int32_t* slots;  // of each context index
  int64_t pooled;
  int64_t first_row;
  int64_t num_queries;
  int64_t first_index;
  const int32_t* depths;  // [num_queries], or null for a chain
  const int32_t* paths;   // [num_queries, path_stride]
  int64_t path_stride;

  int64_t index_of(int64_t query) const { return first_index + (depths ? depths[query] : query); }
};

// The queries of some tokens and of all heads that share a KV head, over the keys they can see.
struct AttentionItem {
  int64_t request, kv_head;
  int64_t first_token, num_tokens;  // counted from the request's first query
  int64_t key_begin, key_end;
};

// Position of the first slot outside the pool that a kernel met; it reads nothing there.
struct BadSlot {
  int32_t found;
  int64_t request, index;
};

constexpr int64_t kKeyTile = 64;              // keys that one step of the online softmax takes
constexpr int64_t kSplitKeys = 4 * kKeyTile;  // threads share an item's context by so many keys

// Floats of an item's rows over one split: o [rows][head_dim], m [rows], l [rows].
inline int64_t part_size(int64_t rows, int64_t head_dim) { return rows * (head_dim + 2); }

// Norms and RoPE are a draft block's, whose keys and values lie beside the queries.
template <typename T>
struct AttentionParams : BlockAttentionInputs<T> {
  const Request* requests;
  const T* q;  // [rows, q_heads, head_dim]
  int64_t q_stride;
  const T* block_k;  // null but for a draft block
  const T* block_v;

  const T* k_pool;  // [slots, kv_heads, head_dim]
  const T* v_pool;
  int64_t k_slot_stride, v_slot_stride;
  int64_t num_slots;

  int64_t kv_heads, group, head_dim;
  float logit_cap;

  T* out;  // [rows, q_heads, head_dim], contiguous
  BadSlot* bad_slot;
};

// A task of `linear`: a tile whose inputs stay in the second-level cache.
constexpr int64_t kLinearOutputs = 32;
constexpr int64_t kLinearRows = 128;

// out = x . weight^T + bias.
template <typename T>
struct LinearParams {
  const T* x;  // [rows, inputs]; inputs is a multiple of 32, or rows are padded with zeros to one
  int64_t x_stride;
  const T* weight;  // [outputs, inputs]
  const T* bias;    // [outputs] or null
  T* out;           // [rows, outputs]
  int64_t rows, inputs, outputs;
  const uint32_t* packed;  // x as KernelsFor::pack leaves it, where the level has one
};

// The best logit of every kLinearOutputs rows of a head; T(x . weight^T) are the logits.
template <typename T>
struct HeadParams : LinearParams<T> {
  HeadTokens head_tokens;
  int64_t* best;  // argmax_key, [rows, blocks of outputs]
};

// out = norm(x + residual) * weight; the sum replaces the residual.
template <typename T>
struct NormParams {
  const T* x;  // [rows, hidden]
  int64_t x_stride;
  T* residual;  // [rows, hidden] or null
  int64_t residual_stride;
  const T* weight;  // [hidden]
  float eps;
  T* out;  // [rows, hidden]
  int64_t hidden;
};

// out = silu(first half of x) * second half.
template <typename T>
struct GateParams {
  const T* x;  // [rows, 2 * width]
  int64_t x_stride;
  T* out;  // [rows, width]
  int64_t width;
};

// Rotary embedding of heads in place.
template <typename T>
struct RotaryParams {
  T* x;  // [rows, heads * head_dim]
  int64_t x_stride;
  int64_t heads, head_dim;
  Rope rope;
};

}  // namespace dflare::cpu
