// kv_project_wgmma: what kv_project_write does, by the units that sm_90a alone has, for any number
// of rows.
//
// A block owns one (layer, head, K or V) and a tile of kTokens tokens. The weights are the rows of
// the product and the tokens its columns, as a warpgroup's product has 64 rows at least but as few
// columns as 8: out[head_dim, tokens] = weight[head_dim, hidden] x fused[tokens, hidden]^T. Each
// consumer warpgroup takes 64 rows of the head; one more warp, the producer, requests the stages:
//
//   stage: [ weight rows: head_dim x 64 | fused rows: kParts of kPartTokens x 64 ]   swizzled
//
// `full` of a stage ends a phase when the producer has announced the bytes of its weights and of
// its states and the copy engine has written them; `empty` when all consumer warps have read them.
// Blocks of two neighbouring heads have the same tokens: with 64 tokens and more they form a
// cluster, and each requests half of the states for both. So `empty` waits for the warps of both.
// A product's operands come from shared memory, so no warp computes an address in the loop, and 128
// to 200 KiB a block are in flight. Tokens of a tile that do not count are copied and multiplied as
// well, but for whole parts: columns do not mix, and none of theirs is written.
//
// Before the wait for fuse_norm (programmatic dependent launch) the producer requests the weights
// of all stages and asks for the next kWeightsAhead bytes of them to be brought into L2; only for
// the first tile, because later ones may turn out to hold no valid row.
#pragma once

#include "context_kv_output.cuh"
#include "launch.cuh"
#include "ptx_sm90.cuh"

namespace dflare {

struct KvProjectWgmmaParams : KvProjectWriteParams {
  TensorMap weights;  // [num_layers, 2 * kv_heads * head_dim, hidden]
  TensorMap states;   // [num_layers, num_rows, hidden]
};

template <class T, int kHeadDim, int kTokens>
struct KvProjectWgmma {
  using Shape = KvProjectWgmmaShape<kHeadDim, kTokens>;
  using Row = HeadRow<kHeadDim>;
  static constexpr int kDepth = Shape::kDepth, kStages = Shape::kStages;
  static constexpr int kParts = Shape::kParts, kPartTokens = Shape::kPartTokens;
  static constexpr int kCluster = Shape::kCluster, kShareBytes = Shape::kPartBytes / kCluster;
  static constexpr int kConsumerWarps = Shape::kConsumers / 32;
  static constexpr int kOwnRows = ceil_div(kTokens, Shape::kConsumers);  // tokens of a thread
  static constexpr int kWeightsAhead = 160 * 1024;
  static_assert(kDepth == kBoxColumns, "a stage is as deep as a box");
  static_assert(Shape::kWeightBytes % 1024 == 0 && kShareBytes % 1024 == 0,
                "the swizzle repeats every 1024 bytes");

  // A stage of the ring, and the parity of the phase that a barrier of it is in.
  struct Place {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  };

  ptx::SharedAddress stages;
  float sum[kParts][kPartTokens / 2] = {};

  __device__ __forceinline__ ptx::SharedAddress weights_at(int stage) const {
    return stages + stage * Shape::kStageBytes;
  }
  __device__ __forceinline__ ptx::SharedAddress states_at(int stage, int part) const {
    return weights_at(stage) + Shape::kWeightBytes + part * Shape::kPartBytes;
  }
  __device__ __forceinline__ ptx::SharedAddress full(int stage) const {
    return stages + Shape::kBarriersAt + 8 * stage;
  }
  __device__ __forceinline__ ptx::SharedAddress empty(int stage) const {
    return full(kStages + stage);
  }

  // ---------------------------------------------------------- producer, one thread of its warp

  __device__ __forceinline__ void request_weights(const KvProjectWgmmaParams& p, int stage,
                                                  int tile) const {
    ptx::barrier_arrive_expecting(full(stage), Shape::kWeightBytes);
    ptx::copy_box(weights_at(stage), p.weights, tile * kDepth, blockIdx.y * kHeadDim, blockIdx.z,
                  full(stage));
  }

