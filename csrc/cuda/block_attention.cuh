// block_attention: a drafter block attends to its paged context and to itself.
//
// Rows. The queries of one KV head are packed: row r of a request is head r % group of token
// r / group, so that all of them share each K/V tile. A warp owns 16 rows.
//
// Work. A thread block handles one (KV head, row tile) of one schedule item: part i of a request's
// n parts of the context; the last part also takes the block's own keys. Context tiles are gathered
// slot by slot (any page size): a warp holds the slots of its rows of a tile in registers, one per
// lane, looked up a tile ahead, and hands them out by shuffle.
//
// Shared memory is a ring of kStages stages [K: kKeys x head_dim | V: kKeys x head_dim], swizzled
// (tile.cuh). Before the first context tile is needed,
//
//   1. context tiles 0 .. kStages-2 are requested into their stages;
//   2. q is normalised, rotated and staged in the last stage, from where the mma fragments are
//      loaded (at head_dim 256 it has a place of its own and stays there);
//   3. the block's own K (normalised, rotated) and V fill the last stage and are attended to:
//      arithmetic that hides the latency of 1.
//
// The softmax is the usual online one, in base 2 with the scale folded into the exponent.
//
// Parts. With n > 1 each part writes its sums, maxima and normalisers to scratch and draws a
// ticket; the one that draws the last adds all parts in order (so the result does not depend on who
// was last) and puts the ticket back to zero for the next layer.
#pragma once

#include <climits>

#include "head_row.cuh"
#include "launch.cuh"
#include "params.h"
#include "seq_len.cuh"
#include "tile.cuh"

namespace dflare {

template <class T, int kHeadDim, int kWarps>
struct BlockAttention {
  using Row = HeadRow<kHeadDim>;
  static constexpr int kRows = 16 * kWarps, kThreads = 32 * kWarps;
  static constexpr int kKeys = attention_keys(kHeadDim), kStages = attention_stages(kHeadDim);
  static constexpr int kTileElements = kKeys * kHeadDim;  // of K or of V
  static constexpr bool kQueryInRegisters = kHeadDim <= 128;
  static constexpr int kChunks = kHeadDim / 8;         // 16-byte chunks of a key
  static constexpr int kKeysPerWarp = kKeys / kWarps;  // that a warp copies of a tile
  static constexpr int kKeysPerCopy = 32 / kChunks;    // that one instruction of a warp copies
  static_assert(!kQueryInRegisters || kRows <= 2 * kKeys, "q fits the stage it borrows");

  const BlockAttentionParams& p;
  T* const shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // The item.
  int request, part, parts, first_partial;
  int kv_head, row_tile;
  int seq_len, first_key, tiles;  // first context index of this part and its tiles
  const int32_t* slots;           // of the request's context

