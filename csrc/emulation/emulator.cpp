// What a running thread may call: barriers, warp-wide operations, asynchronous copies.
#include "emulator.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "machine.h"

namespace dflare::emulation {

namespace {

void land(AsyncCopy& copy) {
  if (std::exchange(copy.landed, true)) return;
  if (copy.valid) {
    std::memcpy(copy.shared, copy.global, 16);
  } else {
    std::memset(copy.shared, 0, 16);
  }
}

// Which 16 bytes of the block's shared memory.
size_t place_of(const Block& block, uintptr_t at) {
  const size_t offset = at - reinterpret_cast<uintptr_t>(block.shared);
  if (offset >= block.shared_bytes) fail("cp.async to an address beyond the block's shared memory");
  return offset / 16;
}

}  // namespace

int wavefronts(const uintptr_t (&addresses)[32]) {
  int total = 0;
  for (int first = 0; first < 32; first += 8) {
    std::set<uintptr_t> columns[8];
    size_t most = 0;
    for (int lane = first; lane < first + 8; ++lane) {
      if (addresses[lane] == 0) continue;
      auto& column = columns[addresses[lane] / 16 % 8];
      column.insert(addresses[lane]);
      most = std::max(most, column.size());
    }
    total += static_cast<int>(most);
  }
  return total;
}

void count_matrix_load(const uintptr_t (&rows)[32]) {
  Counters& c = machine().running->warp->block->grid->counters;
  ++c.matrix_loads;
  c.matrix_load_wavefronts += wavefronts(rows);
}

unsigned char* dynamic_shared_memory() { return machine().running->warp->block->shared; }

void block_barrier() {
  Block& block = *machine().running->warp->block;
  if (block.live < block.threads) fail("block barrier after a thread of the block has exited");
  if (++block.at_barrier < block.threads) {
    suspend(State::kAtBarrier);
    return;
  }
  block.at_barrier = 0;
  for_each_thread(block, [](Thread& t) {
    if (t.state == State::kAtBarrier) make_ready(t);
  });
}

void open_if_all_wait(Cluster& cluster) {
  if (cluster.at_barrier == 0 || cluster.at_barrier < cluster.live) return;
  cluster.at_barrier = 0;
  ++cluster.barriers;
  for (Block* block : cluster.blocks) {
    if (block == nullptr) continue;
    for_each_thread(*block, [](Thread& t) {
      if (t.state == State::kAtClusterBarrier) make_ready(t);
    });
  }
}

void cluster_barrier() {
  Cluster& cluster = *machine().running->warp->block->cluster;
  ++cluster.at_barrier;
  machine().running->state = State::kAtClusterBarrier;
  open_if_all_wait(cluster);
  suspend(machine().running->state);
}

Block& block_of(int rank) {
  const Cluster& cluster = *machine().running->warp->block->cluster;
  if (rank < 0 || rank >= static_cast<int>(cluster.blocks.size())) {
    fail("a rank beyond the cluster");
  }
  if (cluster.barriers == 0) {
    fail("uses another block's shared memory before a cluster barrier: it may not have started");
  }
  Block* block = cluster.blocks[rank];
  if (block == nullptr) fail("uses the shared memory of a block that has ended");
  if (block != machine().running->warp->block) block->used_behind = cluster.barriers;
  return *block;
}

uintptr_t cluster_address(uintptr_t own, int rank) {
  const Block& self = *machine().running->warp->block;
  const auto offset = own - reinterpret_cast<uintptr_t>(self.shared);
  if (offset >= self.shared_bytes) fail("an address beyond the block's shared memory");
  return reinterpret_cast<uintptr_t>(block_of(rank).shared) + offset;
}

const void* read_in_cluster(uintptr_t own, int rank, size_t bytes) {
  Block& self = *machine().running->warp->block;
  const uintptr_t there = cluster_address(own, rank);
  if (there != own) self.grid->counters.cluster_bytes += static_cast<int64_t>(bytes);
  return reinterpret_cast<const void*>(there);
}

void count_l2(size_t bytes) {
  Block& block = *machine().running->warp->block;
  block.l2_bytes += static_cast<int64_t>(bytes);
  Counters& c = block.grid->counters;
  c.l2_bytes += static_cast<int64_t>(bytes);
  c.block_l2_bytes = std::max(c.block_l2_bytes, block.l2_bytes);
}

void warp_operation(const char* name, void* operand, WarpOperation operate) {
  Thread& self = *machine().running;
  Warp& warp = *self.warp;
  if (warp.arrived > 0 && warp.operation != operate) {
    fail(std::string("lanes of a warp in ") + warp.operation_name + " and in " + name);
  }
  warp.operation = operate;
  warp.operation_name = name;
  warp.operands[self.thread_index.x % 32] = operand;
  if (++warp.arrived < 32) {
    suspend(State::kInWarpOperation);
    return;
  }
  warp.arrived = 0;
  operate(warp.operands);
  for (auto& thread : warp.threads) {
    if (thread->state == State::kInWarpOperation) make_ready(*thread);
  }
}

void cp_async(void* shared, const void* global, bool valid) {
  Machine& m = machine();
  if (m.running->launched_dependents) {
    fail("cp.async after launch_dependents: the next kernel's blocks would take the SM from it");
  }
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) fail("cp.async to a misaligned address");
  if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail("cp.async from a misaligned address");
  }
  Thread& self = *m.running;
  auto& warp_copies = self.warp->copies;
  if (warp_copies.size() <= self.copies) warp_copies.resize(self.copies + 1);
  WarpCopy& warp_copy = warp_copies[self.copies++];
  warp_copy.shared[self.thread_index.x % 32] = reinterpret_cast<uintptr_t>(shared);
  if (valid) {
    warp_copy.global[self.thread_index.x % 32] = reinterpret_cast<uintptr_t>(global);
    self.uncommitted_bytes += 16;
    self.in_flight += 16;
    self.most_in_flight = std::max(self.most_in_flight, self.in_flight);
  }
  Block& block = *self.warp->block;
  block.unpublished.resize(block.shared_bytes / 16);
  block.unpublished[place_of(block, reinterpret_cast<uintptr_t>(shared))] = true;
  auto& pending = self.uncommitted;
  pending.push_back({shared, global, valid, false});
  if (m.chance(0.5)) land(pending.back());
  if (m.chance(0.1)) land(pending[m.below(pending.size())]);
}

