// Which thread runs next: enqueue and synchronize of emulator.h.
#include <algorithm>
#include <numeric>
#include <set>

#include "guarded_memory.h"
#include "machine.h"

namespace dflare::emulation {

Machine& machine() {
  static Machine m;
  return m;
}

void suspend(State state) {
  Machine& m = machine();
  m.running->state = state;
  dflare_switch_stack(&m.running->stack_pointer, m.stack_pointer);
}

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  if (!thread.warp->queued) {
    thread.warp->queued = true;
    machine().ready.push_back(thread.warp);
  }
}

std::string describe(const Thread& thread) {
  const dim3 b = thread.block_index;
  return " (block " + std::to_string(b.x) + "," + std::to_string(b.y) + "," + std::to_string(b.z) +
         ", thread " + std::to_string(thread.thread_index.x) + ")";
}

namespace {

void enter() {
  Machine& m = machine();
  m.running->warp->block->grid->launch.body();
  m.running->state = State::kDone;
  dflare_switch_stack(&m.running->stack_pointer, m.stack_pointer);
  __builtin_unreachable();
}

bool may_start(size_t index) {
  const Grid& grid = machine().grids[index];
  // CUDA starts an overlapped grid when every block of the one before has launched dependents or
  // exited, but promises nothing of what their writes look like before the wait. Starting it as
  // soon as they all run shows every state that it could see.
  if (grid.launch.overlap_prior) {
    return grid.prior == nullptr || grid.prior->started == grid.prior->order.size();
  }
  for (const Grid* prior = grid.prior; prior != nullptr; prior = prior->prior) {
    if (!prior->done()) return false;
  }
  return true;
}

std::unique_ptr<Block> make_block(Grid& grid, dim3 index) {
  Machine& m = machine();
  auto block = std::make_unique<Block>();
  block->grid = &grid;
  block->threads = block->live = static_cast<int>(grid.launch.block.x);
  block->shared_bytes = grid.launch.shared_bytes;
  if (block->shared_bytes > 0) {
    // As on sm_90, where the driver keeps the first 1024 bytes; else where the end is guarded best.
    const size_t alignment = block->shared_bytes % 1024 == 0 ? 1024 : 128;
    block->shared = static_cast<unsigned char*>(
        allocate_guarded(block->shared_bytes, alignment, "shared memory"));
    if (block->shared == nullptr) throw std::bad_alloc();
  }
  block->warps.resize(block->threads / 32);
  for (size_t w = 0; w < block->warps.size(); ++w) {
    Warp& warp = block->warps[w];
    warp.block = block.get();
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (m.idle_threads.empty()) m.idle_threads.push_back(std::make_unique<Thread>());
      auto thread = std::move(m.idle_threads.back());
      m.idle_threads.pop_back();
      thread->warp = &warp;
      thread->thread_index = dim3(static_cast<unsigned>(w) * 32 + lane, 0, 0);
      thread->block_index = index;
      thread->waited = thread->launched_dependents = false;
      thread->copies = 0;
      thread->in_flight = thread->most_in_flight = thread->uncommitted_bytes = 0;
      thread->group_bytes.clear();
      thread->uncommitted.clear();
      thread->unpublished.clear();
      thread->groups.clear();
      thread->stack_pointer = thread->stack.prepare(enter);
      warp.threads.push_back(std::move(thread));
    }
  }
  return block;
}

// The index-th coordinates of a grid.
dim3 coordinates(unsigned index, dim3 dims) {
  return dim3(index % dims.x, index / dims.x % dims.y, index / dims.x / dims.y);
}

void start_cluster(Grid& grid) {
  Machine& m = machine();
  const dim3 size = grid.launch.cluster, dims = grid.launch.grid;
  const dim3 at = coordinates(grid.order[grid.started++],
                              dim3(dims.x / size.x, dims.y / size.y, dims.z / size.z));
  const auto cluster = std::make_shared<Cluster>();
  for (unsigned rank = 0; rank < grid.cluster_size(); ++rank) {
    const dim3 in = coordinates(rank, size);
    auto block =
        make_block(grid, dim3(at.x * size.x + in.x, at.y * size.y + in.y, at.z * size.z + in.z));
    block->cluster = cluster;
    cluster->blocks.push_back(block.get());
    cluster->live += block->threads;
    for_each_thread(*block, make_ready);
    m.resident_threads += block->threads;
    m.resident.push_back(std::move(block));
  }
}

