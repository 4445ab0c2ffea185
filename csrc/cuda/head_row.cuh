// One head of one token, spread over the lanes of (part of) a warp in fp32: RMSNorm and neox RoPE.
//
// RoPE turns elements i and i + rotary/2 together, so a lane holds both. Number the head's
// head_dim / 2 such pairs: the first rotary/2 are the rotated ones, the others join element
// rotary + j with rotary + j + (head_dim - rotary) / 2 of the part that passes through. A lane
// holds two neighbouring pairs at a time, which makes every access 4 bytes wide:
//
//   pair p, p+1:  first  first+1   second  second+1    -> x[v][0..1] and x[v][2..3]
#pragma once

#include "ptx.cuh"

namespace dflare {

template <int kHeadDim>
struct HeadRow {
  static constexpr int kLanes = kHeadDim / 4 < 32 ? kHeadDim / 4 : 32;  // lanes of one head
  static constexpr int kVectors = kHeadDim / 4 / kLanes;                // pairs of pairs a lane

  float x[kVectors][4];

  // Places of a pair; `pair` is even and rotary a multiple of 4.
  struct Places {
    int first, second;
    bool rotated;
  };
  static __device__ __forceinline__ Places places(int pair, int rotary) {
    const bool rotated = pair < rotary / 2;
    const int first = rotated ? pair : pair + rotary / 2;
    return {first, first + (rotated ? rotary : kHeadDim - rotary) / 2, rotated};
  }
  static __device__ __forceinline__ int pair_of(int vector) {
    return 2 * (vector * kLanes + static_cast<int>(threadIdx.x % kLanes));
  }

  // read(place) -> float2 of elements place and place + 1.
  template <class Read>
  __device__ __forceinline__ void load_with(int rotary, Read read) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const Places at = places(pair_of(v), rotary);
      const float2 a = read(at.first), b = read(at.second);
      x[v][0] = a.x, x[v][1] = a.y, x[v][2] = b.x, x[v][3] = b.y;
    }
  }

  template <class T>
  __device__ __forceinline__ void load(int rotary, const T* head) {
    load_with(rotary, [&](int place) {
      return ptx::unpack<T>(*reinterpret_cast<const uint32_t*>(head + place));
    });
  }

  // The cosines and sines of a position's row of the cache, rotary/2 each: of the lane's pairs,
  // x[v][0..1] become cosines and x[v][2..3] sines; pairs that pass through turn by 0.
  __device__ __forceinline__ void load_rotation(int rotary, const float* cos_sin) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int pair = pair_of(v);
      float2 c = make_float2(1, 1), s = make_float2(0, 0);
      if (places(pair, rotary).rotated) {
        c = *reinterpret_cast<const float2*>(cos_sin + pair);
        s = *reinterpret_cast<const float2*>(cos_sin + rotary / 2 + pair);
      }
      x[v][0] = c.x, x[v][1] = c.y, x[v][2] = s.x, x[v][3] = s.y;
    }
  }

  __device__ __forceinline__ void add(const HeadRow& other) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[v][i] += other.x[v][i];
    }
  }

  // RMSNorm. All lanes of the warp take part; where not `wanted`, the head stays as it is.
  __device__ __forceinline__ void normalize(const HeadRow& weight, float eps, bool wanted) {
    float square = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) square += x[v][i] * x[v][i];
    }
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      square += __shfl_xor_sync(0xffffffffu, square, lanes);
    }
    if (!wanted) return;
    const float inverse = ptx::rsqrt(square * (1.0f / kHeadDim) + eps);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[v][i] *= inverse * weight.x[v][i];
    }
  }

  __device__ __forceinline__ void rotate(const HeadRow& rotation) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float a = x[v][i], b = x[v][i + 2];
        const float c = rotation.x[v][i], s = rotation.x[v][i + 2];
        x[v][i] = a * c - b * s;
        x[v][i + 2] = b * c + a * s;
      }
    }
  }

  // write(place, pair of elements) for even places.
  template <class T, class Write>
  __device__ __forceinline__ void store_with(int rotary, Write write) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const Places at = places(pair_of(v), rotary);
      write(at.first, ptx::pack<T>(x[v][0], x[v][1]));
      write(at.second, ptx::pack<T>(x[v][2], x[v][3]));
    }
  }
};

}  // namespace dflare