void prefetch(const void* global, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0) {
    fail("prefetch that is no whole number of 16-byte pieces");
  }
  machine().running->warp->block->grid->counters.prefetched_bytes += static_cast<int64_t>(bytes);
  const auto* first = static_cast<const volatile unsigned char*>(global);
  if (bytes > 0) static_cast<void>(first[0]), static_cast<void>(first[bytes - 1]);
}

void cp_async_commit() {
  Thread& self = *machine().running;
  self.groups.push_back(std::move(self.uncommitted));
  self.uncommitted.clear();
  self.group_bytes.push_back(self.uncommitted_bytes);
  self.uncommitted_bytes = 0;
}

void cp_async_wait(int pending) {
  Thread& self = *machine().running;
  auto& groups = self.groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (AsyncCopy& copy : groups.front()) {
      land(copy);
      self.unpublished.push_back(reinterpret_cast<uintptr_t>(copy.shared));
    }
    groups.pop_front();
    self.in_flight -= self.group_bytes.front();
    self.group_bytes.pop_front();
  }
}

void publish_to_products() {
  Thread& self = *machine().running;
  Block& block = *self.warp->block;
  for (uintptr_t at : self.unpublished) block.unpublished[place_of(block, at)] = false;
  self.unpublished.clear();
}

void wait_for_prior_kernels() {
  Block& block = *machine().running->warp->block;
  const Launch& launch = block.grid->launch;
  if (!launch.overlap_prior && !launch.may_wait) {
    fail("waits for the kernel before, but was launched without programmatic overlap");
  }
  block.waited = machine().running->waited = true;
  while (!prior_done(*block.grid)) suspend(State::kAwaitingKernels);
}

void launch_dependents() {
  Thread& self = *machine().running;
  self.launched_dependents = self.waited;
}

void fail(const std::string& what) {
  Machine& m = machine();
  m.error = what + describe(*m.running);
  dflare_switch_stack(&m.running->stack_pointer, m.stack_pointer);
  __builtin_unreachable();
}

}  // namespace dflare::emulation
