// kv_project_write: projection of the fused states to context K and V, K norm, RoPE and pool write,
// for few rows.
//
// A block owns one (layer, head, K or V) and a tile of kTokens tokens: out[tokens, head_dim] =
// fused[tokens, hidden] x weight[head_dim, hidden]^T. It therefore sees whole heads, which is what
// K norm and RoPE need, and K/V never exist outside of shared memory and the pool.
//
// The hidden size streams through kStages shared-memory stages of kDepth elements:
//
//   stage: [ weight rows: head_dim x kDepth | fused rows: kTokens x kDepth ]   swizzled (tile.cuh)
//
// The weights are all of the traffic at small batch and do not depend on the kernel before, so the
// stages' weights are requested before waiting for fuse_norm (programmatic dependent launch).
// Token tiles of one head are neighbours in the grid: the weights cross memory once and the other
// tiles find them in L2. Weights are requested early for the first tile only, because later ones
// may turn out to hold no valid row.
#pragma once

#include "context_kv_output.cuh"
#include "launch.cuh"
#include "tile.cuh"

namespace dflare {

template <class T, int kHeadDim, int kTokens>
struct KvProjectWrite {
  using Shape = KvProjectShape<kHeadDim, kTokens>;
  using Row = HeadRow<kHeadDim>;
  static constexpr int kDepth = Shape::kDepth, kStages = Shape::kStages;
  static constexpr int kThreads = Shape::kThreads;
  static constexpr int kStageElements = Shape::kStageBytes / 2;
  // What one warp multiplies.
  static constexpr int kWarpTokens = kTokens / Shape::kTokenWarps;
  static constexpr int kWarpColumns = kHeadDim / Shape::kHeadWarps;
  static_assert(kWarpTokens % 16 == 0 && kWarpColumns % 16 == 0, "whole mma tiles a warp");
  static_assert(kStages >= 2, "one stage to read, one to fill");

  // Requests rows [0, kRows) x columns [column, column + kDepth) of a row-major matrix; rows from
  // valid_rows and columns from `columns` on become zeros.
  template <int kRows>
  static __device__ __forceinline__ void load_stage(T* tile, const T* matrix, int valid_rows,
                                                    int column, int columns) {
    constexpr int kChunks = kDepth / 8;
#pragma unroll
    for (int i = 0; i < ceil_div(kRows * kChunks, kThreads); ++i) {
      const int chunk = i * kThreads + threadIdx.x;
      const int row = chunk / kChunks, c = chunk % kChunks * 8;
      if (kRows * kChunks % kThreads != 0 && row >= kRows) break;
      const bool valid = row < valid_rows && column + c < columns;
      const T* source = valid ? matrix + int64_t{row} * columns + column + c : matrix;
      ptx::cp_async_16(tile + tile_offset<kDepth>(row, c), source, valid);
    }
  }

