// Finds out what a device's memory can do by creating, exporting, mapping and copying some.
#pragma once

#include <cstddef>

#include "cumempool/cumempool.h"
#include "driver/driver.hpp"

namespace cumempool::vmm {

// Properties that memory of a device was created with. A device may claim more in its attributes
// and then refuse it in cuMemCreate (R8).
struct MemoryKind {
  cumempool_memory_properties properties;
  std::size_t granularity;
};

// Returns the first kind that works: fabric and POSIX fd handles, then POSIX fd alone, then none;
// each with RDMA before without. Throws Error if not even plain memory can be created.
MemoryKind choose_memory_kind(driver::Driver driver, int device);

// Tries one granule: create, map, write, read back, give back. Fills every field but `size`. Puts a
// failure of the trial into `reason`; throws Error only for a device that does not exist. Leaves no
// context behind that was not there before.
void probe_device(driver::Driver driver, int device, cumempool_device_probe& probe);

}  // namespace cumempool::vmm
