// Which properties a device's memory can really have: found by creating and exporting a granule,
// not by reading attributes, which promise what cuMemCreate then refuses (R8).
#pragma once

#include <cstddef>

#include "driver/driver.hpp"

namespace cumempool::vmm {

struct MemoryKind {
  cumempool_memory_properties properties;
  std::size_t granularity;
};

// The first of: fabric and POSIX fd handles, then POSIX fd alone, then none; each with RDMA before
// without. Throws Error where not even plain memory can be made.
MemoryKind choose_memory_kind(driver::Driver driver, int device);

}  // namespace cumempool::vmm
