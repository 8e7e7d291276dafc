// The drivers that come with the library.
#pragma once

#include "cumempool/cumempool.h"
#include "cumempool/driver.h"

namespace cumempool::driver {

// The process's `cuda` driver. Opens libcuda.so.1 and calls cuInit at the first call; throws Error
// (CUMEMPOOL_UNAVAILABLE) with the reason while that fails, and tries again at the next call.
const cumempool_driver& cuda_driver();

// A new `host` driver; throws Error (CUMEMPOOL_INVALID_ARGUMENT) for options it does not take.
const cumempool_driver* make_host_driver(const cumempool_host_driver_options& options);
void destroy_host_driver(const cumempool_driver* driver) noexcept;
// See cumempool_host_driver_launch. Throws Error.
void host_driver_launch(const cumempool_driver* driver, int device, void (*function)(void*),
                        void* argument);

}  // namespace cumempool::driver
