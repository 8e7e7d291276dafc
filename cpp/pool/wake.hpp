// Wakes tags: physical memory mapped at the same addresses, contents restored.
#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <vector>

#include "cumempool/cumempool.h"
#include "pool/allocator.hpp"
#include "pool/arrival.hpp"
#include "pool/report.hpp"

namespace cumempool::pool {

struct WakeRequest {
  std::set<const Tag*> tags;  // ignored where `all`
  bool all = false;
  std::set<const Record*> first;  // before all others
  std::vector<cumempool_device_stream> streams;

  // Of an asynchronous wake: called once it is known what will wake and that there is room for it,
  // when all copies into an allocation are in the queue, and before what has arrived is taken back.
  std::function<void(const std::vector<RecordPointer>& records)> planned;
  Arrival::Queued queued;
  std::function<void()> withdraw;
};

// Whether the request concerns a record.
bool wakes(const WakeRequest& request, const Record& record);

// Throws Error (CUMEMPOOL_OUT_OF_MEMORY) where a device has not the room that a planned arrival
// needs, `more(device)` bytes included that will become free meanwhile.
void refuse_without_room(Allocator& allocator, const char* operation, Arrival& arrival,
                         const std::function<std::uint64_t(int device)>& more);

// All or nothing (R4). Throws Error; then every allocation is as asleep as before, with its backup.
Report wake(Allocator& allocator, const WakeRequest& request);

}  // namespace cumempool::pool
