// Buffers whose ends are guarded: address space without access rights follows (and precedes) each,
// and the bytes that alignment leaves between data and guard hold a pattern that is checked.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <string>

namespace dflare::emulation {

// Data starts at a multiple of `alignment` and ends fewer than `alignment` bytes before the guard.
// The content is all ones: NaN in every floating-point type.
void* allocate_guarded(size_t bytes, size_t alignment, const std::string& name);
void release_guarded(void* data);

// What was written outside of the buffers, or an empty string.
std::string check_guards();

// While one of these lives, an access to a guard of a buffer (or to any unmapped address)
// jumps to `target` after describing itself in `description()`.
class FaultCatcher {
 public:
  explicit FaultCatcher(sigjmp_buf& target);
  ~FaultCatcher();
  static std::string description();
};

}  // namespace dflare::emulation
