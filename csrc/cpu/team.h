// Threads for the CPU operators.
//
// An operator of a decode step lasts some tens of microseconds, and a step has a hundred of them.
// OpenMP's threads either sleep in between, and waking them costs as much as the operator, or spin
// at barriers until everyone has come, and then one other busy process slows a step by an order of
// magnitude. Here a thread spins for a bounded time and then sleeps, work is handed out in small
// chunks, and nobody waits for a thread that has taken none.
#pragma once

#include <stdint.h>

#include <memory>
#include <type_traits>

namespace dflare::cpu {

// What to run over a range; refers to a callable that outlives it.
class RangeFunction {
 public:
  template <typename F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, RangeFunction>)
  RangeFunction(F&& f)  // NOLINT: an implicit conversion, as for std::function
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, int64_t begin, int64_t end) {
          (*static_cast<std::remove_reference_t<F>*>(object))(begin, end);
        }) {}

  void operator()(int64_t begin, int64_t end) const { call_(object_, begin, end); }

 private:
  void* object_;
  void (*call_)(void*, int64_t, int64_t);
};

// Calls f(begin, end) for ranges that cover [0, count), none shorter than `grain` but the last.
//
// At most `threads` threads take part, the calling one among them. Called from within f, or while
// another thread of the process has the team, it runs on the calling thread alone. The first
// exception of f is thrown again here, after all ranges that had begun have ended.
void parallel_for(int64_t threads, int64_t count, int64_t grain, RangeFunction f);

}  // namespace dflare::cpu
