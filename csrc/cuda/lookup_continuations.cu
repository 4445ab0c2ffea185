// lookup_continuations: one thread block a request. Every thread takes ends of earlier texts in
// turn, the latest first, and keeps the longest match; of equals the latest wins.
#include "launch.cuh"
#include "params.h"
#include "seq_len.cuh"
#include "warp_max.cuh"

namespace dflare {
namespace {

// A match as a number that is larger for a better one.
__device__ __forceinline__ int64_t rank(int length, int end) {
  return static_cast<int64_t>(length) << 32 | end;
}

__global__ void __launch_bounds__(kLookupThreads)
    lookup_continuations_kernel(const __grid_constant__ LookupParams p) {
  DFLARE_DYNAMIC_SHARED_MEMORY(shared);
  int64_t* best_of_warp = reinterpret_cast<int64_t*>(shared);
  int32_t* suffix = reinterpret_cast<int32_t*>(best_of_warp + kLookupThreads / 32);
  const int request = blockIdx.x, thread = threadIdx.x;
  const int last = load_seq_len(p.seq_lens, p.seq_lens_64bit, request);
  const int32_t* places = p.req_to_token + p.req_pool_indices[request] * p.req_to_token_stride;
  const int32_t anchor = static_cast<int32_t>(p.anchors[request]);
  const auto text = [&](int i) { return i == last ? anchor : p.tokens[places[i]]; };

  // The end of the text, from its last token on.
  for (int i = thread; i < min(p.longest_match, last + 1); i += kLookupThreads) {
    suffix[i] = text(last - i);
  }
  __syncthreads();

  int best = p.least_match - 1, best_end = 0;
  for (int end = last - thread; end > best && best < p.longest_match; end -= kLookupThreads) {
    if (text(end - 1 - best) != suffix[best] || text(end - 1) != anchor) continue;
    const int most = min(end, p.longest_match);
    int length = 1;
    while (length < most && text(end - 1 - length) == suffix[length]) ++length;
    if (length > best) {
      best = length;
      best_end = end;
    }
  }

  const int64_t of_warp = warp_max(best_end ? rank(best, best_end) : 0);
  if (thread % 32 == 0) best_of_warp[thread / 32] = of_warp;
  __syncthreads();
  int64_t winner = 0;
  for (int warp = 0; warp < kLookupThreads / 32; ++warp) {
    winner = best_of_warp[warp] > winner ? best_of_warp[warp] : winner;
  }
  const int end = static_cast<int>(winner & 0xffffffff), period = last + 1 - end;
  for (int i = thread; i < p.count; i += kLookupThreads) {
    p.found[static_cast<int64_t>(request) * p.count + i] = winner ? text(end + i % period) : 0;
  }
  if (thread == 0) p.lengths[request] = static_cast<int32_t>(winner >> 32);
}

}  // namespace

cudaError_t run_lookup_continuations(const LookupParams& params, cudaStream_t stream) {
  return launch(lookup_continuations_kernel, dim3(params.batch_size), kLookupThreads,
                lookup_shared_bytes(params.longest_match), false, params, stream);
}

}  // namespace dflare