  __device__ __forceinline__ void request_states(const KvProjectWgmmaParams& p, int stage, int tile,
                                                 int parts) const {
    ptx::barrier_arrive_expecting(full(stage), parts * Shape::kPartBytes);
    const int rank = blockIdx.y % kCluster;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part >= parts) break;
      const int row = blockIdx.x * kTokens + part * kPartTokens + rank * Shape::kShareTokens;
      const ptx::SharedAddress to = states_at(stage, part) + rank * kShareBytes;
      if constexpr (kCluster > 1) {
        ptx::copy_box_to_cluster(to, p.states, tile * kDepth, row, blockIdx.z, full(stage),
                                 (1 << kCluster) - 1);
      } else {
        ptx::copy_box(to, p.states, tile * kDepth, row, blockIdx.z, full(stage));
      }
    }
  }

  __device__ __forceinline__ void request_first_weights(const KvProjectWgmmaParams& p,
                                                        int tiles) const {
    for (int tile = 0; tile < min(kStages, tiles); ++tile) request_weights(p, tile, tile);
  }

  // What does not depend on the kernel before.
  __device__ __forceinline__ void start(const KvProjectWgmmaParams& p, int tiles) const {
    ptx::prefetch_map(p.weights);
    ptx::prefetch_map(p.states);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(full(stage), 2);  // weights and states are announced
      ptx::barrier_init(empty(stage), kCluster * kConsumerWarps);
    }
    ptx::fence_barrier_init();
    if (blockIdx.x > 0) return;
    request_first_weights(p, tiles);
    constexpr int kBoxes = kWeightsAhead / Shape::kWeightBytes;
    for (int tile = kStages; tile < min(kStages + kBoxes, tiles); ++tile) {
      ptx::prefetch_box(p.weights, tile * kDepth, blockIdx.y * kHeadDim, blockIdx.z);
    }
  }

  // No row counts: waits for the weights on their way, which would else land after the block's end.
  __device__ __forceinline__ void drain(int tiles) const {
    for (int stage = 0; stage < min(kStages, tiles); ++stage) {
      ptx::barrier_arrive(full(stage));
      ptx::barrier_wait(full(stage), 0);
    }
  }

  // The states of the first stages, then whole stages as they become empty.
  __device__ __forceinline__ void produce(const KvProjectWgmmaParams& p, int tiles,
                                          int parts) const {
    for (int tile = 0; tile < min(kStages, tiles); ++tile) request_states(p, tile, tile, parts);
    Place place;
    for (int tile = kStages; tile < tiles; ++tile) {
      ptx::barrier_wait(empty(place.stage), place.parity);
      request_weights(p, place.stage, tile);
      request_states(p, place.stage, tile, parts);
      place.advance();
    }
  }

  // ---------------------------------------------------------- consumers

  // Adds the products of all stages. A stage is empty when the products after its own have been
  // issued: those run while this warp waits.
  template <int kUsed>
  __device__ __forceinline__ void consume(int tiles, int warpgroup) {
    const int lane = threadIdx.x % 32;
    ptx::SharedAddress told = 0;  // `empty` of the first stage in the block that this lane tells
    if constexpr (kCluster > 1) told = ptx::cluster_address(empty(0), lane % kCluster);
    const auto release = [&](int stage) {
      if (lane >= kCluster) return;
      if constexpr (kCluster > 1) {
        ptx::barrier_arrive_in_cluster(told + 8 * stage);
      } else {
        ptx::barrier_arrive(empty(stage));
      }
    };
    Place place;
    int before = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      ptx::barrier_wait(full(place.stage), place.parity);
      const uint64_t weights =
          ptx::matrix_descriptor(weights_at(place.stage) + warpgroup * 64 * 2 * kDepth);
      ptx::warpgroup_fence();
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step) {
#pragma unroll
        for (int part = 0; part < kUsed; ++part) {
          const uint64_t states = ptx::matrix_descriptor(states_at(place.stage, part));
          ptx::warpgroup_mma<T, kPartTokens>(sum[part], ptx::columns_further(weights, step),
                                             ptx::columns_further(states, step));
        }
      }
      ptx::warpgroup_commit();
      ptx::warpgroup_wait<1>();
      if (tile > 0) release(before);
      before = place.stage;
      place.advance();
    }
    ptx::warpgroup_wait<0>();
#pragma unroll
    for (int part = 0; part < kUsed; ++part) {
#pragma unroll
      for (int i = 0; i < kPartTokens / 2; ++i) ptx::settle(sum[part][i]);
    }
  }

  // The output tile [token, head_dim]: a row is padded so that a warp's stores, eight rows of the
  // product by eight tokens, meet in no bank; pieces are swapped for the loads.
  static __device__ __forceinline__ int output_place(int column) {
    return column ^ (column / 32 % 2 * 4);
  }

  __device__ __forceinline__ void store_sums(float* output, int tokens) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part * kPartTokens >= tokens) break;
