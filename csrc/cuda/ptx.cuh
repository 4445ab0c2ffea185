// Every inline PTX instruction of the project, one named wrapper each. Kernels include nothing else
// that is specific to the compiler, so the host emulator (csrc/emulation) runs them unmodified by
// supplying the same names.
#pragma once

#if defined(DFLARE_EMULATION)
#include "../emulation/emulated_ptx.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

#include "elements.h"

// Dynamic shared memory as raw bytes; the only kind the kernels use. The copy engine's swizzle
// repeats every 1024 bytes.
#define DFLARE_DYNAMIC_SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]

namespace dflare::ptx {

// Where something is in shared memory; arithmetic on it is 32 bits wide on a GPU.
using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// ------------------------------------------------------------ asynchronous copies

// Copies 16 bytes from global to shared memory past L1; writes zeros and reads nothing if !valid,
// whatever the address is.
__device__ __forceinline__ void cp_async_16(SharedAddress shared, const void* global, bool valid) {
  asm volatile(
      "{\n"
      ".reg .pred ignore;\n"
      "setp.eq.u32 ignore, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, ignore;\n"
      "}\n" ::"r"(shared),
      "l"(global), "r"(static_cast<uint32_t>(valid))
      : "memory");
}

// Asks for `bytes` (a multiple of 16, from a multiple of 16) to be brought into L2. Nothing on
// sm_80.
__device__ __forceinline__ void prefetch_to_l2(const void* global, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(global), "r"(bytes));
#endif
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of this thread's committed groups are still in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// ------------------------------------------------------------ tensor cores

// Four 8x8 matrices of 16-bit elements; lane i passes the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// d += a * b with a 16x16 (row major), b 16x8 (column major), d 16x8 in fp32.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<Bf16>(float (&d)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<Fp16>(float (&d)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ------------------------------------------------------------ conversions and arithmetic

// Two fp32 values to one register of two 16-bit elements, rounded to nearest even; lo in the low
// half, which is the lower address.
template <class T>
__device__ __forceinline__ uint32_t pack(float lo, float hi);

template <>
__device__ __forceinline__ uint32_t pack<Bf16>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

template <>
__device__ __forceinline__ uint32_t pack<Fp16>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack<Bf16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

template <>
__device__ __forceinline__ float2 unpack<Fp16>(uint32_t pair) {
  float2 f;
  asm("{.reg .b16 lo, hi;\n mov.b32 {lo, hi}, %2;\n cvt.f32.f16 %0, lo;\n cvt.f32.f16 %1, hi;}\n"
      : "=f"(f.x), "=f"(f.y)
      : "r"(pair));
  return f;
}

// The same value, which the compiler keeps in a register: it cannot compute it again where it is
// used, as it likes to do with what it derives from the thread index, in loops too.
__device__ __forceinline__ uint32_t keep(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^x; exact for x = 0 and -inf.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// 1 / sqrt(x).
__device__ __forceinline__ float rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// ------------------------------------------------------------ communication between thread blocks

// Adds and returns the old value. What the block wrote before the barrier in front of this is
// visible to whoever later draws from the same address, once their block has passed a barrier.
__device__ __forceinline__ int atomic_add_acq_rel(int* global, int value) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;\n"
               : "=r"(old)
               : "l"(global), "r"(value)
               : "memory");
  return old;
}

// Reads past L1: for data that other thread blocks of the same grid wrote, or that is read once.
// The compiler keeps the order of such loads, so that all that stand in a row are in flight
// together.
__device__ __forceinline__ float2 load_from_l2(const float2* global) {
  float2 v;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];\n" : "=f"(v.x), "=f"(v.y) : "l"(global));
  return v;
}

__device__ __forceinline__ float4 load_from_l2(const float4* global) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(global));
  return v;
}

__device__ __forceinline__ uint4 load_from_l2(const uint4* global) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global));
  return v;
}

// Writes what other thread blocks read from L2.
__device__ __forceinline__ void store_to_l2(float2* global, float2 v) {
  asm volatile("st.global.cg.v2.f32 [%0], {%1, %2};\n" ::"l"(global), "f"(v.x), "f"(v.y)
               : "memory");
}

// Whether the functions below are there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
inline constexpr bool kHasClusters = true;
#else
inline constexpr bool kHasClusters = false;
#endif

// Waits for all threads of the cluster's blocks that have not exited. What they wrote before, to
// shared memory too, is visible to all after it.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;\n" ::
          : "memory");
}

// The same for the blocks' sake alone: nothing that was written becomes visible, so it does not
// wait for writes to memory.
__device__ __forceinline__ void cluster_barrier_relaxed() {
  asm volatile(
      "barrier.cluster.arrive.relaxed;\n"
      "barrier.cluster.wait;\n" ::
          : "memory");
}

// Where in the cluster's block of this rank is what is there in this block's shared memory.
__device__ __forceinline__ SharedAddress cluster_address(SharedAddress own, int rank) {
  SharedAddress there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(own), "r"(rank));
  return there;
}

// Reads the shared memory of the cluster's block of this rank: what lies where `own` is in this
// block's. Loads that stand in a row are in flight together.
template <class Vector>
__device__ __forceinline__ Vector load_from_cluster(SharedAddress own, int rank) {
  static_assert(sizeof(Vector) == 8 || sizeof(Vector) == 16, "float2 or float4");
  const SharedAddress there = cluster_address(own, rank);
  Vector v;
  if constexpr (sizeof(Vector) == 8) {
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];\n"
                 : "=f"(v.x), "=f"(v.y)
                 : "r"(there)
                 : "memory");
  } else {
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\n"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(there)
                 : "memory");
  }
  return v;
}

// Programmatic dependent launch (sm_90 and up; plain stream order below): lets the next kernel of
// the stream start, if it was launched for that, as soon as every block of this grid has called it.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" :::);
#endif
}

// Waits until the kernels before this one in the stream have finished and their writes are visible.
__device__ __forceinline__ void wait_for_prior_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace dflare::ptx

#endif  // DFLARE_EMULATION