  static __device__ __forceinline__ void run(const KvProjectWriteParams& p) {
    DFLARE_DYNAMIC_SHARED_MEMORY(shared_bytes);
    T* stages = reinterpret_cast<T*>(shared_bytes);
    const int first_token = blockIdx.x * kTokens, head = blockIdx.y, layer = blockIdx.z;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int token_base = warp / Shape::kHeadWarps * kWarpTokens;
    const int column_base = warp % Shape::kHeadWarps * kWarpColumns;
    const int depth_tiles = ceil_div(p.hidden, kDepth);

    const T* weight = static_cast<const T*>(p.kv_weight) +
                      (int64_t{layer} * 2 * p.out.kv_heads + head) * kHeadDim * p.hidden;
    const auto load_weight = [&](int tile) {
      load_stage<kHeadDim>(stages + tile % kStages * kStageElements, weight, kHeadDim,
                           tile * kDepth, p.hidden);
    };
    const auto load_first_weights = [&] {
      for (int tile = 0; tile < kStages - 1 && tile < depth_tiles; ++tile) load_weight(tile);
    };

    if (first_token == 0) load_first_weights();
    ptx::wait_for_prior_kernels();
    const int tokens = min(valid_rows(p.out) - first_token, kTokens);
    if (tokens <= 0) {
      ptx::cp_async_wait<0>();
      return;
    }
    if (first_token != 0) load_first_weights();

    const T* fused =
        static_cast<const T*>(p.fused) + (int64_t{layer} * p.out.num_rows + first_token) * p.hidden;
    const auto load_fused = [&](int tile) {
      load_stage<kTokens>(stages + tile % kStages * kStageElements + kHeadDim * kDepth, fused,
                          tokens, tile * kDepth, p.hidden);
    };
    for (int tile = 0; tile < kStages - 1; ++tile) {
      if (tile < depth_tiles) load_fused(tile);
      ptx::cp_async_commit();
    }

    float sum[kWarpTokens / 16][kWarpColumns / 8][4] = {};
    for (int tile = 0; tile < depth_tiles; ++tile) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // the stage has arrived, and nobody reads the one that is refilled next
      const int next = tile + kStages - 1;
      if (next < depth_tiles) {
        load_weight(next);
        load_fused(next);
      }
      ptx::cp_async_commit();
      if (token_base >= tokens) continue;
      const T* weights = stages + tile % kStages * kStageElements;
      const T* states = weights + kHeadDim * kDepth;
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        uint32_t a[kWarpTokens / 16][4];
#pragma unroll
        for (int i = 0; i < kWarpTokens / 16; ++i) {
          load_fragment_a<kDepth>(a[i], states, token_base + i * 16, k);
        }
#pragma unroll
        for (int j = 0; j < kWarpColumns / 16; ++j) {
          uint32_t b[4];
          load_fragments_b<kDepth>(b, weights, column_base + j * 16, k);
#pragma unroll
          for (int i = 0; i < kWarpTokens / 16; ++i) {
            ptx::mma_m16n8k16<T>(sum[i][2 * j], a[i], b[0], b[1]);
            ptx::mma_m16n8k16<T>(sum[i][2 * j + 1], a[i], b[2], b[3]);
          }
        }
      }
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // the stages become the output tile

    float* output = reinterpret_cast<float*>(shared_bytes);
    constexpr int kStride = Shape::kOutputStride;
#pragma unroll
    for (int i = 0; i < kWarpTokens / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpColumns / 8; ++j) {
        float* at = output + (token_base + i * 16 + lane / 4) * kStride + column_base + j * 8 +
                    lane % 4 * 2;
        *reinterpret_cast<float2*>(at) = make_float2(sum[i][j][0], sum[i][j][1]);
        *reinterpret_cast<float2*>(at + 8 * kStride) = make_float2(sum[i][j][2], sum[i][j][3]);
      }
    }
    __syncthreads();

    constexpr int kRowsPerPass = kThreads / Row::kLanes;
    for (int base = 0; base < tokens; base += kRowsPerPass) {
      const int token = base + threadIdx.x / Row::kLanes;
      const bool valid = token < tokens;
      const float* source = output + (valid ? token : 0) * kStride;
      Row values;
      values.load(p.out.rotary, source);
      ContextHead<T, kHeadDim>{p.out, layer, head}.write(values, first_token + token, valid);
    }
  }
};

template <class T, int kHeadDim, int kTokens>
__global__ void __launch_bounds__(KvProjectShape<kHeadDim, kTokens>::kThreads, 2)
    kv_project_write_kernel(const __grid_constant__ KvProjectWriteParams p) {
  KvProjectWrite<T, kHeadDim, kTokens>::run(p);
}

template <class T, int kHeadDim, int kTokens>
cudaError_t launch_kv_project_write(const KvProjectWriteParams& p, cudaStream_t stream) {
  using Shape = KvProjectShape<kHeadDim, kTokens>;
  const dim3 grid(ceil_div(p.out.num_rows, kTokens), 2 * p.out.kv_heads, p.out.num_layers);
  return launch(kv_project_write_kernel<T, kHeadDim, kTokens>, grid, Shape::kThreads,
                Shape::kSharedBytes, p.overlap_launch, p, stream);
}

template <class T, int kHeadDim>
cudaError_t run_kv_project_write(const KvProjectWriteParams& p, cudaStream_t stream) {
  switch (kv_project_tokens(p.out.num_rows, kHeadDim)) {
    case 16: return launch_kv_project_write<T, kHeadDim, 16>(p, stream);
    case 64: return launch_kv_project_write<T, kHeadDim, 64>(p, stream);
    default:
      if constexpr (kHeadDim <= 128) return launch_kv_project_write<T, kHeadDim, 128>(p, stream);
      return cudaErrorInvalidValue;
  }
}

}  // namespace dflare
