// What a running thread may call of sm_90a's own units; csrc/cuda/ptx_sm90.cuh says what each is.
//
// Shared memory is addressed as on hardware: the copy engine and the products exchange bits 4-6 of
// an address with bits 7-9 where their map or descriptor names the 128-byte swizzle, and a
// descriptor is taken apart bit by bit. Copies land, and products read their operands and add to
// registers, at random moments between their issue and what waits for them; a warp's products one
// after another, copies in any order. Reported as errors: use of what is no barrier, of one that
// the copy engine does not know yet, more arrivals than a phase has, misaligned boxes, descriptors
// that this model cannot read, warps of a warpgroup with different products, products without a
// fence before them, of what cp.async has written and nobody has published, blocks that end with
// copies or products under way.
#pragma once

#include <cstdint>

#include "../cuda/tensor_map.h"

namespace dflare::emulation {

void mbarrier_init(uintptr_t barrier, int arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(uintptr_t barrier, int64_t expected_bytes);
void mbarrier_arrive_in_cluster(uintptr_t barrier);
void mbarrier_wait(uintptr_t barrier, uint32_t parity);

void copy_box(uintptr_t to, const TensorMap& map, int column, int row, int outer,
              uintptr_t barrier);
void copy_box_to_cluster(uintptr_t to, const TensorMap& map, int column, int row, int outer,
                         uintptr_t barrier, int mask);
void prefetch_box(const TensorMap& map, int column, int row, int outer);

void warpgroup_fence();
void warpgroup_commit();
void warpgroup_wait(int pending_groups);
// d: the thread's tokens / 2 elements; widen: from an operand's 16 bits. The left operand is four
// registers of each thread in place of `a` where they are given; b may be transposed.
void warpgroup_product(uint64_t a, uint64_t b, int tokens, float* d, float (*widen)(uint16_t),
                       const uint32_t* left = nullptr, bool transposed = false);

}  // namespace dflare::emulation
