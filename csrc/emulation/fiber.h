// A fiber's stack, and the switch from one to another.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace dflare::emulation {

// Saves the callee-saved registers and the stack pointer, continues on another stack.
extern "C" void dflare_switch_stack(void** save, void* load);

inline constexpr size_t kStackBytes = 128 << 10;
inline constexpr uint64_t kStackEnd = 0x5a5a5a5a5a5a5a5a;

// No guard pages: thousands of stacks with one each would exhaust a process's mappings. The word at
// the far end is checked instead.
class Stack {
 public:
  Stack() {
    void* mapped =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<unsigned char*>(mapped);
    *reinterpret_cast<uint64_t*>(base_) = kStackEnd;
  }
  ~Stack() { munmap(base_, kStackBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  bool overflowed() const { return *reinterpret_cast<const uint64_t*>(base_) != kStackEnd; }

  // Stack pointer from which dflare_switch_stack enters `entry`.
  void* prepare(void (*entry)()) {
    auto** top = reinterpret_cast<void**>(base_ + kStackBytes);
    *--top = nullptr;  // alignment: a function is entered with the stack at 8 modulo 16
    *--top = reinterpret_cast<void*>(entry);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
    return top;
  }

 private:
  unsigned char* base_;
};

}  // namespace dflare::emulation
