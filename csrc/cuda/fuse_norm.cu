// fuse_norm: for one token, all layers' convex combinations of its taps, each RMS normalised
// (DFlare, arXiv 2606.02091, section 3).
//
// A block owns one token and up to kLayers layers. Thread i holds elements 8i .. 8i+7 of the hidden
// size: it copies them of every tap once (16 bytes a copy), kTapsInFlight taps ahead of the sums,
// and keeps one fp32 sum a layer, so the taps cross memory once and no intermediate exists. A
// thread reads what it copied itself: there is one barrier for the probabilities and one for the
// norm.
//
// The parameters are loaded before the wait for the kernel before. After it, a write depends on two
// loads in a row: the committed lengths, then the taps. In a prompt each block also brings the taps
// of tokens that later blocks will take into L2. The blocks release the projection kernel at once:
// that one spends the time on prefetching weights, and its wait for this kernel covers the one
// before, because this kernel waits for that.
#include "launch.cuh"
#include "params.h"
#include "ptx.cuh"

namespace dflare {
namespace {

constexpr int kTokensAhead = 2;  // that a block of a prompt brings into L2

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

__device__ __forceinline__ void write_total(const FuseNormParams& p) {
  const int total = count_committed(p.commit_lens, p.num_rows / p.block_size, p.block_size);
  if (threadIdx.x == 0) p.compact_rows[0] = total;
}

template <int kLayers>
struct FuseNormShared {
  float probs[kMaxTaps][kLayers];
  float sums[32][kLayers];  // per warp
  int row;
  int unused[3];  // the taps behind are aligned to 16 bytes
};
static_assert(sizeof(FuseNormShared<4>) == fuse_norm_shared_bytes(4, 0));

template <class T>
__device__ __forceinline__ void unpack8(uint4 packed, float (&x)[8]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float2 pair = ptx::unpack<T>(words[w]);
    x[2 * w] = pair.x, x[2 * w + 1] = pair.y;
  }
}

template <class T, int kLayers, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    fuse_norm_kernel(const __grid_constant__ FuseNormParams p) {
  constexpr int kTapsInFlight = fuse_norm_taps_in_flight(kLayers);
  ptx::launch_dependents();
  DFLARE_DYNAMIC_SHARED_MEMORY(shared_bytes);
  auto& shared = *reinterpret_cast<FuseNormShared<kLayers>*>(shared_bytes);
  const int n = blockIdx.x, first_layer = blockIdx.y * kLayers;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int column = threadIdx.x * 8;
  const bool active = column < p.hidden;

  for (int i = threadIdx.x; i < p.num_taps * kLayers; i += blockDim.x) {
    const int tap = i / kLayers, layer = first_layer + i % kLayers;
    shared.probs[tap][i % kLayers] =
        layer < p.num_layers ? p.fusion_probs[layer * p.num_taps + tap] : 0.0f;
  }
  const uint4 packed_weight =
      *reinterpret_cast<const uint4*>(static_cast<const T*>(p.norm_weight) + (active ? column : 0));
  ptx::wait_for_prior_kernels();

  const int request = p.commit_lens != nullptr ? n / p.block_size : 0;
  const int index = n - request * p.block_size;
  const bool writes_total = n == 0 && first_layer == 0 && warp == 0;
  if (p.commit_lens != nullptr) {
    if (index >= p.commit_lens[request]) {
      if (writes_total) write_total(p);
      return;
    }
  }
  const T* token = static_cast<const T*>(p.target_hidden) + n * p.target_hidden_stride + column;
  uint4* const taps = reinterpret_cast<uint4*>(shared_bytes + sizeof(shared)) + threadIdx.x;
  const auto request_tap = [&](int tap) {
    if (active && tap < p.num_taps) {
      ptx::cp_async_16(ptx::shared_address(taps + tap % kTapsInFlight * blockDim.x),
                       token + int64_t{tap} * p.hidden, true);
    }
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int tap = 0; tap < kTapsInFlight; ++tap) request_tap(tap);
  if (p.commit_lens == nullptr) {
    if (threadIdx.x < kTokensAhead) {
      const int64_t ahead = n + int64_t{p.tokens_ahead} * (threadIdx.x + 1);
      if (p.tokens_ahead > 0 && ahead < p.num_rows && first_layer == 0) {
        ptx::prefetch_to_l2(static_cast<const T*>(p.target_hidden) + ahead * p.target_hidden_stride,
                            2 * p.num_taps * p.hidden);
      }
    }
  } else if (warp == 0) {
    if (writes_total) write_total(p);
    const int before = count_committed(p.commit_lens, request, p.block_size);
    if (threadIdx.x == 0) {
      shared.row = before + index;
      if (first_layer == 0) p.compact_rows[1 + before + index] = n;
    }
  }
  __syncthreads();  // probabilities and row
  const int row = p.commit_lens != nullptr ? shared.row : n;

  float sum[kLayers][8] = {};
#pragma unroll 1
  for (int tap = 0; tap < p.num_taps; ++tap) {
    ptx::cp_async_wait<kTapsInFlight - 1>();
    float h[8];
    if (active) unpack8<T>(taps[tap % kTapsInFlight * blockDim.x], h);
    request_tap(tap + kTapsInFlight);
    if (!active) continue;
#pragma unroll
    for (int layer = 0; layer < kLayers; ++layer) {
      const float prob = shared.probs[tap][layer];
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[layer][i] += prob * h[i];
    }
  }
  ptx::cp_async_wait<0>();

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
  unpack8<T>(packed_weight, weight);
  const float inverse_hidden = 1.0f / p.hidden;
#pragma unroll
  for (int layer = 0; layer < kLayers; ++layer) {
    if (first_layer + layer >= p.num_layers) break;
    float square = 0;
    for (int w = 0; w < warps; ++w) square += shared.sums[w][layer];
    const float inverse = ptx::rsqrt(square * inverse_hidden + p.eps);
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
  const int shared_bytes = fuse_norm_shared_bytes(layers, threads);
  const auto kernel = layers == 4     ? fuse_norm_kernel<T, 4, 1024, 1>
                      : threads > 320 ? fuse_norm_kernel<T, 8, 512, 1>
                                      : fuse_norm_kernel<T, 8, 320, 2>;
  return launch(kernel, grid, threads, shared_bytes, p.overlap_launch, p, stream);
}

}  // namespace

cudaError_t run_fuse_norm(const FuseNormParams& params, cudaStream_t stream) {
  return params.element == ElementType::kBf16 ? run<Bf16>(params, stream)
                                              : run<Fp16>(params, stream);
}

}  // namespace dflare
