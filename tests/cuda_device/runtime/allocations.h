// Which allocation of PyTorch's caching allocator memory belongs to, over time.
//
// A graph keeps the addresses that it was captured with. Memory of its own pool stays its own; what
// it reads or writes of other memory must still be the same allocation when it is launched, or it
// is somebody else's by then.
#pragma once

#include <cstdint>

namespace testdevice::allocations {

// Outside of the private pools of graphs.
void on_allocated(uintptr_t begin, uintptr_t end);
void on_freed(uintptr_t begin);

// A number that no other allocation has had, or 0: no such allocation holds this address now.
uint64_t find(uintptr_t address);

}  // namespace testdevice::allocations
