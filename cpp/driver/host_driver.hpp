// What tests may ask of a host driver beyond its table: what is still held, and pretended captures.
#pragma once

#include <cstdint>

#include "cumempool/driver.h"

namespace cumempool::driver {

// CUDA_ERROR_ILLEGAL_ADDRESS: work ran into device memory that was not, or no longer, mapped for
// it. It sticks: later calls for that device return it until its context is destroyed.
constexpr cumempool_result kIllegalAddress = CUMEMPOOL_RESULT_ILLEGAL_ADDRESS;

// Everything that a program has taken from a host driver and not given back; all zero = no leak.
struct HostDriverCounters {
  std::uint64_t reservations = 0;
  std::uint64_t reserved_bytes = 0;
  std::uint64_t handles = 0;  // created or imported, and not released
  std::uint64_t mappings = 0;
  std::uint64_t mapped_bytes = 0;
  std::uint64_t allocations = 0;    // of allocate; also those whose context is gone
  std::uint64_t charged_bytes = 0;  // taken from the budgets of all devices
  std::uint64_t registrations = 0;
  std::uint64_t registered_bytes = 0;
  std::uint64_t streams = 0;
  std::uint64_t events = 0;
  std::uint64_t queued_commands = 0;
  std::uint64_t retained_contexts = 0;  // retains without their release
  std::uint64_t entered_contexts = 0;   // enters without their leave, of all threads
};

// `driver` comes from make_host_driver.
HostDriverCounters host_driver_counters(const cumempool_driver* driver);

// Lets stream_is_capturing answer `capturing`; while it does, no work is taken on the stream.
// Returns false where the device has no such stream.
bool host_driver_set_capturing(const cumempool_driver* driver, int device, cumempool_stream stream,
                               bool capturing);

// Holds a device's primary context without the table, or lets go of it, as another library of the
// process does: the table does not know it by that. Returns false where there is no such device.
bool host_driver_hold_context(const cumempool_driver* driver, int device, bool held);

// Lets peer_access answer 0, and set_access refuse devices that did not create the memory, as where
// no link joins the devices. They can reach each other at first.
void host_driver_set_peer_access(const cumempool_driver* driver, bool possible);

}  // namespace cumempool::driver
