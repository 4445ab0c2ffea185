// block_attention: a drafter block attends to its paged context and to itself.
//
// Rows. The queries of one KV head are packed, so that all of them share each K/V tile; a warp owns
// 16 rows (attention_item.cuh, attention_tile.cuh).
//
// Work. A thread block handles one (KV head, row tile) of one schedule item: part i of a request's
// n parts of the context; the last part also takes the block's own keys. Context tiles are gathered
// slot by slot (any page size): a warp holds the slots of its rows of a tile in registers, one per
// lane, looked up a tile ahead, and hands them out by shuffle. Parts are merged in
// attention_merge.cuh or attention_cluster.cuh.
//
// Shared memory is a ring of kStages stages [K: kKeys x head_dim | V: kKeys x head_dim], swizzled
// (tile.cuh). The context is older than the kernel before, which makes qkv (params.h), so
//
//   1. before the wait for that kernel, context tiles 0 .. kStages-2 are requested into their
//      stages, and the cosines and sines of the block's rows into registers;
//   2. then q is normalised, rotated and staged in the last stage, from where the mma fragments are
//      loaded (at head_dim 256 it has a place of its own and stays there);
//   3. the block's own K (normalised, rotated) and V fill the last stage and are attended to
//      (attention_block.cuh).
#pragma once

#include "attention_block.cuh"
#include "attention_cluster.cuh"
#include "attention_tile.cuh"
#include "launch.cuh"

namespace dflare {

// One lane's share of the copies of context tiles.
template <class T, int kHeadDim, int kWarps, class Layout>
struct ContextCopier {
  static constexpr int kKeys = attention_keys(kHeadDim);
  static constexpr int kChunks = kHeadDim / 8;         // 16-byte chunks of a key
  static constexpr int kKeysPerWarp = kKeys / kWarps;  // that a warp copies of a tile
  static constexpr int kKeysPerCopy = 32 / kChunks;    // that one instruction of a warp copies
  static_assert(kKeysPerWarp % 8 == 0, "the swizzle of a warp's first key is the identity");

  const AttentionItem& item;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kKeysPerWarp;
  const uint32_t place = ptx::keep(2u * Layout::offset(first + lane / kChunks, lane % kChunks * 8));
  const uint32_t source_lane = ptx::keep(static_cast<uint32_t>(lane / kChunks));
  const uint32_t looked_up =
      ptx::keep(static_cast<uint32_t>(item.first_key + first + lane % kKeysPerWarp));
  // Bytes; strides are under 2^31 elements.
  const uint32_t k_stride = 2u * item.p.k_stride, v_stride = 2u * item.p.v_stride;
  const int column = item.kv_head * kHeadDim + lane % kChunks * 8;
  const char* keys = reinterpret_cast<const char*>(static_cast<const T*>(item.p.k_pool) + column);
  const char* values = reinterpret_cast<const char*>(static_cast<const T*>(item.p.v_pool) + column);

  // Slot of the key that this lane looks up for its warp, -1 beyond the context.
  __device__ __forceinline__ int find_slot(int tile) const {
    const int key = static_cast<int>(looked_up) + tile * kKeys;
    return tile < item.tiles && key < item.seq_len ? item.slots[key] : -1;
  }

  __device__ __forceinline__ void load(ptx::SharedAddress stage, int slot) const {
#pragma unroll
    for (int i = 0; i < kKeysPerWarp / kKeysPerCopy; ++i) {
      const int key = i * kKeysPerCopy;
      const int key_slot = __shfl_sync(0xffffffffu, slot, key + static_cast<int>(source_lane));
      // A key's position in its group of 8 moves its chunks (tile.cuh).
      const ptx::SharedAddress to =
          ((stage + place) ^ static_cast<uint32_t>(key % 8 * 16)) + key * Layout::kLineBytes;
      const uint64_t at = static_cast<uint32_t>(key_slot);
      ptx::cp_async_16(to, keys + at * k_stride, key_slot >= 0);
      ptx::cp_async_16(to + Layout::kTileBytes, values + at * v_stride, key_slot >= 0);
    }
  }
};

// Tile is an AttentionTile, or one with its members.
template <class T, int kHeadDim, int kWarps, class Tile>
__device__ __forceinline__ void attend_to_block_and_context(const BlockAttentionParams& p,
                                                            T* shared) {
  using Rows = AttentionTile<T, kHeadDim, kWarps>;  // layout of the queries
  using Result = AttentionResult<T, kHeadDim, kWarps>;
  constexpr int kThreads = 32 * kWarps, kKeys = Tile::kKeys, kStages = Tile::kStages;
  constexpr int kStageElements = 2 * kKeys * kHeadDim, kStageBytes = 2 * kStageElements;
  constexpr int kQueryPasses = Tile::kRows / (kThreads / HeadRow<kHeadDim>::kLanes);
  // At B = 16, the usual size, one batch holds the block's keys.
  constexpr int kBlockPasses = ceil_div(16, kThreads / HeadRow<kHeadDim>::kLanes);
  using Queries = BlockHeads<T, kHeadDim, kThreads, (kQueryPasses < 4 ? kQueryPasses : 4)>;
  using Keys = BlockHeads<T, kHeadDim, kThreads, kBlockPasses>;
  static_assert(!Tile::kQueryInRegisters || Tile::kRows <= 2 * kKeys,
                "q fits the stage it borrows");

  const AttentionItem item(p, kHeadDim);
  if (item.request < 0) {
    ptx::wait_for_prior_kernels();
    return;
  }
  const ptx::SharedAddress stages = ptx::keep(ptx::shared_address(shared));
  const ContextCopier<T, kHeadDim, kWarps, Tile> copier{item};
  int slot[kStages - 1];
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) slot[i] = copier.find_slot(i);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    copier.load(stages + i * kStageBytes, slot[i]);
    ptx::cp_async_commit();
  }
  int next_slot = copier.find_slot(kStages - 1);
  const QuerySource query_source{item, item.row_tile * Tile::kRows};
  Queries queries;
  queries.request_turns(item, 0, query_source);
  const KeySource key_source{item};
  Keys keys;
  if (item.has_block()) keys.request_turns(item, 0, key_source);

  ptx::wait_for_prior_kernels();
  queries.request_heads(item, 0, query_source);
  T* const last_stage = shared + (kStages - 1) * kStageElements;
  T* const query_tile = Tile::kQueryInRegisters ? last_stage : shared + kStages * kStageElements;
  queries.template store<Rows>(p, 0, p.q_norm_weight, query_tile);
