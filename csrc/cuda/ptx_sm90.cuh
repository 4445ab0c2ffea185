// Inline PTX that sm_90a alone has: barriers in shared memory that count bytes, the copy engine
// and warpgroup products. Names and layouts are those of NVIDIA's PTX ISA 8.0 and later.
#pragma once

#include "ptx.cuh"
#include "tensor_map.h"

#if defined(DFLARE_EMULATION)
#include "../emulation/emulated_sm90.h"
#else

namespace dflare::ptx {

// ------------------------------------------------------------ barriers in shared memory

// A barrier of 8 bytes. Its phase ends when so many threads have arrived and all bytes that they
// expect have been written; the next one then starts. Phases have parity 0, 1, 0, ..
__device__ __forceinline__ void barrier_init(SharedAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals)
               : "memory");
}

// Makes the barriers that this thread has initialised known to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// The same at a barrier of another block of the cluster (cluster_address).
__device__ __forceinline__ void barrier_arrive_in_cluster(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Arrives, and has the phase wait for `bytes` more of the copy engine.
__device__ __forceinline__ void barrier_arrive_expecting(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits for the end of the phase of this parity that is running, or was the last one.
__device__ __forceinline__ void barrier_wait(SharedAddress barrier, uint32_t parity) {
  uint32_t ended = 0;
  while (!ended) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}\n"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// ------------------------------------------------------------ copy engine

// Copies the box from {column, row, outer} of the tensor; its bytes, zeros beyond the tensor
// included, count towards the barrier.
__device__ __forceinline__ void copy_box(SharedAddress to, const TensorMap& map, int column,
                                         int row, int outer, SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(outer), "r"(barrier)
      : "memory");
}

// The same into all of the cluster's blocks that the mask names by rank, at this place of each; the
// bytes count towards the barrier at its place in each.
__device__ __forceinline__ void copy_box_to_cluster(SharedAddress to, const TensorMap& map,
                                                    int column, int row, int outer,
                                                    SharedAddress barrier, int mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;\n" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(outer), "r"(barrier), "h"(static_cast<uint16_t>(mask))
      : "memory");
}

// Asks for the box to be brought into L2.
__device__ __forceinline__ void prefetch_box(const TensorMap& map, int column, int row, int outer) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];\n" ::"l"(&map),
               "r"(column), "r"(row), "r"(outer)
               : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

// ------------------------------------------------------------ warpgroup products

// Products of a warpgroup (four warps, the first a multiple of four) read shared memory and add to
// registers until a wait; a group holds those since the commit before.
__device__ __forceinline__ void warpgroup_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Lets products, after a barrier, see what this thread has written to shared memory: stores, and
// copies that it has waited for.
__device__ __forceinline__ void publish_to_products() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// The same value; the compiler can neither read it before this nor keep an older one.
__device__ __forceinline__ void settle(float& x) { asm volatile("" : "+f"(x)::"memory"); }

// A product's sums as operands of its instruction, SUM(n) the n-th, and their places in its text.
#define DFLARE_SUMS_8(SUM, n)                                                           \
  "+f"(SUM(n)), "+f"(SUM(n + 1)), "+f"(SUM(n + 2)), "+f"(SUM(n + 3)), "+f"(SUM(n + 4)), \
      "+f"(SUM(n + 5)), "+f"(SUM(n + 6)), "+f"(SUM(n + 7))
#define DFLARE_SUMS_32(SUM, n)                                                  \
  DFLARE_SUMS_8(SUM, n), DFLARE_SUMS_8(SUM, n + 8), DFLARE_SUMS_8(SUM, n + 16), \
      DFLARE_SUMS_8(SUM, n + 24)
#define DFLARE_SUMS_64(SUM, n) DFLARE_SUMS_32(SUM, n), DFLARE_SUMS_32(SUM, n + 32)
#define DFLARE_PLACES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DFLARE_PLACES_32                     \
  DFLARE_PLACES_8                            \
  ", "                                       \
  "%8, %9, %10, %11, %12, %13, %14, %15, "   \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define DFLARE_PLACES_64                     \
  DFLARE_PLACES_32                           \
  ", "                                       \
  "%32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define DFLARE_FLAT_SUM(n) d[n]
#define DFLARE_TILED_SUM(n) d[(n) / 4][(n) % 4]

// d += a * b^T, d 64 x kTokens, of 16 columns of tiles in shared memory (matrix_descriptor). Thread
// t of the warpgroup holds, in d[4 j + i], row t / 32 * 16 + t % 32 / 4 + i / 2 * 8, column
// 8 j + t % 4 * 2 + i % 2.
template <class T, int kTokens>
__device__ __forceinline__ void warpgroup_mma(float (&d)[kTokens / 2], uint64_t a, uint64_t b);

