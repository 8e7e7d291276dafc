// Tries a device's memory for real: which properties it can have, and whether it can be used.
#pragma once

#include <cstddef>

#include "cumempool/cumempool.h"
#include "driver/driver.hpp"

namespace cumempool::vmm {

// Properties that memory of a device was made with, not those that its attributes promise and that
// cuMemCreate then refuses (R8).
struct MemoryKind {
  cumempool_memory_properties properties;
  std::size_t granularity;
};

// The first of: fabric and POSIX fd handles, then POSIX fd alone, then none; each with RDMA before
// without. Throws Error where not even plain memory can be made.
MemoryKind choose_memory_kind(driver::Driver driver, int device);

// Tries one granule: create, map, write, read back, return. Fills every field but `size`. Throws
// Error only for a device that does not exist; what fails while trying ends up in `reason`. A
// context that was not there before is gone afterwards.
void probe_device(driver::Driver driver, int device, cumempool_device_probe& probe);

}  // namespace cumempool::vmm
