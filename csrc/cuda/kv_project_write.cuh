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
// The weights are all of the traffic at small batch and do not depend on the kernel before, so
// before waiting for fuse_norm (programmatic dependent launch) the stages' weights are requested
// and the next kWeightsAhead bytes of them brought into L2. Token tiles of one head are neighbours
// in the grid: the weights cross memory once and the other tiles find them in L2. Weights are
// requested early for the first tile only, because later ones may turn out to hold no valid row.
//
// Every address of the main loop is one that a thread computed before it, plus the stage's: see
// FragmentLane (tile.cuh) for the reads; a thread copies the same 16-byte column of rows kRowStep
// apart, so that the swizzle of all its places is the same.
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
  static constexpr int kRowBytes = 2 * kDepth, kWeightBytes = kHeadDim * kRowBytes;
  static constexpr int kChunks = kDepth / 8, kRowStep = kThreads / kChunks;
  static constexpr int kWeightsAhead = 160 * 1024;
  // What one warp multiplies.
  static constexpr int kWarpTokens = kTokens / Shape::kTokenWarps;
  static constexpr int kWarpColumns = kHeadDim / Shape::kHeadWarps;
  static constexpr int kWarpSteps = kDepth / 16 / Shape::kDepthWarps;
  static_assert(kWarpTokens % 16 == 0 && kWarpColumns % 16 == 0, "whole mma tiles a warp");
  static_assert(kStages >= 2, "one stage to read, one to fill");
  static_assert(kRowStep % 8 == 0 && kHeadDim % kRowStep == 0, "one swizzle a thread");
  static_assert(Shape::kSharedBytes <= 99 * 1024, "fits every supported part");

  // The 16-byte pieces of a stage that this thread copies: column `chunk` of rows row + i *
  // kRowStep.
  struct Copier {
    int row = static_cast<int>(ptx::keep(threadIdx.x / kChunks));
    int chunk = threadIdx.x % kChunks;
    uint32_t place = ptx::keep(2u * tile_offset<kDepth>(row, chunk * 8));
    int64_t step = 0;  // elements from one of its rows to the next
    // Its first row, at the next stage to be requested.
    const T *weight = nullptr, *fused = nullptr;

    __device__ __forceinline__ void load_weight(ptx::SharedAddress stage, bool valid) const {
#pragma unroll
      for (int i = 0; i < kHeadDim / kRowStep; ++i) {
        ptx::cp_async_16(stage + place + i * kRowStep * kRowBytes, weight + i * step, valid);
      }
    }

    // Rows from `tokens` on become zeros.
    __device__ __forceinline__ void load_fused(ptx::SharedAddress stage, int tokens,
                                               bool valid) const {
      const int rows_left = valid ? tokens - row : 0;
#pragma unroll
      for (int i = 0; i < ceil_div(kTokens, kRowStep); ++i) {
        if (kTokens % kRowStep != 0 && row >= kTokens) break;
        ptx::cp_async_16(stage + kWeightBytes + place + i * kRowStep * kRowBytes, fused + i * step,
                         i * kRowStep < rows_left);
      }
    }
  };

  float sum[kWarpTokens / 16][kWarpColumns / 8][4] = {};

  struct Fragments {
    uint32_t a[kWarpTokens / 16][4], b[kWarpColumns / 16][4];
  };

  static __device__ __forceinline__ void load(Fragments& f, ptx::SharedAddress states,
                                              ptx::SharedAddress weights) {
#pragma unroll
    for (int i = 0; i < kWarpTokens / 16; ++i) load_fragment_a(f.a[i], states + i * 16 * kRowBytes);
#pragma unroll
    for (int j = 0; j < kWarpColumns / 16; ++j) {
      load_fragments_b(f.b[j], weights + j * 16 * kRowBytes);
    }
  }

  // Adds the product of one stage. copy() requests the next one: behind the first fragments, which
  // the products wait for and the copies would keep from the port to shared memory.
  template <class Copy>
  __device__ __forceinline__ void multiply(ptx::SharedAddress states, ptx::SharedAddress weights,
                                           Copy copy) {
#pragma unroll
    for (int k = 0; k < kWarpSteps; ++k) {
      Fragments f;
      load(f, states ^ k * 32u, weights ^ k * 32u);
      if (k == 0) copy();
#pragma unroll
      for (int j = 0; j < kWarpColumns / 16; ++j) {
#pragma unroll
        for (int i = 0; i < kWarpTokens / 16; ++i) {
          ptx::mma_m16n8k16<T>(sum[i][2 * j], f.a[i], f.b[j][0], f.b[j][1]);
          ptx::mma_m16n8k16<T>(sum[i][2 * j + 1], f.a[i], f.b[j][2], f.b[j][3]);
        }
      }
    }
  }

  // The output tile's 16-byte pieces are swapped in pairs in the upper half of each 64 columns, so
  // that the lanes of a head, which read every other piece, do not meet in a bank.
  static __device__ __forceinline__ int output_place(int column) {
    return column ^ (column / 32 % 2 * 4);
  }

  // What this warp multiplies, and where its lanes read it within a stage.
  struct WarpPlace {
    int depth_warp, token_base, column_base;
    uint32_t states_at, weights_at;
  };

  static __device__ __forceinline__ WarpPlace warp_place() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = warp / Shape::kDepthWarps;
    const int depth_warp = warp % Shape::kDepthWarps, first_step = depth_warp * kWarpSteps;
    const int token_base = tile / Shape::kHeadWarps * kWarpTokens;
    const int column_base = tile % Shape::kHeadWarps * kWarpColumns;
    const auto states_at =
        kWeightBytes + token_base * kRowBytes + FragmentLane<kDepth>::down(lane).at(0, first_step);
    const auto weights_at =
        column_base * kRowBytes + FragmentLane<kDepth>::across(lane).at(0, first_step);
    return {depth_warp, token_base, column_base, static_cast<uint32_t>(states_at),
            static_cast<uint32_t>(weights_at)};
  }

  // The main loop stands here: in a function of its own it takes two integer instructions a tile
  // more on three of four architectures (csrc/gates).
  __device__ __forceinline__ void run(const KvProjectWriteParams& p) {
    DFLARE_DYNAMIC_SHARED_MEMORY(shared_bytes);
    const ptx::SharedAddress stages = ptx::shared_address(shared_bytes);
    const ptx::SharedAddress stages_end = stages + Shape::kPipelineBytes;
    const int first_token = blockIdx.x * kTokens, head = blockIdx.y, layer = blockIdx.z;
    const int depth_tiles = ceil_div(p.hidden, kDepth);

    const T* head_weight = static_cast<const T*>(p.out.kv_weight) +
                           (int64_t{layer} * 2 * p.out.kv_heads + head) * kHeadDim * p.hidden;
    Copier copier;
    copier.step = int64_t{kRowStep} * p.hidden;
    const int64_t first_piece = int64_t{copier.row} * p.hidden + copier.chunk * 8;
    const auto load_first_weights = [&] {
      copier.weight = head_weight + first_piece;
      for (int tile = 0; tile < kStages - 1 && tile < depth_tiles; ++tile) {
        copier.load_weight(stages + tile * Shape::kStageBytes,
                           tile * kDepth + copier.chunk * 8 < p.hidden);
        copier.weight += kDepth;
      }
    };

    if (first_token == 0) {
      load_first_weights();
      prefetch_weights(head_weight, p.hidden);
    }
    ptx::wait_for_prior_kernels();
    const int tokens = min(valid_rows(p.out) - first_token, kTokens);
    // Which row a token was comes at the same time as how many count.
    const int own = first_token + static_cast<int>(threadIdx.x);
    const bool exists = static_cast<int>(threadIdx.x) < kTokens && own < p.out.num_rows;
    const int source = exists ? load_source_row(p.out, own) : 0;
    if (tokens <= 0) {
      ptx::cp_async_wait<0>();
      return;
    }
    if (first_token != 0) load_first_weights();

    copier.fused = static_cast<const T*>(p.fused) +
                   (int64_t{layer} * p.out.num_rows + first_token) * p.hidden + first_piece;
    load_first_states(copier, stages, tokens, p.hidden);
    // Where the tokens go, while the first stages arrive; read after the loop's barriers.
    auto* rows = reinterpret_cast<ContextRow*>(shared_bytes + Shape::kRowsAt);
    if (static_cast<int>(threadIdx.x) < tokens) {
      rows[threadIdx.x] = {p.out.cache_loc[source], p.out.rope.positions[source]};
    }

    const WarpPlace place = warp_place();
    const uint32_t states_at = ptx::keep(place.states_at), weights_at = ptx::keep(place.weights_at);
    // This warp's rows that count; the loop of a warp without any only copies.
    const int warp_rows = static_cast<int>(ptx::keep(max(tokens - place.token_base, 0)));
    ptx::SharedAddress read = stages, write = stages + (kStages - 1) * Shape::kStageBytes;
    int columns_left = p.hidden - copier.chunk * 8 - (kStages - 1) * kDepth;
    for (int tile = 0; tile < depth_tiles; ++tile) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // the stage has arrived, and nobody reads the one that is refilled next
      const auto copy_next = [&] {
        if (tile + kStages - 1 < depth_tiles) {
          copier.load_weight(write, columns_left > 0);
          copier.load_fused(write, tokens, columns_left > 0);
          copier.weight += kDepth, copier.fused += kDepth, columns_left -= kDepth;
        }
        ptx::cp_async_commit();
      };
      if (warp_rows > 0) {
        multiply(read + states_at, read + weights_at, copy_next);
      } else {
        copy_next();
      }
      write = read;  // the stage just read is the next to be filled
      read += Shape::kStageBytes;
      if (read == stages_end) read = stages;
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // the stages become the output tile
    float* output = reinterpret_cast<float*>(shared_bytes);
    store_sums(output + (place.depth_warp * kTokens + place.token_base) * Shape::kOutputStride,
               place.column_base);

    write_heads<kThreads>(
        ContextHead<T, kHeadDim>{p.out, layer, head}, rows, tokens, [&](Row& values, int token) {
          load_sums(values, output + token * Shape::kOutputStride, p.out.rope.rotary);
        });
  }

  // Requests the states of the first kStages - 1 stages and closes a group a stage; the first group
  // also holds the weights of all of them.
  static __device__ __forceinline__ void load_first_states(Copier& copier,
                                                           ptx::SharedAddress stages, int tokens,
                                                           int hidden) {
    const int depth_tiles = ceil_div(hidden, kDepth);
    for (int tile = 0; tile < kStages - 1; ++tile) {
      if (tile < depth_tiles) {
        copier.load_fused(stages + tile * Shape::kStageBytes, tokens,
                          tile * kDepth + copier.chunk * 8 < hidden);
        copier.fused += kDepth;
      }
      ptx::cp_async_commit();
    }
  }

  // Brings the columns after the first stages' into L2, the same run of each row.
  static __device__ __forceinline__ void prefetch_weights(const T* head_weight, int hidden) {
    constexpr int kFirst = (kStages - 1) * kDepth, kAhead = kWeightsAhead / 2 / kHeadDim;
    const int columns = min(hidden - kFirst, kAhead);
    for (int row = threadIdx.x; columns > 0 && row < kHeadDim; row += kThreads) {
      ptx::prefetch_to_l2(head_weight + int64_t{row} * hidden + kFirst, 2 * columns);
    }
  }

  __device__ __forceinline__ void store_sums(float* output, int column_base) const {
    constexpr int kStride = Shape::kOutputStride;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kWarpTokens / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpColumns / 8; ++j) {
        float* at = output + (i * 16 + lane / 4) * kStride +
                    output_place(column_base + j * 8 + lane % 4 * 2);
        *reinterpret_cast<float2*>(at) = make_float2(sum[i][j][0], sum[i][j][1]);
        *reinterpret_cast<float2*>(at + 8 * kStride) = make_float2(sum[i][j][2], sum[i][j][3]);
      }
    }
  }

  // One token's head: the sum over the depth warps.
  static __device__ __forceinline__ void load_sums(Row& values, const float* output, int rotary) {
    values.load_with(rotary, [&](int column) {
      float4 total = *reinterpret_cast<const float4*>(output + output_place(column));
#pragma unroll
      for (int d = 1; d < Shape::kDepthWarps; ++d) {
        const float4 part = *reinterpret_cast<const float4*>(
            output + d * kTokens * Shape::kOutputStride + output_place(column));
        total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
      }
      return total;
    });
  }
};

template <class T, int kHeadDim, int kTokens>
__global__ void __launch_bounds__(KvProjectShape<kHeadDim, kTokens>::kThreads, 2)
    kv_project_write_kernel(const __grid_constant__ KvProjectWriteParams p) {
  KvProjectWrite<T, kHeadDim, kTokens>().run(p);
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
  const int rows = expected_valid_rows(p.out.num_rows, p.out.compact_rows != nullptr);
  switch (kv_project_tokens(rows, kHeadDim)) {
    case 16: return launch_kv_project_write<T, kHeadDim, 16>(p, stream);
    case 64: return launch_kv_project_write<T, kHeadDim, 64>(p, stream);
    default:
      if constexpr (kHeadDim <= 128) return launch_kv_project_write<T, kHeadDim, 128>(p, stream);
      return cudaErrorInvalidValue;
  }
}

}  // namespace dflare
