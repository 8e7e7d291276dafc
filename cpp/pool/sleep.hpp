// Puts tags to sleep: contents to the host or discarded, physical memory back to the device.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "cumempool/cumempool.h"
#include "pool/allocator.hpp"
#include "pool/report.hpp"

namespace cumempool::pool {

struct SleepRequest {
  std::map<const Tag*, cumempool_on_sleep> actions;  // OFFLOAD or DISCARD
  bool drop_backups = false;
  std::vector<cumempool_extent> dead;
  std::uint64_t dead_as_of = 0;  // the moment before that list was made; 0 = it holds
  std::vector<cumempool_device_stream> streams;
};

// All or nothing (R4). Throws Error; then every allocation is awake with its contents as before,
// or, where undoing failed as well, asleep with its contents kept, and the error says so.
Report sleep(Allocator& allocator, const SleepRequest& request);

}  // namespace cumempool::pool
