// The wrappers of csrc/cuda/ptx_sm90.cuh for the host: same names, same meaning.
#pragma once

#include "emulated_ptx.h"
#include "hopper.h"

namespace dflare::ptx {

inline void barrier_init(SharedAddress barrier, int arrivals) {
  emulation::mbarrier_init(barrier, arrivals);
}
inline void fence_barrier_init() { emulation::fence_mbarrier_init(); }
inline void barrier_arrive(SharedAddress barrier) { emulation::mbarrier_arrive(barrier, 0); }
inline void barrier_arrive_in_cluster(SharedAddress barrier) {
  emulation::mbarrier_arrive_in_cluster(barrier);
}
inline void barrier_arrive_expecting(SharedAddress barrier, int bytes) {
  emulation::mbarrier_arrive(barrier, bytes);
}
inline void barrier_wait(SharedAddress barrier, uint32_t parity) {
  emulation::mbarrier_wait(barrier, parity);
}

inline void copy_box(SharedAddress to, const TensorMap& map, int column, int row, int outer,
                     SharedAddress barrier) {
  emulation::copy_box(to, map, column, row, outer, barrier);
}
inline void copy_box_to_cluster(SharedAddress to, const TensorMap& map, int column, int row,
                                int outer, SharedAddress barrier, int mask) {
  emulation::copy_box_to_cluster(to, map, column, row, outer, barrier, mask);
}
inline void prefetch_box(const TensorMap& map, int column, int row, int outer) {
  emulation::prefetch_box(map, column, row, outer);
}
inline void prefetch_map(const TensorMap&) {}

inline void warpgroup_fence() { emulation::warpgroup_fence(); }
inline void warpgroup_commit() { emulation::warpgroup_commit(); }
template <int kPending>
void warpgroup_wait() {
  emulation::warpgroup_wait(kPending);
}
inline void settle(float&) {}

inline void publish_to_products() { emulation::publish_to_products(); }

template <class T, int kColumns, bool kTransposed>
void warpgroup_mma(float (&d)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b) {
  emulation::warpgroup_product(0, b, kColumns, &d[0][0], widen<T>, a, kTransposed);
}
template <class T, int kTokens>
void warpgroup_mma(float (&d)[kTokens / 2], uint64_t a, uint64_t b) {
  emulation::warpgroup_product(a, b, kTokens, d, widen<T>);
}

}  // namespace dflare::ptx