#define DFLARE_WARPGROUP_MMA(TYPE, NAME, TOKENS, SUMS, A, B)                                \
  template <>                                                                               \
  __device__ __forceinline__ void warpgroup_mma<TYPE, TOKENS>(float (&d)[SUMS], uint64_t a, \
                                                              uint64_t b) {                 \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #TOKENS "k16.f32." NAME "." NAME       \
                 " {" DFLARE_PLACES_##SUMS "}, " A ", " B ", 1, 1, 1, 0, 0;\n"              \
                 : DFLARE_SUMS_##SUMS(DFLARE_FLAT_SUM, 0)                                   \
                 : "l"(a), "l"(b));                                                         \
  }
DFLARE_WARPGROUP_MMA(Bf16, "bf16", 16, 8, "%8", "%9")
DFLARE_WARPGROUP_MMA(Fp16, "f16", 16, 8, "%8", "%9")
DFLARE_WARPGROUP_MMA(Bf16, "bf16", 64, 32, "%32", "%33")
DFLARE_WARPGROUP_MMA(Fp16, "f16", 64, 32, "%32", "%33")
DFLARE_WARPGROUP_MMA(Bf16, "bf16", 128, 64, "%64", "%65")
DFLARE_WARPGROUP_MMA(Fp16, "f16", 128, 64, "%64", "%65")
#undef DFLARE_WARPGROUP_MMA

// d += a * b, d 64 x kColumns, of 16 columns of `a` that are in registers as mma_m16n8k16 has them,
// a warp's rows after the other's; d[j] holds what mma_m16n8k16 leaves of columns 8 j to 8 j + 7. b
// holds its columns as rows (matrix_descriptor) or, if transposed, its rows (panels_descriptor).
template <class T, int kColumns, bool kTransposed>
__device__ __forceinline__ void warpgroup_mma(float (&d)[kColumns / 8][4], const uint32_t (&a)[4],
                                              uint64_t b);

#define DFLARE_WARPGROUP_MMA(TYPE, NAME, COLUMNS, SUMS, A, B, TRANSPOSED)                   \
  template <>                                                                               \
  __device__ __forceinline__ void warpgroup_mma<TYPE, COLUMNS, TRANSPOSED>(                 \
      float (&d)[COLUMNS / 8][4], const uint32_t (&a)[4], uint64_t b) {                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME      \
                 " {" DFLARE_PLACES_##SUMS "}, {" A "}, " B ", 1, 1, 1, " #TRANSPOSED ";\n" \
                 : DFLARE_SUMS_##SUMS(DFLARE_TILED_SUM, 0)                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                     \
  }
DFLARE_WARPGROUP_MMA(Bf16, "bf16", 64, 32, "%32, %33, %34, %35", "%36", 0)
DFLARE_WARPGROUP_MMA(Fp16, "f16", 64, 32, "%32, %33, %34, %35", "%36", 0)
DFLARE_WARPGROUP_MMA(Bf16, "bf16", 128, 64, "%64, %65, %66, %67", "%68", 1)
DFLARE_WARPGROUP_MMA(Fp16, "f16", 128, 64, "%64, %65, %66, %67", "%68", 1)
#undef DFLARE_WARPGROUP_MMA
#undef DFLARE_SUMS_8
#undef DFLARE_SUMS_32
#undef DFLARE_SUMS_64
#undef DFLARE_PLACES_8
#undef DFLARE_PLACES_32
#undef DFLARE_PLACES_64
#undef DFLARE_FLAT_SUM
#undef DFLARE_TILED_SUM

}  // namespace dflare::ptx

#endif  // DFLARE_EMULATION

namespace dflare::ptx {

// Describes a tile for products: rows of 64 elements (128 bytes), the 16-byte pieces of each
// swizzled as copy_box and tile.cuh leave them, from a multiple of 1024 bytes on. Every 32 bytes
// added to the address are 16 columns further: see columns_further.
//
// Bits 0-13: address / 16. 16-29: unused with a swizzle, 1. 32-45: bytes from eight rows to the
// next eight, / 16. 62-63: 1, the swizzle of 128 bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(SharedAddress tile) {
  constexpr uint64_t kEightRows = 8 * 128;
  return (tile & 0x3ffff) >> 4 | uint64_t{1} << 16 | kEightRows >> 4 << 32 | uint64_t{1} << 62;
}

// 16 * steps columns further.
__device__ __forceinline__ uint64_t columns_further(uint64_t descriptor, int steps) {
  return descriptor + static_cast<uint64_t>(steps * 32 >> 4);
}

// Describes rows of a transposed operand: panels of 64 columns, `panel_bytes` apart, of rows as
// above. Bits 16-29: bytes from a panel to the next, / 16. 16 rows further are 2048 bytes.
__device__ __forceinline__ uint64_t panels_descriptor(SharedAddress panels, int panel_bytes) {
  constexpr uint64_t kEightRows = 8 * 128;
  return (panels & 0x3ffff) >> 4 | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
         kEightRows >> 4 << 32 | uint64_t{1} << 62;
}

}  // namespace dflare::ptx