void start_clusters() {
  Machine& m = machine();
  while (true) {
    std::vector<size_t> startable;
    for (size_t i = 0; i < m.grids.size(); ++i) {
      const Grid& grid = m.grids[i];
      if (grid.started < grid.order.size() && may_start(i)) startable.push_back(i);
    }
    if (startable.empty()) return;
    const size_t pick = m.chance(m.prefer_later) ? startable.back() : startable.front();
    const Grid& grid = m.grids[pick];
    const size_t threads = grid.launch.block.x * grid.cluster_size();
    const bool fits = m.resident_threads + threads <= m.most_resident_threads;
    if (!fits && !m.resident.empty()) return;
    start_cluster(m.grids[pick]);
  }
}

void count_copies(const Block& block) {
  Counters& c = block.grid->counters;
  int64_t in_flight = block.most_in_flight;
  for (const Warp& warp : block.warps) {
    for (const auto& thread : warp.threads) in_flight += thread->most_in_flight;
    for (const WarpCopy& copy : warp.copies) {
      ++c.copies;
      c.copy_wavefronts += wavefronts(copy.shared);
      std::set<uintptr_t> sectors;
      for (const uintptr_t at : copy.global) {
        if (at != 0) sectors.insert(at / 32), c.copied_bytes += 16;
      }
      c.sectors += static_cast<int64_t>(sectors.size());
    }
  }
  c.bytes_in_flight = std::max(c.bytes_in_flight, in_flight);
}

void finish_block(Block& block) {
  Machine& m = machine();
  if (block.grid->launch.overlap_prior && !block.waited) {
    m.error =
        "a block of an overlapped launch exits without wait_for_prior_kernels: the kernel "
        "after it waits for this one alone and could run before the one before it has finished";
    return;
  }
  m.error = unfinished(block);
  if (!m.error.empty()) return;
  auto& blocks = block.cluster->blocks;
  if (block.used_behind > 0 && block.used_behind == block.cluster->barriers) {
    m.error =
        "a block ends although others have used its shared memory since the last cluster barrier";
    return;
  }
  *std::find(blocks.begin(), blocks.end(), &block) = nullptr;
  ++block.grid->finished;
  count_copies(block);
  m.resident_threads -= block.threads;
  for (Warp& warp : block.warps) {
    if (m.starved == &warp) m.starved = nullptr;
    for (auto& thread : warp.threads) {
      if (thread->stack.overflowed()) m.error = "a thread's stack has overflowed";
      m.idle_threads.push_back(std::move(thread));
    }
  }
  if (block.shared != nullptr) {
    if (m.error.empty()) m.error = check_guards();
    release_guarded(block.shared);
  }
  std::erase_if(m.ready, [&](const Warp* warp) { return warp->block == &block; });
  std::erase_if(m.resident, [&](const auto& b) { return b.get() == &block; });
  for (auto& other : m.resident) {
    if (!prior_done(*other->grid)) continue;
    for_each_thread(*other, [](Thread& t) {
      if (t.state == State::kAwaitingKernels) make_ready(t);
    });
  }
}

Warp* pick_warp() {
  Machine& m = machine();
  if (m.starved_for-- <= 0) {
    m.starved = m.ready[m.below(m.ready.size())];
    m.starved_for = 1 << m.below(15);  // from one step to whole tiles of work
  }
  size_t pick = m.chance(m.run_on) ? m.ready.size() - 1 : m.below(m.ready.size());
  if (m.ready[pick] == m.starved) pick = m.below(m.ready.size());
  if (m.ready[pick] == m.starved && m.ready.size() > 1) pick = (pick + 1) % m.ready.size();
  Warp* warp = m.ready[pick];
  m.ready.erase(m.ready.begin() + static_cast<ptrdiff_t>(pick));
  warp->queued = false;
  return warp;
}