  // mma accumulators: sum[j] holds columns 8j + lane % 4 * 2 + {0, 1} of rows lane / 4 (elements
  // 0, 1) and lane / 4 + 8 (elements 2, 3) of the warp's 16. Maxima are in units of log2.
  float sum[kHeadDim / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, normalizer[2] = {0, 0};
  uint32_t query[kQueryInRegisters ? kHeadDim / 16 : 1][4];

  __device__ __forceinline__ BlockAttention(const BlockAttentionParams& params, T* shared_memory)
      : p(params), shared(shared_memory) {}

  __device__ __forceinline__ T* keys(int stage) const { return shared + stage * 2 * kTileElements; }
  __device__ __forceinline__ T* values(int stage) const { return keys(stage) + kTileElements; }
  __device__ __forceinline__ int rows() const { return p.plan.group * p.block_size; }
  __device__ __forceinline__ int token_of(int row) const {
    return row * p.plan.inverse_group >> 20;
  }
  __device__ __forceinline__ bool warp_has_rows() const {
    return row_tile * kRows + warp * 16 < rows();
  }
  // This block among those of its item.
  __device__ __forceinline__ int unit() const { return blockIdx.y * p.plan.row_tiles + blockIdx.x; }
  // Row within the request of this thread's accumulator rows.
  __device__ __forceinline__ int row_of(int half) const {
    return row_tile * kRows + warp * 16 + half * 8 + lane / 4;
  }

  __device__ __forceinline__ void read_item() {
    const int4* records = reinterpret_cast<const int4*>(p.schedule);
    const int4 made_for = records[0], item = records[1 + blockIdx.z];
    request = item.x, part = item.y, parts = item.z, first_partial = item.w;
    if (made_for.x != p.batch_size || made_for.y != p.plan.units ||
        made_for.z != p.plan.max_items || made_for.w != p.plan.max_partials) {
      // Of another batch or shape that happens to have a schedule of this size: no request is cut.
      const int item_index = static_cast<int>(blockIdx.z);
      request = item_index < p.batch_size ? item_index : -1, part = 0, parts = 1;
    }
    if (request < 0) return;
    row_tile = blockIdx.x;
    kv_head = blockIdx.y;
    seq_len = load_seq_len(p.seq_lens, p.seq_lens_64bit, request);
    const int all = attention_tiles(seq_len, p.window, kHeadDim);
    const int first_tile = attention_first_tile(all, part, parts);
    tiles = attention_first_tile(all, part + 1, parts) - first_tile;
    first_key = attention_first_key(seq_len, p.window) + first_tile * kKeys;
    slots = p.req_to_token + p.req_pool_indices[request] * p.req_to_token_stride;
  }

  // ---------------------------------------------------------- context

  // Slot of the key that this lane looks up for its warp, -1 beyond the context.
  __device__ __forceinline__ int find_slot(int tile) const {
    const int key = first_key + tile * kKeys + warp * kKeysPerWarp + lane % kKeysPerWarp;
    return tile < tiles && key < seq_len ? slots[key] : -1;
  }

  __device__ __forceinline__ void load_context(int tile, int slot) const {
    T* k_tile = keys(tile % kStages);
    T* v_tile = values(tile % kStages);
    const int column = lane % kChunks * 8;
    const T* k_head = static_cast<const T*>(p.k_pool) + kv_head * kHeadDim + column;
    const T* v_head = static_cast<const T*>(p.v_pool) + kv_head * kHeadDim + column;
#pragma unroll
    for (int i = 0; i < kKeysPerWarp / kKeysPerCopy; ++i) {
      const int key = i * kKeysPerCopy + lane / kChunks;
      const int key_slot = __shfl_sync(0xffffffffu, slot, key);
      const bool valid = key_slot >= 0;
      const int offset = tile_offset<kHeadDim>(warp * kKeysPerWarp + key, column);
      ptx::cp_async_16(k_tile + offset, k_head + int64_t{max(key_slot, 0)} * p.k_stride, valid);
      ptx::cp_async_16(v_tile + offset, v_head + int64_t{max(key_slot, 0)} * p.v_stride, valid);
    }
  }

  // ---------------------------------------------------------- the block itself

  // Heads of the block on their way from qkv to a tile, a few rows a thread at a time: their loads
  // are in flight together, else every row would cost the latencies of its position, of its cosines
  // and sines, and of the head itself.
  static constexpr int kRowsPerPass = kThreads / Row::kLanes;
  template <int kInFlight>
  struct HeadBatch {
    static constexpr int kBatchRows = kInFlight * kRowsPerPass;
    Row heads[kInFlight], rotations[kInFlight];
  };
  static constexpr int kQueryPasses = kRows / kRowsPerPass;
  using QueryBatch = HeadBatch < kQueryPasses<4 ? kQueryPasses : 4>;
  using BlockBatch = HeadBatch<ceil_div(16, kRowsPerPass)>;  // B = 16, the usual size, is one

  // source(row) gives {token of the block, head of its qkv row}.
  template <int kInFlight, class Source>
  __device__ __forceinline__ void request_heads(HeadBatch<kInFlight>& batch, int first,
                                                Source source) const {
    int position[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int2 from = source(first + i * kRowsPerPass + threadIdx.x / Row::kLanes);
      const int token = request * p.block_size + from.x;
      position[i] = static_cast<int>(p.positions[token]);
      batch.heads[i].load(p.rotary, static_cast<const T*>(p.qkv) + int64_t{token} * p.qkv_stride +
                                        from.y * kHeadDim);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      batch.rotations[i].load_rotation(p.rotary, p.cos_sin + int64_t{position[i]} * p.rotary);
    }
  }

  template <int kInFlight>
  __device__ __forceinline__ void finish_heads(HeadBatch<kInFlight>& batch, int first,
                                               const T* norm_weight, T* tile) const {
    Row weight;
    weight.load(p.rotary, norm_weight);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      batch.heads[i].normalize(weight, p.eps, true);
      batch.heads[i].rotate(batch.rotations[i]);
      const int row = first + i * kRowsPerPass + threadIdx.x / Row::kLanes;
      batch.heads[i].template store_with<T>(p.rotary, [&](int place, uint4 elements) {
        *reinterpret_cast<uint4*>(tile + tile_offset<kHeadDim>(row, place)) = elements;
      });
    }
  }

  __device__ __forceinline__ T* query_tile() const {
    return keys(kQueryInRegisters ? kStages - 1 : kStages);
  }

