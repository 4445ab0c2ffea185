// One head of one token, spread over a few lanes of a warp in fp32: RMSNorm and neox RoPE.
//
// RoPE turns elements i and i + rotary/2 together, so a lane holds both: 8 neighbouring pairs of
// them, which makes every access 16 bytes wide. Number the head's head_dim / 2 pairs: the first
// rotary/2 are the rotated ones, the others join element rotary + j with element
// rotary + j + (head_dim - rotary) / 2 of the part that passes through. Lane l of the head's
// head_dim / 16 lanes holds pairs 8l .. 8l+7:
//
//   x[0..7]   elements first  .. first + 7
//   x[8..15]  elements second .. second + 7
#pragma once

#include "ptx.cuh"

namespace dflare {

template <int kHeadDim>
struct HeadRow {
  static constexpr int kLanes = kHeadDim / 16;

  float x[16];

  // rotary is a multiple of 16, so that 8 pairs are all rotated or all not.
  struct Places {
    int pair, first, second;
    bool rotated;
  };
  static __device__ __forceinline__ Places places(int rotary) {
    const int pair = static_cast<int>(threadIdx.x % kLanes) * 8;
    const bool rotated = pair < rotary / 2;
    const int first = rotated ? pair : pair + rotary / 2;
    return {pair, first, first + (rotated ? rotary : kHeadDim - rotary) / 2, rotated};
  }

  template <class T>
  __device__ __forceinline__ void load(int rotary, const T* head) {
    const Places at = places(rotary);
    unpack<T>(*reinterpret_cast<const uint4*>(head + at.first), x);
    unpack<T>(*reinterpret_cast<const uint4*>(head + at.second), x + 8);
  }

  // load(place) gives the 4 elements from `place` on.
  template <class Load>
  __device__ __forceinline__ void load_with(int rotary, Load load) {
    const Places at = places(rotary);
    const int from[4] = {at.first, at.first + 4, at.second, at.second + 4};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 v = load(from[i]);
      x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
    }
  }

  // The cosines (x[0..7]) and sines (x[8..15]) of the lane's pairs, from a position's row of the
  // cache: rotary/2 cosines, then rotary/2 sines. Pairs that pass through turn by 0.
  __device__ __forceinline__ void load_rotation(int rotary, const float* cos_sin) {
    const Places at = places(rotary);
    if (at.rotated) {
      copy(cos_sin + at.pair, x);
      copy(cos_sin + rotary / 2 + at.pair, x + 8);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = 1, x[i + 8] = 0;
  }

  __device__ __forceinline__ void add(const HeadRow& other) {
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] += other.x[i];
  }

  // RMSNorm. All lanes of the warp take part; where not `wanted`, the head stays as it is.
  __device__ __forceinline__ void normalize(const HeadRow& weight, float eps, bool wanted) {
    float square = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) square += x[i] * x[i];
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      square += __shfl_xor_sync(0xffffffffu, square, lanes);
    }
    if (!wanted) return;
    const float inverse = ptx::rsqrt(square * (1.0f / kHeadDim) + eps);
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] *= inverse * weight.x[i];
  }

  __device__ __forceinline__ void rotate(const HeadRow& rotation) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float a = x[i], b = x[i + 8], c = rotation.x[i], s = rotation.x[i + 8];
      x[i] = a * c - b * s;
      x[i + 8] = b * c + a * s;
    }
  }

  // write(place, 8 elements) for the lane's two runs of places.
  template <class T, class Write>
  __device__ __forceinline__ void store_with(int rotary, Write write) const {
    const Places at = places(rotary);
    write(at.first, pack<T>(x));
    write(at.second, pack<T>(x + 8));
  }

 private:
  template <class T>
  static __device__ __forceinline__ void unpack(uint4 packed, float* out) {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 pair = ptx::unpack<T>(words[w]);
      out[2 * w] = pair.x, out[2 * w + 1] = pair.y;
    }
  }

  template <class T>
  static __device__ __forceinline__ uint4 pack(const float* in) {
    return make_uint4(ptx::pack<T>(in[0], in[1]), ptx::pack<T>(in[2], in[3]),
                      ptx::pack<T>(in[4], in[5]), ptx::pack<T>(in[6], in[7]));
  }

  static __device__ __forceinline__ void copy(const float* from, float* to) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + i);
      to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
  }
};

}  // namespace dflare
