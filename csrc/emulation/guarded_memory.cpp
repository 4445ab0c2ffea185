#include "guarded_memory.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

namespace dflare::emulation {
namespace {

constexpr unsigned char kGuardByte = 0xa5;
// Address space without access rights on either side; wide, so that an access that is whole rows
// off does not jump over it into something else's memory. It costs nothing but addresses.
constexpr size_t kGuardBytes = 16 << 20;

struct Buffer {
  unsigned char* pages;  // leading guard, accessible pages, trailing guard
  size_t page_bytes;     // of all of them
  unsigned char* data;
  size_t bytes;
  std::string name;
};

std::map<void*, Buffer>& buffers() {
  static std::map<void*, Buffer> all;
  return all;
}

unsigned char* accessible_begin(const Buffer& b) { return b.pages + kGuardBytes; }
unsigned char* accessible_end(const Buffer& b) { return b.pages + b.page_bytes - kGuardBytes; }

// Set by the signal handler, which may not allocate.
sigjmp_buf* fault_target = nullptr;
uintptr_t fault_address = 0;
struct sigaction previous_segv, previous_bus;

void on_fault(int, siginfo_t* info, void*) {
  if (fault_target == nullptr) {  // a fault of the emulator's own
    signal(SIGSEGV, SIG_DFL);
    signal(SIGBUS, SIG_DFL);
    return;
  }
  fault_address = reinterpret_cast<uintptr_t>(info->si_addr);
  sigjmp_buf* target = fault_target;
  fault_target = nullptr;
  siglongjmp(*target, 1);
}

}  // namespace

void* allocate_guarded(size_t bytes, size_t alignment, const std::string& name) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t accessible = (bytes + alignment + page - 1) / page * page;
  const size_t total = accessible + 2 * kGuardBytes;
  void* mapped =
      mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  auto* pages = static_cast<unsigned char*>(mapped);
  mprotect(pages + kGuardBytes, accessible, PROT_READ | PROT_WRITE);
  unsigned char* end = pages + kGuardBytes + accessible;
  auto* data = reinterpret_cast<unsigned char*>(reinterpret_cast<uintptr_t>(end - bytes) /
                                                alignment * alignment);
  std::memset(pages + kGuardBytes, kGuardByte, accessible);
  std::memset(data, 0xff, bytes);
  buffers()[data] = {pages, total, data, bytes, name};
  return data;
}

void release_guarded(void* data) {
  const auto found = buffers().find(data);
  if (found == buffers().end()) return;
  munmap(found->second.pages, found->second.page_bytes);
  buffers().erase(found);
}

std::string check_guards() {
  for (const auto& [data, b] : buffers()) {
    for (const unsigned char* p = accessible_begin(b); p < accessible_end(b); ++p) {
      if (p == b.data) p += b.bytes;
      if (p < accessible_end(b) && *p != kGuardByte) {
        char text[160];
        std::snprintf(text, sizeof(text), "write outside of %s: byte %td of %zu", b.name.c_str(),
                      p - b.data, b.bytes);
        return text;
      }
    }
  }
  return "";
}

FaultCatcher::FaultCatcher(sigjmp_buf& target) {
  // Fibers have small stacks, and a fault may be their overflow: handle it on a stack of its own.
  static std::vector<unsigned char> stack(64 << 10);
  stack_t alternate{};
  alternate.ss_sp = stack.data();
  alternate.ss_size = stack.size();
  sigaltstack(&alternate, nullptr);
  fault_target = &target;
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &previous_segv);
  sigaction(SIGBUS, &action, &previous_bus);
}

FaultCatcher::~FaultCatcher() {
  sigaction(SIGSEGV, &previous_segv, nullptr);
  sigaction(SIGBUS, &previous_bus, nullptr);
  fault_target = nullptr;
}

std::string FaultCatcher::description() {
  char text[200];
  for (const auto& [data, b] : buffers()) {
    const auto begin = reinterpret_cast<uintptr_t>(b.pages);
    if (fault_address < begin || fault_address >= begin + b.page_bytes) continue;
    std::snprintf(text, sizeof(text), "access outside of %s: byte %td of %zu", b.name.c_str(),
                  static_cast<ptrdiff_t>(fault_address - reinterpret_cast<uintptr_t>(b.data)),
                  b.bytes);
    return text;
  }
  std::snprintf(text, sizeof(text), "access to unmapped address %#zx",
                static_cast<size_t>(fault_address));
  return text;
}

}  // namespace dflare::emulation