#pragma unroll 1
  for (int first = Queries::kRows; first < Tile::kRows; first += Queries::kRows) {
    queries.request_turns(item, first, query_source);
    queries.request_heads(item, first, query_source);
    queries.template store<Rows>(p, first, p.q_norm_weight, query_tile);
  }
  Tile tile;
  if constexpr (Tile::kQueryInRegisters) __syncthreads();
  tile.take_query(ptx::shared_address(query_tile));
  if constexpr (Tile::kQueryInRegisters) __syncthreads();  // the stage is free for keys
  if (item.has_block()) {
    load_block_values<T, kHeadDim, kThreads, Tile>(item, last_stage + kKeys * kHeadDim);
    keys.request_heads(item, 0, key_source);
    keys.template store<Tile>(p, 0, p.k_norm_weight, last_stage);
#pragma unroll 1
    for (int first = Keys::kRows; first < p.block_size; first += Keys::kRows) {
      keys.request_turns(item, first, key_source);
      keys.request_heads(item, first, key_source);
      keys.template store<Tile>(p, first, p.k_norm_weight, last_stage);
    }
  }

  // Tile -1 is the block's own, in the last stage.
  const ptx::SharedAddress stages_end = ptx::keep(stages + kStages * kStageBytes);
  ptx::SharedAddress write = stages + (kStages - 1) * kStageBytes, read = stages;
  const bool has_rows = tile.warp_has_rows(item);
  for (int i = item.has_block() ? -1 : 0; i < item.tiles; ++i) {
    ptx::SharedAddress at = write;
    int begin = item.seq_len, end = item.seq_len + p.block_size;
    if (i >= 0) {
      at = read;
      begin = item.first_key + i * kKeys;
      end = min(begin + kKeys, item.seq_len);
      ptx::cp_async_wait<kStages - 2>();
    }
    Tile::publish();
    __syncthreads();  // the tile is complete, and nobody reads the one that is refilled next
    const auto copy_next = [&] {
      if (i < 0) return;
      copier.load(write, next_slot);
      ptx::cp_async_commit();
      next_slot = copier.find_slot(i + kStages);
      write = read;  // the stage read now is the next to be filled
      read += kStageBytes;
      if (read == stages_end) read = stages;
    };
    if (has_rows) {
      tile.attend(item, at, begin, end, copy_next);
    } else {
      copy_next();
    }
  }
  ptx::cp_async_wait<0>();
  // Not earlier: what starts now takes the SM from blocks that still read context, and a consumer
  // that forgot its wait would read rows that nobody has begun to write.
  ptx::launch_dependents();

  tile.finish();
  if (item.parts == 1) {
    Result::write_output(item, tile);
  } else {
    if constexpr (ptx::kHasClusters) {
      if (item.has_cluster())
        return AttentionCluster<T, kHeadDim, kWarps>::merge(item, tile, shared);
    }
    Result::merge_parts(item, tile, shared);
  }
}

// The consumer parts (sm_120) have the shared memory of one block an SM.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kMostBlocks = 1;
#else
constexpr int kMostBlocks = 3;
#endif
constexpr int bounded_blocks(int wanted) { return wanted < kMostBlocks ? wanted : kMostBlocks; }

template <class T, int kHeadDim, int kWarps>
__global__ void __launch_bounds__(32 * kWarps,
                                  bounded_blocks(attention_blocks_per_sm(kHeadDim, kWarps)))
    block_attention_kernel(const __grid_constant__ BlockAttentionParams p) {
  DFLARE_DYNAMIC_SHARED_MEMORY(shared_bytes);
  attend_to_block_and_context<T, kHeadDim, kWarps, AttentionTile<T, kHeadDim, kWarps>>(
      p, reinterpret_cast<T*>(shared_bytes));
}

template <class T, int kHeadDim, int kWarps>
cudaError_t launch_block_attention(const BlockAttentionParams& p, cudaStream_t stream) {
  const dim3 grid(p.plan.row_tiles, p.kv_heads, p.plan.max_items);
  return launch(block_attention_kernel<T, kHeadDim, kWarps>, grid, 32 * kWarps,
                attention_shared_bytes(kHeadDim, kWarps), p.overlap_launch, p, stream,
                dim3(1, 1, p.plan.cluster));
}

template <class T, int kHeadDim>
cudaError_t run_block_attention(const BlockAttentionParams& p, cudaStream_t stream) {
  if constexpr (kHeadDim <= 128) {
    if (p.plan.warps == 8) return launch_block_attention<T, kHeadDim, 8>(p, stream);
  }
  return launch_block_attention<T, kHeadDim, 4>(p, stream);
}

}  // namespace dflare
