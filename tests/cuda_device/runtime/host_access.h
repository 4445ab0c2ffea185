// Accesses of the host to pinned memory that the device touches, seen by page protection.
//
// After a copy to the host was enqueued its pages have no access rights, after a copy from the host
// they are read-only, whatever the device has run by then. The first access of the host faults, is
// checked against what the host has waited for, and gets the rights back.
#pragma once

#include <vector>

#include "device.h"

namespace testdevice::host_access {

// Takes the rights that conflict with these accesses; only pinned memory is concerned.
void watch(const std::vector<Access>& accesses);
void unwatch_all();
void on_free(uintptr_t begin, uintptr_t end);

// While one lives, the device itself may touch what it accesses.
class DeviceRights {
 public:
  explicit DeviceRights(const std::vector<Access>& accesses);
  ~DeviceRights();

 private:
  std::vector<uintptr_t> pages_;
};

}  // namespace testdevice::host_access
