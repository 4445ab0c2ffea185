// What the CUDA kernels are given and how they are launched. Neither this header nor any kernel
// knows Torch; csrc/cuda/launch_*.cpp fill these structs from checked tensors.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../contract/append_context_kv.h"
#include "../contract/block_attention.h"
#include "../contract/head_argmax.h"
#include "elements.h"
#include "heuristics.h"

namespace dflare {

// ------------------------------------------------------------ append_context_kv

// fused[d, m, :] = RMSNorm(sum_t fusion_probs[d, t] * target_hidden[n, t, :]) * norm_weight, where
// m counts the valid rows n in order. With commit_lens, rows are num_rows / block_size blocks of
// block_size and row i of block b is valid iff i < commit_lens[b]; without, every row is.
struct FuseNormParams : ContextWeights<void> {
  ElementType element;
  const void* target_hidden;  // [num_rows, num_taps, hidden], rows target_hidden_stride apart
  int64_t target_hidden_stride;
  const int32_t* commit_lens;  // [num_rows / block_size] or null
  int num_rows, block_size, num_taps, num_layers, hidden;
  void* fused;            // [num_layers, num_rows, hidden]
  int32_t* compact_rows;  // out, with commit_lens: [0] valid rows, [1 + m] source row n of m
  int tokens_ahead;       // without commit_lens: blocks that run at once, for the prefetch; 0: none
  bool overlap_launch;    // start while the kernel before is still running
};
cudaError_t run_fuse_norm(const FuseNormParams& params, cudaStream_t stream);

// Where projected heads go: bias, K norm per head, RoPE, then a row of the layer's pool.
struct ContextKvOutput : ContextWeights<void> {
  Rope rope;                    // positions: [num_rows]
  const int64_t* cache_loc;     // [num_rows]
  const int32_t* compact_rows;  // as in FuseNormParams, or null: all rows valid
  int num_rows, num_layers, kv_heads;
  // By value, so that one launch serves all layers without a table in device memory.
  void* k_pools[kMaxLayers];  // [slots, kv_heads, head_dim], slots *_strides elements apart
  void* v_pools[kMaxLayers];
  int k_strides[kMaxLayers];
  int v_strides[kMaxLayers];
};

// Projection, K norm, RoPE and pool write in one kernel; for few rows.
struct KvProjectWriteParams {
  ElementType element;
  int head_dim, hidden;
  const void* fused;    // [num_layers, num_rows, hidden]
  bool overlap_launch;  // start while the kernel before is still running
  ContextKvOutput out;
};
cudaError_t run_kv_project_write(const KvProjectWriteParams& params, cudaStream_t stream);
// The same on sm_90, for any number of rows; cudaErrorNotSupported in a build without it.
cudaError_t run_kv_project_wgmma(const KvProjectWriteParams& params, cudaStream_t stream);

// K norm, RoPE and pool write of a projection that a GEMM made; for many rows.
struct NormRopeWriteParams {
  ElementType element;
  int head_dim;
  const void* kv;  // [num_layers, num_rows, 2 * kv_heads * head_dim]
  ContextKvOutput out;
};
cudaError_t run_norm_rope_write(const NormRopeWriteParams& params, cudaStream_t stream);

// ------------------------------------------------------------ block_attention

// Which context each thread block of block_attention works on; one launch a step, shared by all
// layers. A schedule only says how many parts a request is cut into: the attention kernel derives
// its tiles from its own seq_lens and window, so a schedule made for another window, for other
// lengths or for another batch costs balance, never correctness. Lengths are clamped to
// [0, kMaxContext].
struct AttentionScheduleParams {
  const void* seq_lens;  // [batch_size], int32 or int64
  bool seq_lens_64bit;
  int batch_size, head_dim, window;
  AttentionPlan plan;
  int32_t* schedule;  // out: [attention_schedule_size(plan)]
};
cudaError_t run_block_attention_schedule(const AttentionScheduleParams& params,
                                         cudaStream_t stream);

// All but qkv must have been written before the kernel that wrote qkv started: an overlapped launch
// reads the schedule and the context before it waits for that kernel.
struct BlockAttentionParams : BlockAttentionInputs<void> {
  ElementType element;
  const void* qkv;  // [batch_size * block_size, (num_heads + 2 * kv_heads) * head_dim]
  int qkv_stride;
  const void* k_pool;  // [slots, kv_heads, head_dim], slots *_stride elements apart
  const void* v_pool;
  int k_stride, v_stride;
  const int32_t* req_to_token;  // [rows, max_len], rows req_to_token_stride apart
  int64_t req_to_token_stride;
  const int64_t* req_pool_indices;  // [batch_size]
  const void* seq_lens;             // [batch_size], int32 or int64
  bool seq_lens_64bit;
  int batch_size, block_size, num_heads, kv_heads, head_dim;
  AttentionPlan plan;
  // From run_block_attention_schedule; tickets are drawn in it and put back, so calls that may run
  // at the same time (on two streams) must not share one.
  int32_t* schedule;
  float* partials;      // [attention_partials_size(plan, head_dim)], scratch
  void* out;            // [batch_size * block_size, num_heads * head_dim]
  bool overlap_launch;  // start while the kernel before is still running
};
cudaError_t run_block_attention(const BlockAttentionParams& params, cudaStream_t stream);

// ------------------------------------------------------------ head_argmax

// keys[d] becomes the highest argmax_key of row drafting_row(d) of the logits and of the columns
// before these; tokens[d] its token.
struct HeadArgmaxParams {
  ElementType element;
  const void* logits;  // [rows, columns], contiguous
  int columns;
  int64_t first_column;  // how many columns of the vocabulary came before; at 0 keys are not read
  int drafted, block_size;
  HeadTokens head_tokens;
  int64_t* keys;    // [drafted]
  int64_t* tokens;  // [drafted]
};
cudaError_t run_head_argmax(const HeadArgmaxParams& params, cudaStream_t stream);

// ------------------------------------------------------------ lookup_continuations

// What followed the longest earlier occurrence of the end of each request's text: tokens of its
// seq_lens[b] slots, then its anchor. Of equally long ones the latest.
struct LookupParams {
  const int32_t* tokens;        // [slots]
  const int32_t* req_to_token;  // [rows, max_len], rows req_to_token_stride apart
  int64_t req_to_token_stride;
  const int64_t* req_pool_indices;  // [batch_size]
  const void* seq_lens;             // [batch_size], int32 or int64
  bool seq_lens_64bit;
  const int64_t* anchors;  // [batch_size]
  int batch_size, count;
  int least_match, longest_match;  // shorter ones do not count, longer ones are as good
  int64_t* found;                  // out: [batch_size, count]; zeros where nothing matches
  int32_t* lengths;                // out: [batch_size], tokens that match; 0: none
};
cudaError_t run_lookup_continuations(const LookupParams& params, cudaStream_t stream);

// ------------------------------------------------------------ draft trees

// The most probable prefixes of a factorised draft and of one more branch, by best score first.
struct BuildTreeParams {
  const int64_t* anchors;  // [batch_size]
  const int64_t* tokens;   // [batch_size, depths, ranks], best first
  const float* log_probs;  // the same
  const int64_t* branch;   // [batch_size, longest]
  const float* branch_log_probs;
  const int32_t* branch_lens;                     // [batch_size]
  int batch_size, depths, ranks, longest, nodes;  // ranks >= nodes; longest 0: no branch
  int64_t* out_tokens;  // out: [batch_size, nodes + 1], as the others; row 0 is the anchor
  int32_t* parents;
  int32_t* out_depths;
};
cudaError_t run_build_draft_tree(const BuildTreeParams& params, cudaStream_t stream);

// The target's way through each tree, at most `stride` nodes of it.
struct WalkTreeParams {
  const int64_t* tokens;         // [batch_size, width]
  const int32_t* parents;        // the same
  const int64_t* target_tokens;  // the same
  int batch_size, width, stride;
  int32_t* path;         // out: [batch_size, stride]
  int32_t* commit_lens;  // out: [batch_size]
  int64_t* committed;    // out: [batch_size, stride]
};
cudaError_t run_walk_draft_tree(const WalkTreeParams& params, cudaStream_t stream);

// The tree's part of the masks that SGLang's attention reads: a matrix [width, seq_len + width] a
// request, one after the other, of which the last `width` columns are written.
struct TreeMaskParams {
  const int32_t* parents;  // [batch_size, width]
  const void* seq_lens;    // [batch_size], int32 or int64
  bool seq_lens_64bit;
  int batch_size, width;
  uint8_t* mask;  // out
};
cudaError_t run_write_tree_mask(const TreeMaskParams& params, cudaStream_t stream);

}  // namespace dflare
