// The wrappers of csrc/cuda/ptx.cuh for the host: same names, same meaning.
#pragma once

#include <bit>

#include "../cuda/elements.h"
#include "cuda_runtime.h"

namespace dflare::ptx {

using SharedAddress = uintptr_t;
inline SharedAddress shared_address(const void* pointer) {
  return reinterpret_cast<SharedAddress>(pointer);
}

inline void cp_async_16(SharedAddress shared, const void* global, bool valid) {
  emulation::cp_async(reinterpret_cast<void*>(shared), global, valid);
}
inline void prefetch_to_l2(const void* global, int bytes) {
  emulation::prefetch(global, static_cast<size_t>(bytes));
}
inline void cp_async_commit() { emulation::cp_async_commit(); }
template <int kPending>
void cp_async_wait() {
  emulation::cp_async_wait(kPending);
}
inline void launch_dependents() { emulation::launch_dependents(); }
inline void wait_for_prior_kernels() { emulation::wait_for_prior_kernels(); }

// ------------------------------------------------------------ conversions and arithmetic

inline uint32_t pair_of(uint16_t lo, uint16_t hi) { return lo | uint32_t{hi} << 16; }

template <class T>
uint16_t round_to(float x);

template <>
inline uint16_t round_to<Bf16>(float x) {
  const auto u = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
template <>
inline uint16_t round_to<Fp16>(float x) {
  return std::bit_cast<uint16_t>(static_cast<_Float16>(x));
}

template <class T>
float widen(uint16_t bits);

template <>
inline float widen<Bf16>(uint16_t bits) {
  return std::bit_cast<float>(uint32_t{bits} << 16);
}
template <>
inline float widen<Fp16>(uint16_t bits) {
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}

template <class T>
uint32_t pack(float lo, float hi) {
  return pair_of(round_to<T>(lo), round_to<T>(hi));
}
template <class T>
float2 unpack(uint32_t pair) {
  return {widen<T>(static_cast<uint16_t>(pair)), widen<T>(static_cast<uint16_t>(pair >> 16))};
}

template <class T>
T keep(T x) {
  return x;
}
inline float exp2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline int atomic_add_acq_rel(int* global, int value) {
  emulation::count_l2(sizeof(int));
  const int old = *global;
  *global += value;
  return old;
}
template <class Vector>
Vector load_from_l2(const Vector* global) {
  emulation::count_l2(sizeof(Vector));
  return *global;
}
inline void store_to_l2(float2* global, float2 value) {
  emulation::count_l2(sizeof(value));
  *global = value;
}

inline constexpr bool kHasClusters = true;
inline void cluster_barrier() { emulation::cluster_barrier(); }
inline void cluster_barrier_relaxed() { emulation::cluster_barrier(); }
inline SharedAddress cluster_address(SharedAddress own, int rank) {
  return emulation::cluster_address(own, rank);
}
template <class Vector>
Vector load_from_cluster(SharedAddress own, int rank) {
  return *static_cast<const Vector*>(emulation::read_in_cluster(own, rank, sizeof(Vector)));
}

// ------------------------------------------------------------ tensor cores

// Four 8x8 matrices of 16-bit elements: lane i names row i % 8 of matrix i / 8 and receives, of
// each matrix, elements 2 * (i % 4), + 1 of row i / 4 (or column i / 4 if transposed).
template <bool kTransposed>
void ldmatrix(uint32_t (&r)[4], SharedAddress row) {
  if (row % 16 != 0) emulation::fail("misaligned ldmatrix");
  struct Operand {
    const uint16_t* row;
    uint32_t* r;
  } mine{reinterpret_cast<const uint16_t*>(row), r};
  const char* name = kTransposed ? "ldmatrix.trans" : "ldmatrix";
  emulation::warp_operation(name, &mine, [](void* const* operands) {
    uintptr_t rows[32];
    for (int i = 0; i < 32; ++i) {
      rows[i] = reinterpret_cast<uintptr_t>(static_cast<Operand*>(operands[i])->row);
    }
    emulation::count_matrix_load(rows);
    const auto element = [&](int matrix, int i, int j) {
      return static_cast<Operand*>(operands[matrix * 8 + i])->row[j];
    };
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const int i = lane / 4, j = lane % 4 * 2;
        static_cast<Operand*>(operands[lane])->r[m] =
            kTransposed ? pair_of(element(m, j, i), element(m, j + 1, i))
                        : pair_of(element(m, i, j), element(m, i, j + 1));
      }
    }
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) { ldmatrix<false>(r, row); }
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedAddress row) { ldmatrix<true>(r, row); }

// Fragment layout of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): with g = lane / 4
// and t = lane % 4, register i of a holds row g + 8 * (i % 2), columns 2t, 2t + 1 (+ 8 if i >= 2);
// register i of b holds rows 2t, 2t + 1 (+ 8 if i == 1) of column g; d holds columns 2t, 2t + 1 of
// rows g, then g + 8.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operand {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  emulation::warp_operation("mma", &mine, [](void* const* operands) {
    float left[16][16], right[16][8], out[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& o = *static_cast<Operand*>(operands[lane]);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        const float2 v = unpack<T>(o.a[i]);
        left[g + i % 2 * 8][t + i / 2 * 8] = v.x;
        left[g + i % 2 * 8][t + i / 2 * 8 + 1] = v.y;
        out[g + i / 2 * 8][t + i % 2] = o.d[i];
      }
      for (int i = 0; i < 2; ++i) {
        const float2 v = unpack<T>(o.b[i]);
        right[t + i * 8][g] = v.x;
        right[t + i * 8 + 1][g] = v.y;
      }
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) out[m][n] += left[m][k] * right[k][n];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const auto& o = *static_cast<Operand*>(operands[lane]);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) o.d[i] = out[g + i / 2 * 8][t + i % 2];
    }
  });
}

}  // namespace dflare::ptx
