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

// d += a * b^T, d 64 x kTokens, of 16 columns of tiles in shared memory (matrix_descriptor). Thread
// t of the warpgroup holds, in d[4 j + i], row t / 32 * 16 + t % 32 / 4 + i / 2 * 8, column
// 8 j + t % 4 * 2 + i % 2.
template <class T, int kTokens>
__device__ __forceinline__ void warpgroup_mma(float (&d)[kTokens / 2], uint64_t a, uint64_t b);

#define DFLARE_WARPGROUP_MMA(TYPE, NAME)                                                           \
  template <>                                                                                      \
  __device__ __forceinline__ void warpgroup_mma<TYPE, 16>(float (&d)[8], uint64_t a, uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32." NAME "." NAME                       \
                 " {"                                                                              \
                 "%0, %1, %2, %3, %4, %5, %6, %7"                                                  \
                 "}, %8, %9, 1, 1, 1, 0, 0;\n"                                                     \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),         \
                   "+f"(d[6]), "+f"(d[7])                                                          \
                 : "l"(a), "l"(b));                                                                \
  }
DFLARE_WARPGROUP_MMA(Bf16, "bf16")
DFLARE_WARPGROUP_MMA(Fp16, "f16")
#undef DFLARE_WARPGROUP_MMA

#define DFLARE_WARPGROUP_MMA(TYPE, NAME)                                                         \
  template <>                                                                                    \
  __device__ __forceinline__ void warpgroup_mma<TYPE, 64>(float (&d)[32], uint64_t a,            \
                                                          uint64_t b) {                          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME                     \
                 " {"                                                                            \
                 "%0, %1, %2, %3, %4, %5, %6, %7, "                                              \
                 "%8, %9, %10, %11, %12, %13, %14, %15, "                                        \
                 "%16, %17, %18, %19, %20, %21, %22, %23, "                                      \
                 "%24, %25, %26, %27, %28, %29, %30, %31"                                        \
                 "}, %32, %33, 1, 1, 1, 0, 0;\n"                                                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),       \
                   "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),     \
                   "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
                   "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), \
                   "+f"(d[30]), "+f"(d[31])                                                      \
                 : "l"(a), "l"(b));                                                              \
  }
DFLARE_WARPGROUP_MMA(Bf16, "bf16")
DFLARE_WARPGROUP_MMA(Fp16, "f16")
#undef DFLARE_WARPGROUP_MMA

#define DFLARE_WARPGROUP_MMA(TYPE, NAME)                                                         \
  template <>                                                                                    \
  __device__ __forceinline__ void warpgroup_mma<TYPE, 128>(float (&d)[64], uint64_t a,           \
                                                           uint64_t b) {                         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME                    \
                 " {"                                                                            \
                 "%0, %1, %2, %3, %4, %5, %6, %7, "                                              \
                 "%8, %9, %10, %11, %12, %13, %14, %15, "                                        \
                 "%16, %17, %18, %19, %20, %21, %22, %23, "                                      \
                 "%24, %25, %26, %27, %28, %29, %30, %31, "                                      \
                 "%32, %33, %34, %35, %36, %37, %38, %39, "                                      \
                 "%40, %41, %42, %43, %44, %45, %46, %47, "                                      \
                 "%48, %49, %50, %51, %52, %53, %54, %55, "                                      \
                 "%56, %57, %58, %59, %60, %61, %62, %63"                                        \
                 "}, %64, %65, 1, 1, 1, 0, 0;\n"                                                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),       \
                   "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),     \
                   "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
                   "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), \
                   "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), \
                   "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
                   "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
                   "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), \
                   "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), \
                   "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])                            \
                 : "l"(a), "l"(b));                                                              \
  }
DFLARE_WARPGROUP_MMA(Bf16, "bf16")
DFLARE_WARPGROUP_MMA(Fp16, "f16")
#undef DFLARE_WARPGROUP_MMA

// d += a * b, d 64 x kColumns, of 16 columns of `a` that are in registers as mma_m16n8k16 has them,
// a warp's rows after the other's; d[j] holds what mma_m16n8k16 leaves of columns 8 j to 8 j + 7. b
// holds its columns as rows (matrix_descriptor) or, if transposed, its rows (panels_descriptor).
template <class T, int kColumns, bool kTransposed>
__device__ __forceinline__ void warpgroup_mma(float (&d)[kColumns / 8][4], const uint32_t (&a)[4],
                                              uint64_t b);

#define DFLARE_WARPGROUP_MMA(TYPE, NAME)                                                      \
  template <>                                                                                 \
  __device__ __forceinline__ void warpgroup_mma<TYPE, 64, false>(                             \
      float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {                                 \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME                  \
                 " {"                                                                         \
                 "%0, %1, %2, %3, %4, %5, %6, %7, "                                           \
                 "%8, %9, %10, %11, %12, %13, %14, %15, "                                     \
                 "%16, %17, %18, %19, %20, %21, %22, %23, "                                   \
                 "%24, %25, %26, %27, %28, %29, %30, %31"                                     \
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;\n"                                \
                 : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), \
                   "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), \
                   "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), \
                   "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), \
                   "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), \
                   "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), \
                   "+f"(d[7][2]), "+f"(d[7][3])                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                       \
  }
DFLARE_WARPGROUP_MMA(Bf16, "bf16")
DFLARE_WARPGROUP_MMA(Fp16, "f16")
#undef DFLARE_WARPGROUP_MMA

#define DFLARE_WARPGROUP_MMA(TYPE, NAME)                                                           \
  template <>                                                                                      \
  __device__ __forceinline__ void warpgroup_mma<TYPE, 128, true>(                                  \
      float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME                      \
                 " {"                                                                              \
                 "%0, %1, %2, %3, %4, %5, %6, %7, "                                                \
                 "%8, %9, %10, %11, %12, %13, %14, %15, "                                          \
                 "%16, %17, %18, %19, %20, %21, %22, %23, "                                        \
                 "%24, %25, %26, %27, %28, %29, %30, %31, "                                        \
                 "%32, %33, %34, %35, %36, %37, %38, %39, "                                        \
                 "%40, %41, %42, %43, %44, %45, %46, %47, "                                        \
                 "%48, %49, %50, %51, %52, %53, %54, %55, "                                        \
                 "%56, %57, %58, %59, %60, %61, %62, %63"                                          \
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"                                     \
                 : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]),      \
                   "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]),      \
                   "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]),      \
                   "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),      \
                   "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]),      \
                   "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),      \
                   "+f"(d[7][2]), "+f"(d[7][3]), "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]),      \
                   "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]),      \
                   "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), \
                   "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]), "+f"(d[12][0]), "+f"(d[12][1]), \
                   "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), \
                   "+f"(d[13][3]), "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), \
                   "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                            \
  }
DFLARE_WARPGROUP_MMA(Bf16, "bf16")
DFLARE_WARPGROUP_MMA(Fp16, "f16")
#undef DFLARE_WARPGROUP_MMA

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