  // Rows beyond the last repeat it: their results are not written.
  __device__ __forceinline__ void request_query(QueryBatch& batch, int first) const {
    request_heads(batch, first, [&](int row) {
      const int packed = min(row_tile * kRows + row, rows() - 1), token = token_of(packed);
      return make_int2(token, (kv_head - token) * p.plan.group + packed);
    });
  }

  // `batch` holds the first rows already.
  __device__ __forceinline__ void load_query(QueryBatch& batch) {
    const T* norm_weight = static_cast<const T*>(p.q_norm_weight);
    finish_heads(batch, 0, norm_weight, query_tile());
#pragma unroll 1
    for (int first = batch.kBatchRows; first < kRows; first += batch.kBatchRows) {
      request_query(batch, first);
      finish_heads(batch, first, norm_weight, query_tile());
    }
    if constexpr (kQueryInRegisters) {
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        load_fragment_a<kHeadDim>(query[k], query_tile(), warp * 16, k * 16);
      }
      __syncthreads();  // the stage is free for keys
    }
  }

  // K rows beyond the block's last are masked whatever they hold; V rows must be zeros there.
  __device__ __forceinline__ void load_block() const {
    for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
      const int row = i / kChunks, column = i % kChunks * 8;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (row < p.block_size) {
        const int head = p.num_heads + p.kv_heads + kv_head;
        v = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.qkv) +
                                            int64_t{request * p.block_size + row} * p.qkv_stride +
                                            head * kHeadDim + column);
      }
      *reinterpret_cast<uint4*>(values(kStages - 1) + tile_offset<kHeadDim>(row, column)) = v;
    }