// Runs each ready lane up to its next suspension.
void step(Warp& warp) {
  Machine& m = machine();
  int lanes[32];
  std::iota(lanes, lanes + 32, 0);
  for (int i = 31; i > 0; --i) std::swap(lanes[i], lanes[m.below(i + 1)]);
  Block& block = *warp.block;
  blockDim = block.grid->launch.block;
  gridDim = block.grid->launch.grid;
  for (const int lane : lanes) {
    Thread& thread = *warp.threads[lane];
    if (thread.state != State::kReady) continue;
    m.running = &thread;
    threadIdx = thread.thread_index;
    blockIdx = thread.block_index;
    dflare_switch_stack(&m.stack_pointer, thread.stack_pointer);
    if (!m.error.empty()) return;
    if (thread.state != State::kDone) continue;
    const auto cluster = block.cluster;
    const bool ended = --block.live == 0;
    if (ended) finish_block(block);
    --cluster->live;
    open_if_all_wait(*cluster);
    if (ended) return;
  }
}

std::string describe_deadlock() {
  for (const auto& block : machine().resident) {
    for (const Warp& warp : block->warps) {
      for (const auto& thread : warp.threads) {
        switch (thread->state) {
          case State::kInWarpOperation:
            return std::string("deadlock: waits for the other lanes in ") + warp.operation_name +
                   describe(*thread);
          case State::kAtBarrier: return "deadlock: waits at the block barrier" + describe(*thread);
          case State::kAtClusterBarrier:
            return "deadlock: waits at the cluster barrier" + describe(*thread);
          case State::kAtMbarrier:
            return "deadlock: waits for a phase of a barrier" + describe(*thread);
          case State::kAwaitingKernels:
            return "deadlock: waits for the kernels before" + describe(*thread);
          default: break;
        }
      }
    }
  }
  return "deadlock";
}

void prepare(uint64_t seed) {
  Machine& m = machine();
  m.random.seed(seed);
  m.error.clear();
  m.ready.clear();
  m.starved = nullptr;
  m.resident_threads = 0;
  m.under_way = 0;
  for (auto& block : m.resident) {  // left by a run that failed
    if (block->shared != nullptr) release_guarded(block->shared);
    for (Warp& warp : block->warps) {
      for (auto& thread : warp.threads) m.idle_threads.push_back(std::move(thread));
    }
  }
  m.resident.clear();
  m.run_on = std::initializer_list<double>{0.0, 0.9, 1.0}.begin()[m.below(3)];
  m.prefer_later = m.chance(0.5) ? 1.0 : 0.5;
  m.most_resident_threads = m.chance(0.3) ? 1 : 512 + m.below(2048);
  m.land_often = std::initializer_list<double>{0.05, 0.3, 0.9}.begin()[m.below(3)];
  m.grids.clear();
  for (Launch& launch : m.queue) {
    Grid grid{.launch = std::move(launch), .order = {}};
    grid.order.resize(grid.blocks() / grid.cluster_size());
    std::iota(grid.order.begin(), grid.order.end(), 0u);
    std::shuffle(grid.order.begin(), grid.order.end(), m.random);
    m.grids.push_back(std::move(grid));
  }
  m.queue.clear();
  for (size_t i = 1; i < m.grids.size(); ++i) {
    m.grids[i].prior = &m.grids[i - 1];
    const Launch &launch = m.grids[i].launch, &before = m.grids[i - 1].launch;
    if (launch.overlap_prior && launch.shared_carveout != before.shared_carveout) {
      m.error =
          "an overlapped launch asks for another split of an SM's memory than the one before it: "
          "the SM would have to drain first";
    }
  }
}

void run() {
  Machine& m = machine();
  while (m.error.empty()) {
    start_clusters();
    if (m.resident.empty()) return;
    if (m.under_way > 0 && (m.ready.empty() || m.chance(m.land_often))) {
      land_one_of(*m.resident[m.below(m.resident.size())]);
      continue;
    }
    if (m.ready.empty()) {
      m.error = describe_deadlock();
      return;
    }
    step(*pick_warp());
  }
}

}  // namespace

Counters counters(size_t index) {
  const auto& grids = machine().grids;
  return index < grids.size() ? grids[index].counters : Counters{};
}

void enqueue(Launch launch) { machine().queue.push_back(std::move(launch)); }

std::string synchronize(uint64_t seed) {
  static sigjmp_buf fault;
  Machine& m = machine();
  prepare(seed);
  FaultCatcher catcher(fault);
  if (sigsetjmp(fault, 1) == 0) {
    run();
  } else {
    m.error = FaultCatcher::description() + describe(*m.running);
  }
  if (m.error.empty()) m.error = check_guards();
  return m.error;
}

}  // namespace dflare::emulation
