// Opens the drivers that come with the library.
#pragma once

#include "cumempool/cumempool.h"
#include "cumempool/driver.h"

namespace cumempool::driver {

// Returns the `cuda` driver of the process. The first call opens libcuda.so.1 and calls cuInit. If
// that fails, throws Error (CUMEMPOOL_UNAVAILABLE) with the reason; the next call tries again.
const cumempool_driver& cuda_driver();

// Makes a `host` driver. Throws Error (CUMEMPOOL_INVALID_ARGUMENT) for options that it refuses.
const cumempool_driver* make_host_driver(const cumempool_host_driver_options& options);
void destroy_host_driver(const cumempool_driver* driver) noexcept;
// See cumempool_host_driver_launch. Throws Error.
void host_driver_launch(const cumempool_driver* driver, int device, void (*function)(void*),
                        void* argument);

}  // namespace cumempool::driver
