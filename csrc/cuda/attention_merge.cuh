// The result of a block: written at once where its request is not cut, else as one of several
// parts.
//
// Each part writes its sums, maxima and normalisers to scratch and draws a ticket; the one that
// draws the last adds all parts in order (so the result does not depend on who was last) and puts
// the ticket back to zero for the next layer. Parts whose blocks are in one cluster go another way
// (attention_cluster.cuh).
#pragma once

#include "attention_tile.cuh"

namespace dflare {

template <class T, int kHeadDim, int kWarps>
struct AttentionResult {
  using Tile = AttentionTile<T, kHeadDim, kWarps>;
  static constexpr int kRows = Tile::kRows, kThreads = 32 * kWarps;

  static __device__ __forceinline__ void write_output(const AttentionItem& item, const Tile& t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = t.row_of(item, half);
      if (row >= item.rows()) continue;
      const float inverse = ptx::reciprocal(t.normalizer[half]);
      T* out = item.output_head<T>(row, kHeadDim);
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<uint32_t*>(out + j * 8 + t.lane % 4 * 2) =
            ptx::pack<T>(t.sum[j][2 * half] * inverse, t.sum[j][2 * half + 1] * inverse);
      }
    }
  }

  // Scratch of one part: kRows x head_dim sums, then kRows x {maximum, normaliser}.
  static __device__ __forceinline__ float* partial(const AttentionItem& item, int of_part) {
    const int index = (item.first_partial + of_part) * item.p.plan.units + item.unit();
    return item.p.partials + index * (kRows * (kHeadDim + 2));  // under 2^31, see plan_attention
  }

  // store(offset of two floats, values): rows of sums kStride apart, then maxima and normalisers.
  template <int kStride, class Store>
  static __device__ __forceinline__ void write_partial(const AttentionItem& item, const Tile& t,
                                                       Store store) {
    if (!t.warp_has_rows(item)) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = t.warp * 16 + half * 8 + t.lane / 4;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        store(row * kStride + j * 8 + t.lane % 4 * 2,
              make_float2(t.sum[j][2 * half], t.sum[j][2 * half + 1]));
      }
      if (t.lane % 4 == 0) {
        store(kRows * kStride + row * 2, make_float2(t.maximum[half], t.normalizer[half]));
      }
    }
  }

  // Whether this was the last part of the request's to arrive. `shared` may be overwritten.
  static __device__ __forceinline__ bool draw_ticket(const AttentionItem& item, void* shared) {
    int32_t* tickets = item.p.schedule + 4 * (1 + item.p.plan.max_items);
    int32_t* ticket = tickets + item.first_partial * item.p.plan.units + item.unit();
    int* shared_flag = static_cast<int*>(shared);
    __syncthreads();  // every thread's share of the partial result is written
    if (threadIdx.x == 0) {
      const bool last = ptx::atomic_add_acq_rel(ticket, 1) == item.parts - 1;
      if (last) *ticket = 0;
      *shared_flag = last;
    }
    __syncthreads();
    return *shared_flag != 0;
  }

  // How merging is shared out: a lane takes four columns of a row, 16 bytes a load, and several
  // rows at a time, so that enough loads are in flight.
  static constexpr int kLanes = kHeadDim / 4 < 32 ? kHeadDim / 4 : 32;
  static constexpr int kVectors = kHeadDim / 4 / kLanes, kRowsInFlight = 8 / kVectors;
  static constexpr int kRowsAtOnce = kThreads / kLanes;

  // A row's sums over the parts so far.
  struct Merged {
    float total[kVectors][4] = {};
    float highest = -INFINITY, weights = 0;

    // state: maximum and normaliser of one more part.
    __device__ __forceinline__ void add(float2 state, const float4 (&values)[kVectors]) {
      const float before = highest;
      highest = fmaxf(before, state.x);
      const float offset = highest == -INFINITY ? 0.0f : highest;
      const float shrink = ptx::exp2(before - offset);
      const float weight = ptx::exp2(state.x - offset);
      weights = weights * shrink + state.y * weight;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float (&t)[4] = total[v];
        t[0] = t[0] * shrink + values[v].x * weight;
        t[1] = t[1] * shrink + values[v].y * weight;
        t[2] = t[2] * shrink + values[v].z * weight;
        t[3] = t[3] * shrink + values[v].w * weight;
      }
    }

    __device__ __forceinline__ void write(const AttentionItem& item, int row) const {
      const float inverse = ptx::reciprocal(weights);
      T* out = item.output_head<T>(item.row_tile * kRows + row, kHeadDim) + merge_column();
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float (&t)[4] = total[v];
        *reinterpret_cast<uint2*>(out + v * kLanes * 4) =
            make_uint2(ptx::pack<T>(t[0] * inverse, t[1] * inverse),
                       ptx::pack<T>(t[2] * inverse, t[3] * inverse));
      }
    }
  };

  static __device__ __forceinline__ int merge_column() { return threadIdx.x % kLanes * 4; }
  static __device__ __forceinline__ int rows_of(const AttentionItem& item) {
    return min(item.rows() - item.row_tile * kRows, kRows);
  }

  static __device__ __forceinline__ void add_part(Merged (&merged)[kRowsInFlight],
                                                  const float* sums, int first) {
    float2 state[kRowsInFlight];
    float4 values[kRowsInFlight][kVectors];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      const int row = first + r * kRowsAtOnce;
      state[r] =
          ptx::load_from_l2(reinterpret_cast<const float2*>(sums + kRows * kHeadDim + row * 2));
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        values[r][v] = ptx::load_from_l2(reinterpret_cast<const float4*>(
            sums + row * kHeadDim + v * kLanes * 4 + merge_column()));
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) merged[r].add(state[r], values[r]);
  }

  // `shared` may be overwritten.
  static __device__ __forceinline__ void merge_parts(const AttentionItem& item, const Tile& t,
                                                     void* shared) {
    float* own = partial(item, item.part);
    write_partial<kHeadDim>(item, t, [own](int at, float2 pair) {
      ptx::store_to_l2(reinterpret_cast<float2*>(own + at), pair);
    });
    if (!draw_ticket(item, shared)) return;
    const int all_rows = rows_of(item);
#pragma unroll 1
    for (int first = threadIdx.x / kLanes; first < all_rows; first += kRowsInFlight * kRowsAtOnce) {
      Merged merged[kRowsInFlight];
#pragma unroll 2
      for (int i = 0; i < item.parts; ++i) add_part(merged, partial(item, i), first);
#pragma unroll
      for (int r = 0; r < kRowsInFlight; ++r) {
        const int row = first + r * kRowsAtOnce;
        if (row < all_rows) merged[r].write(item, row);
      }
    }
  }
};

}  // namespace dflare
