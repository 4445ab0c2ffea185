// C interface of the emulator for tests: its operators take the place of those that Torch has for
// the CPU, with kernels that queue up until they are told to run.
#include <memory>

#include "../cuda/launch.cuh"
#include "../cuda/params.h"
#include "cuda/torch_device.h"
#include "emulator.h"
#include "guarded_memory.h"

namespace {

std::unique_ptr<torch::stable::detail::StableLibrary> registered;

// Stands for the kernel before an operator's: it writes what that one must wait for, and late.
struct ProduceParams {
  void* to;
  const void* from;
  size_t bytes;
};
void produce_kernel(ProduceParams p) {
  for (int i = 0; i < 64; ++i) __syncthreads();  // where the kernels after it may overtake it
  if (threadIdx.x == 0) std::memcpy(p.to, p.from, p.bytes);
}

}  // namespace

using dflare::cuda::queue;

#pragma GCC visibility push(default)
extern "C" {

// Puts torch.ops.dflare.* of the CPU on a device of so many multiprocessors, shared memory of one,
// and compute capability, or takes them off it.
void emu_install(int sm_count, int shared_memory_per_sm, int capability) {
  using torch::stable::detail::StableLibrary;
  dflare::emulated_device = {sm_count, shared_memory_per_sm, capability};
  registered = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "dflare", "CPU", __FILE__,
                                               __LINE__);
  for (const auto registration : dflare::cuda::registrations()) registration(*registered);
}
void emu_uninstall() { registered.reset(); }

// From here on kernels queue up, to run with the thread schedule that the seed draws.
void emu_open_queue(uint64_t seed) {
  queue.open = true;
  queue.seed = seed;
}
// Runs what was queued; null or a description of the first error, valid until the next call.
const char* emu_run_queue() {
  static std::string error;
  error = dflare::cuda::run_queue();
  return error.empty() ? nullptr : error.c_str();
}
// Takes back what operators allocated since the queue was opened, results included.
void emu_close_queue() {
  queue.open = false;
  queue.products.clear();
  for (void* data : queue.scratch) dflare::emulation::release_guarded(data);
  queue.scratch.clear();
}

void* emu_allocate(size_t bytes, const char* name) {
  return dflare::emulation::allocate_guarded(bytes, 16, name);
}
void emu_release(void* data) { dflare::emulation::release_guarded(data); }

int emu_produce(void* to, const void* from, size_t bytes) {
  return dflare::launch(produce_kernel, dim3(1), 32, 0, false, ProduceParams{to, from, bytes},
                        nullptr);
}
// Of the index-th launch of the last run: the fields of emulation::Counters in order.
void emu_counters(size_t index, int64_t (&out)[11]) {
  const dflare::emulation::Counters c = dflare::emulation::counters(index);
  static_assert(sizeof(c) == sizeof(out));
  std::memcpy(out, &c, sizeof(out));
}
int emu_attention_first_tile(int tiles, int part, int parts) {
  return dflare::attention_first_tile(tiles, part, parts);
}
}
#pragma GCC visibility pop
