#include "../block_attention.cuh"

namespace dflare {
template cudaError_t run_block_attention<Bf16, 128>(const BlockAttentionParams&, cudaStream_t);
}  // namespace dflare
