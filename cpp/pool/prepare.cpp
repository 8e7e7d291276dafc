// Pins host memory ahead of a sleep, so that the sleep itself only copies.
#include "pool/prepare.hpp"

#include <cstddef>

#include "pool/dead_ranges.hpp"

namespace cumempool::pool {

std::uint64_t prepare(Allocator& allocator, const SleepRequest& request) {
  const Turnstile::Turn turn(allocator.turnstile(), "prepare");
  allocator.check_open("prepare");
  const DeadRanges dead(request.dead);
  std::size_t needed = 0;
  int device = 0;
  allocator.records().for_each([&](const Record& record) {
    const auto action = request.actions.find(record.tag);
    if (action == request.actions.end() || record.asleep || record.doomed) return;
    if (action->second != CUMEMPOOL_ON_SLEEP_OFFLOAD) return;
    needed += total_bytes(dead.live_extents(record));
    device = record.device;  // pinned memory serves every device, whichever pins it
  });
  if (needed == 0) return 0;
  try {
    const driver::ContextScope scope(allocator.driver(), device);
    const std::uint64_t before = allocator.arena().held_bytes();
    const backup::ArenaOrder order(allocator.arena(), needed);
    allocator.arena().pin_order(device);
    return allocator.arena().held_bytes() - before;
  } catch (Error& error) {
    annotate(error, "prepare", nullptr);
    throw;
  }
}

}  // namespace cumempool::pool
