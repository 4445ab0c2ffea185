#include "allocations.h"

#include <map>
#include <mutex>

namespace testdevice::allocations {

namespace {

struct Allocation {
  uintptr_t end;
  uint64_t number;
};

// A lock of its own: the allocator reports with its own lock held.
struct All {
  std::mutex mutex;
  std::map<uintptr_t, Allocation> live;
  uint64_t last = 0;
};

All& all() {
  static auto* allocations = new All;
  return *allocations;
}

}  // namespace

void on_allocated(uintptr_t begin, uintptr_t end) {
  const std::lock_guard lock(all().mutex);
  all().live[begin] = {end, ++all().last};
}

void on_freed(uintptr_t begin) {
  const std::lock_guard lock(all().mutex);
  all().live.erase(begin);
}

uint64_t find(uintptr_t address) {
  const std::lock_guard lock(all().mutex);
  auto next = all().live.upper_bound(address);
  if (next == all().live.begin()) return 0;
  --next;
  return address < next->second.end ? next->second.number : 0;
}

}  // namespace testdevice::allocations
