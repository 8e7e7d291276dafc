// Wakes tags: physical memory mapped at the same addresses, contents restored.
#pragma once

#include <set>
#include <vector>

#include "cumempool/cumempool.h"
#include "pool/allocator.hpp"
#include "pool/report.hpp"

namespace cumempool::pool {

struct WakeRequest {
  std::set<const Tag*> tags;  // ignored where `all`
  bool all = false;
  std::vector<cumempool_device_stream> streams;
};

// All or nothing (R4). Throws Error; then every allocation is as asleep as before, with its backup.
Report wake(Allocator& allocator, const WakeRequest& request);

}  // namespace cumempool::pool
