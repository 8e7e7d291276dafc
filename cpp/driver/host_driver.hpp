// The host driver for tests, beyond its table: counters of what it holds, and simulated captures,
// contexts and links.
#pragma once

#include <cstdint>

#include "cumempool/driver.h"

namespace cumempool::driver {

// CUDA_ERROR_ILLEGAL_ADDRESS: work ran into device memory that was not, or no longer, mapped for
// it. The error sticks: later calls for that device return it until its context is destroyed.
constexpr cumempool_result kIllegalAddress = CUMEMPOOL_RESULT_ILLEGAL_ADDRESS;

// Everything that a program has taken from a host driver and not given back. All zero: no leak.
struct HostDriverCounters {
  std::uint64_t reservations = 0;
  std::uint64_t reserved_bytes = 0;
  std::uint64_t handles = 0;  // created or imported
  std::uint64_t mappings = 0;
  std::uint64_t mapped_bytes = 0;
  std::uint64_t allocations = 0;    // of allocate, also after their context is gone
  std::uint64_t charged_bytes = 0;  // in the budgets of all devices
  std::uint64_t registrations = 0;
  std::uint64_t registered_bytes = 0;
  std::uint64_t streams = 0;
  std::uint64_t events = 0;
  std::uint64_t queued_commands = 0;
  std::uint64_t retained_contexts = 0;  // retains without a release
  std::uint64_t entered_contexts = 0;   // enters without a leave, of all threads
};

// `driver` comes from make_host_driver, here and below.
HostDriverCounters host_driver_counters(const cumempool_driver* driver);

// Has stream_is_capturing answer `capturing`. A capturing stream takes no work. Returns false if
// the device has no such stream.
bool host_driver_set_capturing(const cumempool_driver* driver, int device, cumempool_stream stream,
                               bool capturing);

// Retains (`held`) or releases a device's primary context past the table, as another library of the
// process does. The table does not know the context by that. Returns false if there is no such
// device.
bool host_driver_hold_context(const cumempool_driver* driver, int device, bool held);

// Without `possible`, peer_access answers 0, and set_access refuses devices that did not create the
// memory, as if no link joined the devices. At first they reach each other.
void host_driver_set_peer_access(const cumempool_driver* driver, bool possible);

}  // namespace cumempool::driver
