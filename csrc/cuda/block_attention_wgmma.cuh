// block_attention for 65 to 128 query rows a KV head at head_dim 128, by the products that sm_90a
// alone has: block_attention.cuh with another tile (attention_wgmma_tile.cuh).
#pragma once

#include "attention_wgmma_tile.cuh"
#include "block_attention.cuh"

namespace dflare {

template <class T, int kHeadDim, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1)
    block_attention_wgmma_kernel(const __grid_constant__ BlockAttentionParams p) {
  DFLARE_DYNAMIC_SHARED_MEMORY(shared_bytes);
  attend_to_block_and_context<T, kHeadDim, kWarps, AttentionWgmmaTile<T, kHeadDim, kWarps>>(
      p, reinterpret_cast<T*>(shared_bytes));
}

template <class T, int kHeadDim>
cudaError_t run_block_attention_wgmma(const BlockAttentionParams& p, cudaStream_t stream) {
  constexpr int kWarps = 8;
  const dim3 grid(p.plan.row_tiles, p.kv_heads, p.plan.max_items);
  return launch(block_attention_wgmma_kernel<T, kHeadDim, kWarps>, grid, 32 * kWarps,
                kAttentionWgmmaSharedBytes, p.overlap_launch, p, stream,
                dim3(1, 1, p.plan.cluster));
}

}  // namespace dflare
