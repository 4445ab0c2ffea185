// What the operators (../aten) and the tests use of the test device beside the CUDA runtime API.
//
// The test device is a CUDA runtime (libcudart) without a GPU. Device memory is host memory, a
// stream is a queue of closures, and a graph is a set of them with edges. PyTorch's caching
// allocator, streams, events, pinned memory and CUDA graphs work on top of it, unchanged.
//
// Eager: work runs when it is enqueued. Lazy: it waits in its stream until the host waits for
// something; then heads of streams and branches of graphs run in a random order that respects
// streams, events and graph edges.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace testdevice {

// Bytes that a piece of work reads or writes.
struct Access {
  uintptr_t begin, end;
  bool write;
};

struct Work {
  std::string name;
  std::function<void()> run;
  std::vector<Access> accesses;
  // Of a kernel: runs what `run` has queued, together with kernels that overlap it.
  std::function<void()> finish{};
  bool overlaps_prior = false;
};

// Puts work on a stream: runs it now (eager; its exceptions are the caller's), later (lazy), or at
// every replay (while the stream is captured). Work that fails later leaves an error that all
// following calls return, as on a device; its text names the work and where it was enqueued.
cudaError_t enqueue(cudaStream_t stream, Work work);

// Says that the work which was enqueued last on the stream also touches these.
void add_accesses(cudaStream_t stream, const std::vector<Access>& accesses);

// How many pieces of work were enqueued on the stream so far, or captured from it.
size_t count_enqueued(cudaStream_t stream);

// A kernel that can be launched, by the address that the host knows it by.
struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  bool overlap_prior;   // programmatic stream serialization
  int shared_carveout;  // percent of an SM's memory that is asked for as shared; -1: any
  dim3 cluster;
};
struct Kernel {
  std::string name;
  // Takes the arguments' values; what it returns queues the kernel.
  std::function<std::function<void()>(const Launch&, void** arguments)> bind;
  std::function<void()> finish;
};
void register_kernel(const void* function, Kernel kernel);

// Waits for a stream, as a blocking copy does; an error while the stream is captured.
cudaError_t wait(cudaStream_t stream, const char* why);

bool capturing(cudaStream_t stream);
bool lazy();
void set_lazy(bool on, uint64_t seed);

// Work that touches more bytes is not run, nor is any kernel of ours: its results are what memory
// held before, zeros if it is fresh. For models of sizes whose memory is counted, not touched.
void set_work_limit(size_t bytes);
bool has_work_limit();

// Bytes of device memory that cudaMemGetInfo reports and cudaMalloc keeps to.
void set_memory_size(size_t bytes);

bool is_pinned(const void* pointer);

struct Hooks {
  // Called when the host waits for the device.
  void (*on_wait)(const char* why) = nullptr;
  // Where the host is: "file:line function < file:line function", or null. Never freed.
  const char* (*site)() = nullptr;
  // Lets go of the interpreter's lock, if this thread holds it, and takes it back. Work may need
  // it while the device's own lock is held, so nobody may wait for the latter with the former.
  void* (*release_interpreter)() = nullptr;
  void (*restore_interpreter)(void* state) = nullptr;
};
void set_hooks(const Hooks& hooks);

struct Stats {
  long tasks, graph_launches, graph_nodes, waits, captures, live_bytes;
};
Stats stats();

}  // namespace testdevice
