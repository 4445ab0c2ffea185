// head_argmax: the first of the highest logits of a row, one block a row.
//
// A thread takes 16-byte pieces of the row in turn and keeps the highest logit and the piece that
// it came from; which of the piece's eight it was is looked up at the end. NaN is never the
// highest.
#include <cmath>

#include "launch.cuh"
#include "params.h"
#include "ptx.cuh"
#include "warp_max.cuh"

namespace dflare {
namespace {

// A row, from the first address on that 16-byte loads can begin at.
template <class T>
struct Logits {
  const T* row;
  int columns;
  const int before = static_cast<int>(
      min(static_cast<unsigned>(columns),
          static_cast<unsigned>(-reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T))));
  const int pieces = (columns - before) / 8, after = before + 8 * pieces;

  __device__ __forceinline__ float at(int column) const {
    return ptx::unpack<T>(row[column].bits).x;
  }
  __device__ __forceinline__ uint4 piece(int i) const {
    return ptx::load_from_l2(reinterpret_cast<const uint4*>(row + before) + i);
  }
};

template <class T>
__device__ __forceinline__ float highest_of(uint4 piece) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
  float highest = -INFINITY;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float2 pair = ptx::unpack<T>(words[w]);
    highest = fmaxf(highest, fmaxf(pair.x, pair.y));
  }
  return highest;
}

// This thread's share of a row: its highest logit and the column of the first that is as high.
template <class T>
struct Best {
  float logit = -INFINITY;
  int column = 0;

  __device__ __forceinline__ void consider(float x, int at) {
    if (x > logit) logit = x, column = at;
  }

  __device__ __forceinline__ void search(const Logits<T>& logits) {
    const int thread = threadIdx.x;
    if (thread < logits.before) consider(logits.at(thread), thread);
    for (int first = thread; first < logits.pieces; first += kHeadLoads * kHeadThreads) {
      uint4 loaded[kHeadLoads];
#pragma unroll
      for (int i = 0; i < kHeadLoads; ++i) {
        loaded[i] = logits.piece(min(first + i * kHeadThreads, logits.pieces - 1));
      }
#pragma unroll
      for (int i = 0; i < kHeadLoads; ++i) {
        const int piece = min(first + i * kHeadThreads, logits.pieces - 1);
        consider(highest_of<T>(loaded[i]), logits.before + 8 * piece);
      }
    }
    if (column >= logits.before && column < logits.after) {
      const int piece = column;
      for (int i = 7; i >= 0; --i) {
        if (logits.at(piece + i) == logit) column = piece + i;
      }
    }
    if (thread < logits.columns - logits.after) {
      consider(logits.at(logits.after + thread), logits.after + thread);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kHeadThreads, 1)
    head_argmax_kernel(const __grid_constant__ HeadArgmaxParams p) {
  DFLARE_DYNAMIC_SHARED_MEMORY(shared);
  int64_t* best_of_warp = reinterpret_cast<int64_t*>(shared);
  const int thread = threadIdx.x, drafted = blockIdx.x;
  const T* row =
      static_cast<const T*>(p.logits) + int64_t{drafting_row(drafted, p.block_size)} * p.columns;
  Best<T> best;
  best.search(Logits<T>{row, p.columns});
  const int64_t key = warp_max(argmax_key(best.logit, p.head_tokens[p.first_column + best.column]));
  if (thread % 32 == 0) best_of_warp[thread / 32] = key;
  __syncthreads();
  if (thread >= 32) return;
  int64_t winner = warp_max(best_of_warp[thread % (kHeadThreads / 32)]);
  if (thread > 0) return;
  if (p.first_column > 0) winner = max(winner, p.keys[drafted]);
  p.keys[drafted] = winner;
  p.tokens[drafted] = argmax_token(winner);
}

template <class T>
cudaError_t run(const HeadArgmaxParams& p, cudaStream_t stream) {
  return launch(head_argmax_kernel<T>, dim3(p.drafted), kHeadThreads, kHeadSharedBytes, false, p,
                stream);
}

}  // namespace

cudaError_t run_head_argmax(const HeadArgmaxParams& params, cudaStream_t stream) {
  return params.element == ElementType::kBf16 ? run<Bf16>(params, stream)
                                              : run<Fp16>(params, stream);
}

}  // namespace dflare
