// From the element type and head size of a call to the translation unit that was compiled for them
// (csrc/cuda/instantiations).
#include "params.h"

namespace dflare {

template <class T, int kHeadDim>
cudaError_t run_kv_project_write(const KvProjectWriteParams& params, cudaStream_t stream);

template <class T, int kHeadDim>
cudaError_t run_kv_project_wgmma(const KvProjectWriteParams& params, cudaStream_t stream);

template <class T, int kHeadDim>
cudaError_t run_block_attention(const BlockAttentionParams& params, cudaStream_t stream);

template <class T, int kHeadDim>
cudaError_t run_block_attention_wgmma(const BlockAttentionParams& params, cudaStream_t stream);

namespace {

template <class Run>
cudaError_t dispatch(ElementType element, int head_dim, Run run) {
  const bool bf16 = element == ElementType::kBf16;
  switch (head_dim) {
    case 64:
      return bf16 ? run.template operator()<Bf16, 64>() : run.template operator()<Fp16, 64>();
    case 128:
      return bf16 ? run.template operator()<Bf16, 128>() : run.template operator()<Fp16, 128>();
    case 256:
      return bf16 ? run.template operator()<Bf16, 256>() : run.template operator()<Fp16, 256>();
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t run_kv_project_write(const KvProjectWriteParams& params, cudaStream_t stream) {
  return dispatch(params.element, params.head_dim, [&]<class T, int kHeadDim>() {
    return run_kv_project_write<T, kHeadDim>(params, stream);
  });
}

cudaError_t run_kv_project_wgmma(const KvProjectWriteParams& params, cudaStream_t stream) {
#if defined(DFLARE_SM90A) || defined(DFLARE_EMULATION)
  return dispatch(params.element, params.head_dim, [&]<class T, int kHeadDim>() {
    return run_kv_project_wgmma<T, kHeadDim>(params, stream);
  });
#else
  static_cast<void>(params), static_cast<void>(stream);
  return cudaErrorNotSupported;
#endif
}

cudaError_t run_block_attention(const BlockAttentionParams& params, cudaStream_t stream) {
#if defined(DFLARE_SM90A) || defined(DFLARE_EMULATION)
  if (params.plan.wgmma) {
    return params.element == ElementType::kBf16
               ? run_block_attention_wgmma<Bf16, 128>(params, stream)
               : run_block_attention_wgmma<Fp16, 128>(params, stream);
  }
#endif
  return dispatch(params.element, params.head_dim, [&]<class T, int kHeadDim>() {
    return run_block_attention<T, kHeadDim>(params, stream);
  });
}

}  // namespace dflare
