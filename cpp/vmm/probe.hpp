// Tries one granule of a device for real: create, map, write, read back, return.
#pragma once

#include "cumempool/cumempool.h"
#include "driver/driver.hpp"

namespace cumempool::vmm {

// Fills every field but `size`. Throws Error only for a device that does not exist; what fails
// while trying ends up in `reason`. A context that was not there before is gone afterwards.
void probe_device(driver::Driver driver, int device, cumempool_device_probe& probe);

}  // namespace cumempool::vmm
