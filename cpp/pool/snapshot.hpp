// A consistent picture of an allocator: totals, tags, and single allocations where asked.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cumempool/cumempool.h"
#include "pool/allocator.hpp"

namespace cumempool::pool {

struct Snapshot {
  cumempool_totals totals{};
  std::vector<cumempool_tag_stats> tags;  // names live as long as the process
  std::vector<cumempool_allocation_info> allocations;
  std::string last_malloc_failure;
};

// What is known of a record; under the records' lock, or by who has claimed it.
cumempool_allocation_info describe(const Record& record);

Snapshot take_snapshot(Allocator& allocator, bool allocations);

// What is known of the live allocation that holds `address`. Throws Error (CUMEMPOOL_NOT_OWNED)
// where there is none, or where `allocator` is not null and it belongs to another.
cumempool_allocation_info find_allocation(const Allocator* allocator, cumempool_address address);

}  // namespace cumempool::pool
