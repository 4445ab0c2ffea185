// The CUDA API: memory, and the account of it.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "host_access.h"
#include "state.h"

using namespace testdevice;

namespace {

struct Block {
  size_t size;
  bool device;
};

// What a context takes before the first allocation.
constexpr size_t kContextBytes = size_t{512} << 20;
constexpr size_t kPoisonedBytes = size_t{64} << 20;

std::map<uintptr_t, Block>& blocks() {
  static auto* all = new std::map<uintptr_t, Block>;
  return *all;
}

size_t& memory_size() {
  static const char* given = std::getenv("DFLARE_TEST_DEVICE_MEMORY_MB");
  static size_t size = (given ? std::strtoull(given, nullptr, 10) : size_t{16384}) << 20;
  return size;
}

size_t free_bytes() {
  const size_t used = kContextBytes + static_cast<size_t>(state().stats.live_bytes);
  return used < memory_size() ? memory_size() - used : 0;
}

// Pages exist once they are touched: a large pool costs addresses alone.
void* map_pages(size_t size) {
  void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return pages == MAP_FAILED ? nullptr : pages;
}

const Block* block_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto next = blocks().upper_bound(address);
  if (next == blocks().begin()) return nullptr;
  --next;
  return address < next->first + next->second.size ? &next->second : nullptr;
}

cudaError_t unmap(void* pointer, bool device) {
  if (!pointer) return cudaSuccess;
  const auto found = blocks().find(reinterpret_cast<uintptr_t>(pointer));
  if (found == blocks().end() || found->second.device != device) {
    return refuse(cudaErrorInvalidValue, "an address is freed that was not allocated");
  }
  drain();  // freeing waits for the device
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  races::on_free(begin, begin + found->second.size);
  host_access::on_free(begin, begin + found->second.size);
  if (device) state().stats.live_bytes -= static_cast<long>(found->second.size);
  munmap(pointer, found->second.size);
  blocks().erase(found);
  return cudaSuccess;
}

Access reads(const void* from, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(from);
  return {begin, begin + bytes, false};
}

Access writes(void* to, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(to);
  return {begin, begin + bytes, true};
}

}  // namespace

namespace testdevice {

bool is_pinned(const void* pointer) {
  Lock lock;
  const Block* block = block_of(pointer);
  return block && !block->device;
}

void set_memory_size(size_t bytes) {
  Lock lock;
  memory_size() = bytes;
}

}  // namespace testdevice

// ------------------------------------------------------------ allocation

CUDA_API cudaError_t cudaMalloc(void** pointer, size_t size) {
  Lock lock;
  *pointer = nullptr;
  if (const cudaError_t error = sticky()) return error;
  if (const cudaError_t error = check_capture_allows("cudaMalloc")) return error;
  if (size == 0) return cudaSuccess;
  if (size > free_bytes()) return fail(cudaErrorMemoryAllocation);
  *pointer = map_pages(size);
  if (!*pointer) return refuse(cudaErrorMemoryAllocation, "this machine is out of addresses");
  static const bool poison = std::getenv("DFLARE_TEST_DEVICE_POISON") != nullptr;
  if (poison && size <= kPoisonedBytes) std::memset(*pointer, 0xff, size);
  blocks()[reinterpret_cast<uintptr_t>(*pointer)] = {size, true};
  state().stats.live_bytes += static_cast<long>(size);
  return cudaSuccess;
}

CUDA_API cudaError_t cudaFree(void* pointer) {
  Lock lock;
  return unmap(pointer, true);
}

CUDA_API cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  Lock lock;
  size = std::max<size_t>(size, 1);
  *pointer = map_pages(size);
  if (!*pointer) return fail(cudaErrorMemoryAllocation);
  blocks()[reinterpret_cast<uintptr_t>(*pointer)] = {size, false};
  return cudaSuccess;
}

CUDA_API cudaError_t cudaMallocHost(void** pointer, size_t size) {
  return cudaHostAlloc(pointer, size, cudaHostAllocDefault);
}

CUDA_API cudaError_t cudaFreeHost(void* pointer) {
  Lock lock;
  return unmap(pointer, false);
}

CUDA_API cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
  Lock lock;
  blocks()[reinterpret_cast<uintptr_t>(pointer)] = {size, false};
  return cudaSuccess;
}

CUDA_API cudaError_t cudaHostUnregister(void* pointer) {
  Lock lock;
  blocks().erase(reinterpret_cast<uintptr_t>(pointer));
  return cudaSuccess;
}

CUDA_API cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  Lock lock;
  *total = memory_size();
  *free = free_bytes();
  return cudaSuccess;
}

CUDA_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes,
                                              const void* pointer) {
  Lock lock;
  *attributes = {};
  attributes->type = cudaMemoryTypeUnregistered;
  if (const Block* block = block_of(pointer)) {
    attributes->type = block->device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    attributes->devicePointer = const_cast<void*>(pointer);
    attributes->hostPointer = block->device ? nullptr : const_cast<void*>(pointer);
  }
  return cudaSuccess;
}

// ------------------------------------------------------------ copies and fills

CUDA_API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                     cudaStream_t stream) {
  return enqueue(stream, {.name = "cudaMemcpyAsync",
                          .run = [=] { std::memcpy(to, from, bytes); },
                          .accesses = {reads(from, bytes), writes(to, bytes)}});
}

CUDA_API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr)) return error;
  return testdevice::wait(nullptr, "cudaMemcpy");
}

CUDA_API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                         cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}

CUDA_API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from,
                                       size_t from_pitch, size_t width, size_t height,
                                       cudaMemcpyKind, cudaStream_t stream) {
  if (width == 0 || height == 0) return cudaSuccess;
  const auto run = [=] {
    for (size_t row = 0; row < height; ++row) {
      std::memcpy(static_cast<char*>(to) + row * to_pitch,
                  static_cast<const char*>(from) + row * from_pitch, width);
    }
  };
  return enqueue(stream, {.name = "cudaMemcpy2DAsync",
                          .run = run,
                          .accesses = {reads(from, (height - 1) * from_pitch + width),
                                       writes(to, (height - 1) * to_pitch + width)}});
}

CUDA_API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return enqueue(stream, {.name = "cudaMemsetAsync",
                          .run = [=] { std::memset(to, value, bytes); },
                          .accesses = {writes(to, bytes)}});
}

CUDA_API cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}
