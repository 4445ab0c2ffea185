// What the emulator knows of the machine: queued and running grids, and the threads of the latter.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/tensor_map.h"
#include "cuda_runtime.h"
#include "emulator.h"
#include "fiber.h"

namespace dflare::emulation {

struct Block;
struct Thread;
struct Warp;

enum class State {
  kReady,
  kInWarpOperation,
  kAtBarrier,
  kAtClusterBarrier,
  kAtMbarrier,
  kAwaitingKernels,
  kDone
};

struct AsyncCopy {
  void* shared;
  const void* global;
  bool valid, landed;
};

// The lanes' parts of one cp.async instruction of a warp, the n-th that each lane has issued.
struct WarpCopy {
  uintptr_t shared[32] = {}, global[32] = {};  // 0: the lane takes no part, or reads nothing
};

// A barrier in shared memory: a phase ends with `pending` arrivals and `bytes` both at 0.
struct Mbarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0, in_flight = 0;  // expected and not written; requested and not waited for
  uint64_t phase = 0;
  const Thread* initialiser = nullptr;
  bool known_to_copies = false;
};

struct BoxCopy {
  TensorMap map;
  uintptr_t to;
  int64_t column, row, outer;
  uintptr_t barrier;
};

// A warp's sixteen rows of a warpgroup's product.
struct Product {
  uint64_t a, b;    // descriptors; a is 0 where the left operand is in registers
  int tokens;       // columns
  bool transposed;  // b
  float (*widen)(uint16_t);
  float* d[32];
  const uint32_t* left[32];  // registers
};

struct Thread {
  Stack stack;
  void* stack_pointer = nullptr;
  dim3 thread_index, block_index;
  State state = State::kDone;
  Warp* warp = nullptr;
  bool waited = false;               // for the kernel before
  bool launched_dependents = false;  // after that
  uintptr_t awaited = 0;             // the barrier in shared memory
  size_t copies = 0;                 // that it has issued
  int64_t in_flight = 0, most_in_flight = 0, uncommitted_bytes = 0;
  std::deque<int64_t> group_bytes;
  std::vector<AsyncCopy> uncommitted;
  std::deque<std::vector<AsyncCopy>> groups;
  std::vector<uintptr_t> unpublished;  // places of copies that it has waited for
};

struct Warp {
  Block* block = nullptr;
  std::vector<std::unique_ptr<Thread>> threads;
  bool queued = false;
  std::vector<WarpCopy> copies;
  int arrived = 0;
  WarpOperation operation = nullptr;
  const char* operation_name = nullptr;
  void* operands[32];
  bool fenced = false;            // for products
  std::vector<Product> products;  // of no group yet
  std::vector<std::vector<Product>> product_groups;
  size_t issued_products = 0;
  std::vector<std::pair<uint64_t, uint64_t>> agreed_products;  // of a warpgroup's first warp
};

struct Grid {
  Launch launch;
  std::vector<unsigned> order;       // in which its clusters start; usually each is one block
  size_t started = 0, finished = 0;  // clusters, blocks
  const Grid* prior = nullptr;       // the one before it in the stream
  Counters counters;
  size_t blocks() const { return size_t{launch.grid.x} * launch.grid.y * launch.grid.z; }
  size_t cluster_size() const {
    return size_t{launch.cluster.x} * launch.cluster.y * launch.cluster.z;
  }
  bool done() const { return finished == blocks(); }
};

struct Cluster {
  std::vector<Block*> blocks;    // by rank; null: it has ended
  int live = 0, at_barrier = 0;  // threads
  int barriers = 0;              // that they have passed
};

struct Block {
  Grid* grid = nullptr;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  int threads = 0, live = 0, at_barrier = 0;
  bool waited = false;
  std::shared_ptr<Cluster> cluster;
  int used_behind = 0;  // so many of the cluster's barriers others have used its shared memory
  int64_t l2_bytes = 0;
  std::map<uintptr_t, Mbarrier> mbarriers;
  std::vector<BoxCopy> box_copies;
  std::vector<bool> unpublished;              // 16-byte places of copies that products may not see
  int64_t in_flight = 0, most_in_flight = 0;  // bytes of box copies
};

struct Machine {
  std::vector<Grid> grids;
  std::vector<Launch> queue;
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<std::unique_ptr<Thread>> idle_threads;
  std::vector<Warp*> ready;
  Thread* running = nullptr;
  void* stack_pointer = nullptr;  // of the scheduler
  std::mt19937_64 random;
  std::string error;
  // The seed's temper.
  double run_on = 0;        // probability to continue the warp that ran last
  double prefer_later = 0;  // probability to start blocks of an overlapping grid first
  double land_often = 0;    // probability that a box copy or product happens before a warp
  size_t resident_threads = 0, most_resident_threads = 0;
  Warp* starved = nullptr;
  int starved_for = 0;
  int under_way = 0;  // box copies and products of all blocks

  uint64_t below(uint64_t n) { return random() % n; }
  bool chance(double p) { return static_cast<double>(random() % 1000) < p * 1000; }
};

Machine& machine();

// ------------------------------------------------------------ for the running thread

// Back to the scheduler; continues when the scheduler picks the thread again.
void suspend(State state);

// ------------------------------------------------------------ for all

void make_ready(Thread& thread);

// The cluster's block of this rank, whose shared memory the running thread uses.
Block& block_of(int rank);

// A thread of the cluster has come to its barrier or ended: opens it if all others have, too.
void open_if_all_wait(Cluster& cluster);

// Passes through shared memory of 32 lanes' 16-byte accesses: eight lanes at a time, in as many
// passes as pieces of theirs lie in one of the eight 16-byte columns of the banks. 0: no access.
int wavefronts(const uintptr_t (&addresses)[32]);

// Lets a box copy or a product of the block happen, if it draws one.
bool land_one_of(Block& block);

// What a block that ends has left under way, or an empty string.
std::string unfinished(const Block& block);

template <class Visit>
void for_each_thread(Block& block, Visit visit) {
  for (Warp& warp : block.warps) {
    for (auto& thread : warp.threads) visit(*thread);
  }
}

// Whether the kernel before this one has finished: all that a dependent launch waits for.
inline bool prior_done(const Grid& grid) { return grid.prior == nullptr || grid.prior->done(); }

// "(block x,y,z, thread t)", for messages.
std::string describe(const Thread& thread);

}  // namespace dflare::emulation
