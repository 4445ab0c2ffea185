#include "../block_attention_wgmma.cuh"

namespace dflare {
template cudaError_t run_block_attention_wgmma<Fp16, 128>(const BlockAttentionParams&,
                                                          cudaStream_t);
}  // namespace dflare