#pragma unroll 1
    for (int first = 0; first < p.block_size; first += BlockBatch::kBatchRows) {
      BlockBatch batch;
      request_heads(batch, first, [&](int row) {
        return make_int2(min(row, p.block_size - 1), p.num_heads + kv_head);
      });
      finish_heads(batch, first, static_cast<const T*>(p.k_norm_weight), keys(kStages - 1));
    }
  }

  // ---------------------------------------------------------- attention to one tile

  // The tile holds the keys of indices [begin, end), end - begin <= kKeys, then zeros.
  __device__ __forceinline__ void attend(int stage, int begin, int end) {
    float score[kKeys / 8][4] = {};
    const T* k_tile = keys(stage);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t a[4];
      if constexpr (!kQueryInRegisters) {
        load_fragment_a<kHeadDim>(a, query_tile(), warp * 16, k * 16);
      }
      const uint32_t (&q)[4] = kQueryInRegisters ? query[kQueryInRegisters ? k : 0] : a;
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        load_fragments_b<kHeadDim>(b, k_tile, n * 16, k * 16);
        ptx::mma_m16n8k16<T>(score[2 * n], q, b[0], b[1]);
        ptx::mma_m16n8k16<T>(score[2 * n + 1], q, b[2], b[3]);
      }
    }
    mask(score, begin, end);
    const float scale = p.scale * 1.4426950408889634f;  // log2(e): exponentials are powers of 2
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        highest = fmaxf(highest, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      highest = fmaxf(highest * scale, maximum[half]);
      // A row that has seen no visible key keeps a maximum of -inf; -inf - -inf would be NaN.
      const float offset = highest == -INFINITY ? 0.0f : highest;
      const float shrink = ptx::exp2(maximum[half] - offset);
      maximum[half] = highest;
      float total = 0;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          score[n][e] = ptx::exp2(score[n][e] * scale - offset);
          total += score[n][e];
        }
      }
      normalizer[half] = normalizer[half] * shrink + total;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        sum[j][2 * half] *= shrink;
        sum[j][2 * half + 1] *= shrink;
      }
    }
    const T* v_tile = values(stage);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      // The accumulator layout of 16 rows x 16 keys is the A operand's.
      const uint32_t probability[4] = {ptx::pack<T>(score[2 * k][0], score[2 * k][1]),
                                       ptx::pack<T>(score[2 * k][2], score[2 * k][3]),
                                       ptx::pack<T>(score[2 * k + 1][0], score[2 * k + 1][1]),
                                       ptx::pack<T>(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
      for (int j = 0; j < kHeadDim / 16; ++j) {
        uint32_t b[4];
        load_fragments_b_transposed<kHeadDim>(b, v_tile, k * 16, j * 16);
        ptx::mma_m16n8k16<T>(sum[2 * j], probability, b[0], b[1]);
        ptx::mma_m16n8k16<T>(sum[2 * j + 1], probability, b[2], b[3]);
      }
    }
  }

  // Key j is visible to the query of index i iff j < end, j >= i - window and, if causal, j <= i.
  __device__ __forceinline__ void mask(float (&score)[kKeys / 8][4], int begin, int end) const {
    const int last_query = seq_len + p.block_size - 1;
    const bool below_window = p.window >= 0 && begin < last_query - p.window;
    const bool after_query = p.causal && end > seq_len;
    if (end - begin == kKeys && !below_window && !after_query) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query_index = seq_len + token_of(row_of(half));
      const int first = p.window >= 0 ? query_index - p.window : INT_MIN;
      const int last = p.causal ? min(query_index, end - 1) : end - 1;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = begin + n * 8 + lane % 4 * 2 + e;
          if (key < first || key > last) score[n][2 * half + e] = -INFINITY;
        }
      }
    }
  }

  // ---------------------------------------------------------- result

  __device__ __forceinline__ T* output_head(int row) const {
    const int token = token_of(row), head = (kv_head - token) * p.plan.group + row;
    return static_cast<T*>(p.out) +
           (int64_t{request * p.block_size + token} * p.num_heads + head) * kHeadDim;
  }

  __device__ __forceinline__ void write_output() const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
      if (row >= rows()) continue;
      const float inverse = ptx::reciprocal(normalizer[half]);
      T* out = output_head(row);
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<uint32_t*>(out + j * 8 + lane % 4 * 2) =
            ptx::pack<T>(sum[j][2 * half] * inverse, sum[j][2 * half + 1] * inverse);
      }
    }
  }

  // Scratch of one part: kRows x head_dim sums, then kRows x {maximum, normaliser}.
  __device__ __forceinline__ float* partial(int of_part) const {
    const int index = (first_partial + of_part) * p.plan.units + unit();
    return p.partials + index * (kRows * (kHeadDim + 2));  // under 2^31, see plan_attention
  }

  __device__ __forceinline__ void write_partial() const {
    if (!warp_has_rows()) return;
    float* sums = partial(part);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<float2*>(sums + row * kHeadDim + j * 8 + lane % 4 * 2) =
            make_float2(sum[j][2 * half], sum[j][2 * half + 1]);
      }
      if (lane % 4 == 0) {
        *reinterpret_cast<float2*>(sums + kRows * kHeadDim + row * 2) =
            make_float2(maximum[half], normalizer[half]);
      }
    }
  }

  // Whether this was the last part of the request's to arrive.
  __device__ __forceinline__ bool draw_ticket() const {
    int32_t* tickets = p.schedule + 4 * (1 + p.plan.max_items);
    int32_t* ticket = tickets + first_partial * p.plan.units + unit();
    int* shared_flag = reinterpret_cast<int*>(shared);
    __syncthreads();  // every thread's share of the partial result is written
    if (threadIdx.x == 0) {
      const bool last = ptx::atomic_add_acq_rel(ticket, 1) == parts - 1;
      if (last) *ticket = 0;
      *shared_flag = last;
    }
    __syncthreads();
    return *shared_flag != 0;
  }

  // Adds up all parts and writes the result. A lane takes four columns of a row, 16 bytes a load,
  // and several rows at a time, so that enough loads are in flight to be bound by L2.
  __device__ __forceinline__ void merge_parts() const {
    constexpr int kLanes = kHeadDim / 4 < 32 ? kHeadDim / 4 : 32;
    constexpr int kVectors = kHeadDim / 4 / kLanes, kRowsInFlight = 8 / kVectors;
    constexpr int kRowsAtOnce = kThreads / kLanes;
    const int column = threadIdx.x % kLanes * 4;
    const int all_rows = min(rows() - row_tile * kRows, kRows);
#pragma unroll 1
    for (int first = threadIdx.x / kLanes; first < all_rows; first += kRowsInFlight * kRowsAtOnce) {
      float total[kRowsInFlight][kVectors][4] = {};
      float highest[kRowsInFlight], weights[kRowsInFlight];
#pragma unroll
      for (int r = 0; r < kRowsInFlight; ++r) highest[r] = -INFINITY, weights[r] = 0;
#pragma unroll 2
      for (int i = 0; i < parts; ++i) {
        const float* sums = partial(i);
        float2 state[kRowsInFlight];  // maximum, normaliser
        float4 values[kRowsInFlight][kVectors];
#pragma unroll
        for (int r = 0; r < kRowsInFlight; ++r) {
          const int row = first + r * kRowsAtOnce;
          state[r] =
              ptx::load_from_l2(reinterpret_cast<const float2*>(sums + kRows * kHeadDim + row * 2));
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            values[r][v] = ptx::load_from_l2(
                reinterpret_cast<const float4*>(sums + row * kHeadDim + v * kLanes * 4 + column));
          }
        }
#pragma unroll
        for (int r = 0; r < kRowsInFlight; ++r) {
          const float before = highest[r];
          highest[r] = fmaxf(before, state[r].x);
          const float offset = highest[r] == -INFINITY ? 0.0f : highest[r];
          const float shrink = ptx::exp2(before - offset);
          const float weight = ptx::exp2(state[r].x - offset);
          weights[r] = weights[r] * shrink + state[r].y * weight;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            float (&t)[4] = total[r][v];
            t[0] = t[0] * shrink + values[r][v].x * weight;
            t[1] = t[1] * shrink + values[r][v].y * weight;
            t[2] = t[2] * shrink + values[r][v].z * weight;
            t[3] = t[3] * shrink + values[r][v].w * weight;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsInFlight; ++r) {
        const int row = first + r * kRowsAtOnce;
        if (row >= all_rows) break;
        const float inverse = ptx::reciprocal(weights[r]);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const float (&t)[4] = total[r][v];
          *reinterpret_cast<uint2*>(output_head(row_tile * kRows + row) + v * kLanes * 4 + column) =
              make_uint2(ptx::pack<T>(t[0] * inverse, t[1] * inverse),
                         ptx::pack<T>(t[2] * inverse, t[3] * inverse));
        }
      }
    }
  }

  // ---------------------------------------------------------- all of it

  __device__ __forceinline__ void run() {
    // The context is older than the kernel before, which makes qkv (params.h): it is on its way
    // before that kernel has finished.
    read_item();
    if (request < 0) {
      ptx::wait_for_prior_kernels();
      return;
    }
    int slot[kStages - 1];
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) slot[i] = find_slot(i);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      load_context(i, slot[i]);
      ptx::cp_async_commit();
    }
    int next_slot = find_slot(kStages - 1);
    ptx::wait_for_prior_kernels();
    QueryBatch batch;
    request_query(batch, 0);
    load_query(batch);
    const bool with_block = part == parts - 1;
    if (with_block) load_block();

    for (int tile = with_block ? -1 : 0; tile < tiles; ++tile) {
      int stage = kStages - 1, begin = seq_len, end = seq_len + p.block_size;
      if (tile >= 0) {
        stage = tile % kStages;
        begin = first_key + tile * kKeys;
        end = min(begin + kKeys, seq_len);
        ptx::cp_async_wait<kStages - 2>();
      }
      __syncthreads();  // the tile is complete, and nobody reads the one that is refilled next
      if (tile >= 0) {
        load_context(tile + kStages - 1, next_slot);
        ptx::cp_async_commit();
        next_slot = find_slot(tile + kStages);
      }
      if (warp_has_rows()) attend(stage, begin, end);
    }
    ptx::cp_async_wait<0>();
    // Not earlier: what starts now takes the SM from blocks that still read context, and a consumer
    // that forgot its wait would read rows that nobody has begun to write.
    ptx::launch_dependents();

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      normalizer[half] += __shfl_xor_sync(0xffffffffu, normalizer[half], 1);
      normalizer[half] += __shfl_xor_sync(0xffffffffu, normalizer[half], 2);
    }
    if (parts == 1) {
      write_output();
    } else {
      write_partial();
      if (draw_ticket()) merge_parts();
    }
  }
};

template <class T, int kHeadDim, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, attention_blocks_per_sm(kHeadDim, kWarps))
    block_attention_kernel(const __grid_constant__ BlockAttentionParams p) {
  DFLARE_DYNAMIC_SHARED_MEMORY(shared_bytes);
  BlockAttention<T, kHeadDim, kWarps>(p, reinterpret_cast<T*>(shared_bytes)).run();
}

template <class T, int kHeadDim, int kWarps>
cudaError_t launch_block_attention(const BlockAttentionParams& p, cudaStream_t stream) {
  const dim3 grid(p.plan.row_tiles, p.kv_heads, p.plan.max_items);
  return launch(block_attention_kernel<T, kHeadDim, kWarps>, grid, 32 * kWarps,
                attention_shared_bytes(kHeadDim, kWarps), p.overlap_launch, p, stream);
}

template <class T, int kHeadDim>
cudaError_t run_block_attention(const BlockAttentionParams& p, cudaStream_t stream) {
  if constexpr (kHeadDim <= 128) {
    if (p.plan.warps == 8) return launch_block_attention<T, kHeadDim, 8>(p, stream);
  }
  return launch_block_attention<T, kHeadDim, 4>(p, stream);
}

}  // namespace dflare
