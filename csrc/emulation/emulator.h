// Runs CUDA kernels on the host, one fiber per CUDA thread, to test them without a GPU.
//
// The kernels of csrc/cuda compile unmodified against cuda_runtime.h and emulated_ptx.h of this
// folder. Launches queue up; synchronize() runs them with an interleaving that its seed draws:
//
//   * warps run in random order, or one as far as it gets, while another may be starved;
//   * the lanes of a warp run in random order between two warp-wide operations;
//   * cp.async lands at a random moment between its issue and the wait that covers it;
//   * thread blocks start in random order and several are resident at once;
//   * a grid launched for programmatic overlap may start as soon as all blocks of the one before
//     run, so that it may read old values until it calls ptx::wait_for_prior_kernels. As on
//     hardware, that waits for the grid before it alone: those before that one may still run if
//     it did not wait for them itself.
//
// Shared memory starts as NaN, every buffer ends at unmapped memory (guarded_memory.h). Reported
// as errors: out-of-bounds and misaligned accesses, lanes of a warp in different warp-wide
// operations, threads that exit while others wait for them, deadlocks, overlapped blocks that exit
// without having waited for the kernel before, overlapped grids whose split of an SM's memory
// differs from that of the grid before, copies after launch_dependents, uses of another block's
// shared memory that no cluster barrier keeps apart from its start or end. Not seen: the memory
// model, time. sm_90a's own units are in hopper.h.
#pragma once

#include <cuda_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace dflare::emulation {

struct Launch {
  dim3 grid, block, cluster = {};
  size_t shared_bytes = 0;
  bool overlap_prior = false;
  bool may_wait = true;        // for the kernel before, although it was not launched to overlap it
  int shared_carveout = -1;    // percent of an SM's memory asked for as shared; -1: any
  std::function<void()> body;  // the kernel, run once per thread
};

// Queues a launch behind those before it, as on one stream.
void enqueue(Launch launch);

// What a launch asked of the memories, exactly: a wavefront is one pass of 128 bytes through shared
// memory's 32 banks, a sector 32 bytes of global memory. Ordinary loads and stores are not counted.
struct Counters {
  int64_t matrix_loads = 0, matrix_load_wavefronts = 0;  // of warps; 4 wavefronts each at best
  int64_t copies = 0, copy_wavefronts = 0;  // cp.async of warps, likewise; boxes (no wavefronts)
  int64_t sectors = 0, copied_bytes = 0;    // that copies read
  int64_t prefetched_bytes = 0;             // asked into L2, of all blocks
  int64_t bytes_in_flight = 0;  // copies requested and not waited for, most of any block
  int64_t l2_bytes = 0;         // that threads load and store past L1
  int64_t block_l2_bytes = 0;   // the same, most of any block
  int64_t cluster_bytes = 0;    // loaded from the shared memory of other blocks
};

// Of the index-th launch of the last synchronize().
Counters counters(size_t index);

// Runs all queued launches. Returns an empty string or what went wrong first.
std::string synchronize(uint64_t seed);

// ------------------------------------------------------------ for the running thread

unsigned char* dynamic_shared_memory();

void block_barrier();

// A warp-wide operation: blocks until all 32 lanes have called it, then `operate` runs once with
// every lane's operand.
using WarpOperation = void (*)(void* const* operands);
void warp_operation(const char* name, void* operand, WarpOperation operate);

// Counts a warp's ldmatrix.x4: the addresses of its 32 rows of 16 bytes.
void count_matrix_load(const uintptr_t (&rows)[32]);

void cp_async(void* shared, const void* global, bool valid);
void prefetch(const void* global, size_t bytes);
void cp_async_commit();
void cp_async_wait(int pending);
// Lets products see what the thread's copies have written that it has waited for. (Of its stores
// this model knows nothing.)
void publish_to_products();

void count_l2(size_t bytes);

// Blocks of a cluster start together. All threads of those that have not ended meet at the barrier.
// Another block's shared memory, by where its place would be in this block's, exists from the first
// such barrier on (the other block has started then), and until the other block ends, which must be
// behind another one.
void cluster_barrier();
uintptr_t cluster_address(uintptr_t own, int rank);
const void* read_in_cluster(uintptr_t own, int rank, size_t bytes);

void wait_for_prior_kernels();

// A permission that the emulator does not wait for. A kernel that gives it before its wait means
// its dependents to start at once; given later, what copies after it is reported.
void launch_dependents();

// Ends the run with an error.
[[noreturn]] void fail(const std::string& what);

}  // namespace dflare::emulation
