// norm_rope_write: K norm, RoPE and pool write of K/V that a batched GEMM projected; for many rows.
//
// A few lanes take one head of one token at a time, and load two heads before they work on the
// first, so that the memory is not idle meanwhile.
#include "context_kv_output.cuh"
#include "launch.cuh"

namespace dflare {
namespace {

constexpr int kThreads = 256, kHeadsInFlight = 2;

template <int kHeadDim>
constexpr int kHeadsPerPass = kThreads / HeadRow<kHeadDim>::kLanes;

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    norm_rope_write_kernel(const __grid_constant__ NormRopeWriteParams p) {
  using Row = HeadRow<kHeadDim>;
  const int heads = 2 * p.out.kv_heads, layer = blockIdx.y;
  const int tasks = valid_rows(p.out) * heads;
  const int64_t first =
      int64_t{blockIdx.x} * kHeadsInFlight * kHeadsPerPass<kHeadDim> + threadIdx.x / Row::kLanes;
  const T* layer_kv =
      static_cast<const T*>(p.kv) + int64_t{layer} * p.out.num_rows * heads * kHeadDim;
  Row values[kHeadsInFlight];
  ContextRow rows[kHeadsInFlight] = {};
#pragma unroll
  for (int i = 0; i < kHeadsInFlight; ++i) {
    const int task = first + i * kHeadsPerPass<kHeadDim>;
    const T* source = layer_kv + int64_t{task < tasks ? task : 0} * kHeadDim;
    values[i].load(p.out.rope.rotary, source);
    if (task < tasks) rows[i] = load_context_row(p.out, task / heads);
  }
#pragma unroll
  for (int i = 0; i < kHeadsInFlight; ++i) {
    const int task = first + i * kHeadsPerPass<kHeadDim>;
    const ContextHead<T, kHeadDim> head{p.out, layer, task % heads};
    Row rotation{};
    if (task < tasks) head.load_rotation(rotation, rows[i]);
    head.write(values[i], rotation, rows[i], task < tasks);
  }
}

template <class T, int kHeadDim>
cudaError_t run(const NormRopeWriteParams& p, cudaStream_t stream) {
  const int tasks = p.out.num_rows * 2 * p.out.kv_heads;
  const dim3 grid(ceil_div(tasks, kHeadsInFlight * kHeadsPerPass<kHeadDim>), p.out.num_layers);
  return launch(norm_rope_write_kernel<T, kHeadDim>, grid, kThreads, 0, false, p, stream);
}

template <class T>
cudaError_t run(const NormRopeWriteParams& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64: return run<T, 64>(p, stream);
    case 128: return run<T, 128>(p, stream);
    case 256: return run<T, 256>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t run_norm_rope_write(const NormRopeWriteParams& params, cudaStream_t stream) {
  return params.element == ElementType::kBf16 ? run<Bf16>(params, stream)
                                              : run<Fp16>(params, stream);
}

}  // namespace dflare
