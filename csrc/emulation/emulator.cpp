// What a running thread may call: barriers, warp-wide operations, asynchronous copies.
#include "emulator.h"

#include <cstring>

#include "machine.h"

namespace dflare::emulation {

namespace {

void land(const AsyncCopy& copy) {
  if (copy.valid) {
    std::memcpy(copy.shared, copy.global, 16);
  } else {
    std::memset(copy.shared, 0, 16);
  }
}

}  // namespace

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
  const AsyncCopy copy{shared, global, valid};
  auto& pending = m.running->uncommitted;
  if (m.chance(0.5)) {
    land(copy);
  } else {
    pending.push_back(copy);
  }
  if (!pending.empty() && m.chance(0.1)) {
    land(pending.back());
    pending.pop_back();
  }
}

void cp_async_commit() {
  Thread& self = *machine().running;
  self.groups.push_back(std::move(self.uncommitted));
  self.uncommitted.clear();
}

void cp_async_wait(int pending) {
  auto& groups = machine().running->groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const AsyncCopy& copy : groups.front()) land(copy);
    groups.pop_front();
  }
}

void wait_for_prior_kernels() {
  Block& block = *machine().running->warp->block;
  block.waited = true;
  while (!prior_done(*block.grid)) suspend(State::kAwaitingKernels);
}

void launch_dependents() { machine().running->launched_dependents = true; }

void fail(const std::string& what) {
  Machine& m = machine();
  m.error = what + describe(*m.running);
  dflare_switch_stack(&m.running->stack_pointer, m.stack_pointer);
  __builtin_unreachable();
}

}  // namespace dflare::emulation
