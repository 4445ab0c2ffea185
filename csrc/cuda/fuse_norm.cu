// fuse_norm: for one token, all layers' convex combinations of its taps, each RMS normalised
// (DFlare, arXiv 2606.02091, section 3).
//
// A block owns one token and up to kLayers layers. Thread i holds elements 8i .. 8i+7 of the hidden
// size: it reads them of every tap once (16 bytes a load) and keeps one fp32 sum a layer, so the
// taps cross memory once and no intermediate exists. The blocks release the projection kernel at
// once: that one spends the time on prefetching weights, and its wait for this kernel covers the
// one before, because this kernel waits for that.
#include "launch.cuh"
#include "params.h"
#include "ptx.cuh"

namespace dflare {
namespace {

// Valid rows before row n: those of the blocks before n's, then n's own index. A whole warp takes
// part; `blocks` is the number of blocks to count.
__device__ __forceinline__ int count_committed(const int32_t* commit_lens, int blocks,
                                               int block_size) {
  int count = 0;
  for (int b = threadIdx.x % 32; b < blocks; b += 32) {
    count += min(max(commit_lens[b], 0), block_size);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) count += __shfl_xor_sync(0xffffffffu, count, lanes);
  return count;
}

template <int kLayers>
struct FuseNormShared {
  float probs[kMaxTaps][kLayers];
  float sums[32][kLayers];  // per warp
  int row;
};
static_assert(sizeof(FuseNormShared<4>) == fuse_norm_shared_bytes(4));

template <class T, int kLayers>
__global__ void __launch_bounds__(kLayers == 8 ? 512 : 1024)
    fuse_norm_kernel(const __grid_constant__ FuseNormParams p) {
  ptx::launch_dependents();
  ptx::wait_for_prior_kernels();
  DFLARE_DYNAMIC_SHARED_MEMORY(shared_bytes);
  auto& shared = *reinterpret_cast<FuseNormShared<kLayers>*>(shared_bytes);
  const int n = blockIdx.x, first_layer = blockIdx.y * kLayers;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;

  int row = n;
  if (p.commit_lens != nullptr) {
    if (n == 0 && first_layer == 0 && warp == 0) {
      const int total = count_committed(p.commit_lens, p.num_rows / p.block_size, p.block_size);
      if (threadIdx.x == 0) p.compact_rows[0] = total;
    }
    const int request = n / p.block_size, index = n % p.block_size;
    if (index >= p.commit_lens[request]) return;
    if (warp == 0) {
      const int before = count_committed(p.commit_lens, request, p.block_size);
      if (threadIdx.x == 0) {
        shared.row = before + index;
        if (first_layer == 0) p.compact_rows[1 + before + index] = n;
      }
    }
  }
  for (int i = threadIdx.x; i < p.num_taps * kLayers; i += blockDim.x) {
    const int tap = i / kLayers, layer = first_layer + i % kLayers;
    shared.probs[tap][i % kLayers] =
        layer < p.num_layers ? p.probs[layer * p.num_taps + tap] : 0.0f;
  }
  __syncthreads();
  if (p.commit_lens != nullptr) row = shared.row;

  const int column = threadIdx.x * 8;
  const bool active = column < p.hidden;
  const T* token = static_cast<const T*>(p.target_hidden) + n * p.target_hidden_stride;
  float sum[kLayers][8] = {};
  if (active) {
#pragma unroll(kLayers == 8 ? 4 : 2)
    for (int tap = 0; tap < p.num_taps; ++tap) {
      const uint4 packed =
          *reinterpret_cast<const uint4*>(token + int64_t{tap} * p.hidden + column);
      const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 h = ptx::unpack<T>(words[w]);
#pragma unroll
        for (int layer = 0; layer < kLayers; ++layer) {
          sum[layer][2 * w] += shared.probs[tap][layer] * h.x;
          sum[layer][2 * w + 1] += shared.probs[tap][layer] * h.y;
        }
      }
    }
  }

#pragma unroll
  for (int layer = 0; layer < kLayers; ++layer) {
    float square = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) square += sum[layer][i] * sum[layer][i];
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      square += __shfl_xor_sync(0xffffffffu, square, lanes);
    }
    if (threadIdx.x % 32 == 0) shared.sums[warp][layer] = square;
  }
  __syncthreads();
  if (!active) return;

  float weight[8];
  const uint4 packed =
      *reinterpret_cast<const uint4*>(static_cast<const T*>(p.norm_weight) + column);
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float2 pair = ptx::unpack<T>(words[w]);
    weight[2 * w] = pair.x, weight[2 * w + 1] = pair.y;
  }
#pragma unroll
  for (int layer = 0; layer < kLayers; ++layer) {
    if (first_layer + layer >= p.num_layers) break;
    float square = 0;
    for (int w = 0; w < warps; ++w) square += shared.sums[w][layer];
    const float inverse = ptx::rsqrt(square / p.hidden + p.eps);
    uint32_t out[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      out[w] = ptx::pack<T>(sum[layer][2 * w] * inverse * weight[2 * w],
                            sum[layer][2 * w + 1] * inverse * weight[2 * w + 1]);
    }
    T* fused = static_cast<T*>(p.fused) +
               (int64_t{first_layer + layer} * p.num_rows + row) * p.hidden + column;
    *reinterpret_cast<uint4*>(fused) = make_uint4(out[0], out[1], out[2], out[3]);
  }
}

template <class T>
cudaError_t run(const FuseNormParams& p, cudaStream_t stream) {
  const int layers = fuse_norm_layers_per_block(p.num_layers, p.hidden);
  const dim3 grid(p.num_rows, ceil_div(p.num_layers, layers));
  const int threads = ceil_div(p.hidden / 8, 32) * 32;
  const int shared_bytes = fuse_norm_shared_bytes(layers);
  const auto kernel = layers == 8 ? fuse_norm_kernel<T, 8> : fuse_norm_kernel<T, 4>;
  return launch(kernel, grid, threads, shared_bytes, p.overlap_launch, p, stream);
}

}  // namespace

cudaError_t run_fuse_norm(const FuseNormParams& params, cudaStream_t stream) {
  return params.element == ElementType::kBf16 ? run<Bf16>(params, stream)
                                              : run<Fp16>(params, stream);
}

}  // namespace dflare