#pragma unroll
      for (int i = 0; i < kPartTokens / 2; ++i) {
        const int token = part * kPartTokens + i / 4 * 8 + lane % 4 * 2 + i % 2;
        const int column = warp * 16 + lane / 4 + i % 4 / 2 * 8;
        output[token * Shape::kOutputStride + output_place(column)] = sum[part][i];
      }
    }
  }

  static __device__ __forceinline__ void sync() {
    __syncthreads();
    if constexpr (kCluster > 1) ptx::cluster_barrier_relaxed();
  }

  __device__ __forceinline__ void run(const KvProjectWgmmaParams& p) {
    DFLARE_DYNAMIC_SHARED_MEMORY(shared_bytes);
    stages = ptx::shared_address(shared_bytes);
    const int first_token = blockIdx.x * kTokens, tiles = ceil_div(p.hidden, kDepth);
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);
    const bool producing = threadIdx.x == Shape::kConsumers;
    if (producing) start(p, tiles);
    sync();  // the barriers are there
    ptx::wait_for_prior_kernels();
    // Where the tokens go is on its way during the products, one load behind the count.
    const auto token_of = [](int i) -> int { return threadIdx.x + i * Shape::kConsumers; };
    int sources[kOwnRows];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const bool exists = token_of(i) < kTokens && first_token + token_of(i) < p.out.num_rows;
      sources[i] = exists ? load_source_row(p.out, first_token + token_of(i)) : 0;
    }
    const int tokens = min(valid_rows(p.out) - first_token, kTokens);
    if (tokens <= 0) {
      if (producing && first_token == 0) drain(tiles);
      return;
    }
    const int parts = ceil_div(tokens, kPartTokens);
    auto* rows = reinterpret_cast<ContextRow*>(shared_bytes + Shape::kRowsAt);
    if (warp == kConsumerWarps) {
      if (producing) {
        if (first_token != 0) request_first_weights(p, tiles);
        produce(p, tiles, parts);
      }
    } else {
      ContextRow own_rows[kOwnRows] = {};
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        if (token_of(i) >= tokens) break;
        own_rows[i] = {p.out.cache_loc[sources[i]], p.out.rope.positions[sources[i]]};
      }
      parts == kParts ? consume<kParts>(tiles, warp / 4) : consume<1>(tiles, warp / 4);
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        if (token_of(i) < tokens) rows[token_of(i)] = own_rows[i];
      }
    }
    sync();  // all products are done, of both: the stages become the output tile
    float* output = reinterpret_cast<float*>(shared_bytes);
    if (warp != kConsumerWarps) store_sums(output, tokens);

    const int head = blockIdx.y, layer = blockIdx.z;
    write_heads<Shape::kConsumers>(
        ContextHead<T, kHeadDim>{p.out, layer, head}, rows, tokens, [&](Row& values, int token) {
          const float* at = output + token * Shape::kOutputStride;
          values.load_with(p.out.rope.rotary, [&](int column) {
            return *reinterpret_cast<const float4*>(at + output_place(column));
          });
        });
  }
};

template <class T, int kHeadDim, int kTokens>
__global__ void __launch_bounds__(KvProjectWgmmaShape<kHeadDim, kTokens>::kThreads, 1)
    kv_project_wgmma_kernel(const __grid_constant__ KvProjectWgmmaParams p) {
  KvProjectWgmma<T, kHeadDim, kTokens>().run(p);
}

template <class T, int kHeadDim, int kTokens>
cudaError_t launch_kv_project_wgmma(const KvProjectWriteParams& params, cudaStream_t stream) {
  using Shape = KvProjectWgmmaShape<kHeadDim, kTokens>;
  KvProjectWgmmaParams p{params, {}, {}};
  const int layers = p.out.num_layers, heads = 2 * p.out.kv_heads;
  cudaError_t error =
      encode_tensor_map(p.weights, p.out.kv_weight, layers, heads * kHeadDim, p.hidden, kHeadDim);
  if (error != cudaSuccess) return error;
  error =
      encode_tensor_map(p.states, p.fused, layers, p.out.num_rows, p.hidden, Shape::kShareTokens);
  if (error != cudaSuccess) return error;
  const dim3 grid(ceil_div(p.out.num_rows, kTokens), heads, layers);
  return launch(kv_project_wgmma_kernel<T, kHeadDim, kTokens>, grid, Shape::kThreads,
                Shape::kSharedBytes, p.overlap_launch, p, stream, dim3(1, Shape::kCluster));
}

template <class T, int kHeadDim>
cudaError_t run_kv_project_wgmma(const KvProjectWriteParams& p, cudaStream_t stream) {
  const int rows = expected_valid_rows(p.out.num_rows, p.out.compact_rows != nullptr);
  switch (kv_project_wgmma_tokens(rows, kHeadDim)) {
    case 16: return launch_kv_project_wgmma<T, kHeadDim, 16>(p, stream);
    case 64: return launch_kv_project_wgmma<T, kHeadDim, 64>(p, stream);
    default: return launch_kv_project_wgmma<T, kHeadDim, kHeadDim == 256 ? 128 : 256>(p, stream);
  }
}

}  // namespace dflare
