// Makes ready what a sleep will need, so that the sleep itself only copies.
#include "pool/prepare.hpp"

#include <cstddef>
#include <map>
#include <vector>

#include "pool/dead_ranges.hpp"
#include "pool/departure.hpp"
#include "pool/host_plan.hpp"
#include "pool/places.hpp"

namespace cumempool::pool {
namespace {

struct Need {
  const Tag* tag;
  int device;
  BackupChoice choice;
  std::size_t bytes;
};

std::vector<Need> needs(Allocator& allocator, const SleepRequest& request,
                        const std::set<const Tag*>& yielding) {
  DeadRanges dead(request.dead, request.dead_as_of);
  std::vector<Need> all;
  allocator.records().update([&] {
    for (const auto& action : request.actions) dead.look_at(*action.first);
  });
  allocator.records().for_each([&](const Record& record) {
    const auto action = request.actions.find(record.tag);
    if (action == request.actions.end() || record.asleep || record.freed) return;
    refuse_to_sleep(allocator, "prepare", record,
                    yielding.count(record.tag) == 0 ? Pinned::kCounts : Pinned::kIsLeftOut);
    if (action->second != CUMEMPOOL_ON_SLEEP_OFFLOAD && !record.preserved) return;
    const auto live = dead.live_extents(record);
    const BackupChoice choice = allocator.tags().backup(*record.tag);
    if (reusable(allocator, record, choice, live)) return;  // has its room
    all.push_back({record.tag, record.device, choice, total_bytes(live)});
  });
  return all;
}

// Sends what there is no room for where the sleep will send it. What is retained stays: the sleep
// may need no more than that.
void plan_room(Allocator& allocator, std::vector<Need>& all) {
  std::vector<HostNeed> needs;
  needs.reserve(all.size());
  for (Need& need : all) needs.push_back({need.tag, need.device, need.bytes, &need.choice});
  plan_host_memory(allocator, "prepare", needs, Retained::kStay);
}

// Streams, buffers and code of a device. What it cannot do is the sleep's business.
void warm_up(Allocator& allocator, int ordinal) {
  const std::shared_ptr<Device> device = allocator.devices().at(ordinal);
  const driver::ContextScope scope(allocator.driver(), ordinal);
  device->transfer(Direction::kOut);
  if (!allocator.retains_backups()) return;
  try {
    device->digest_buffer().begin(1);
    device->digest_queue().digest(allocator.digest_seed(), nullptr, 0, nullptr);
  } catch (const Error& error) {
    if (error.result != CUMEMPOOL_RESULT_NOT_SUPPORTED) throw;
  }
}

void hold_room(Allocator& allocator, const SleepRequest& request,
               const std::set<const Tag*>& yielding) {
  struct Sum {
    int device;
    std::size_t bytes;
  };
  std::map<backup::HostArena*, Sum> sums;
  std::map<int, bool> warm;
  std::vector<Need> all = needs(allocator, request, yielding);
  plan_room(allocator, all);
  for (const Need& need : all) {
    if (!warm[need.device]) warm_up(allocator, need.device);
    warm[need.device] = true;
    check_reach(allocator, need.choice, need.device);
    backup::HostArena* arena = arena_of(allocator, need.choice, need.device);
    if (arena != nullptr)
      sums.try_emplace(arena, Sum{need.device, 0}).first->second.bytes += need.bytes;
  }
  for (const auto& [arena, sum] : sums) {
    const driver::ContextScope scope(allocator.driver(), sum.device);
    const backup::ArenaOrder order(*arena, sum.bytes);
    arena->deliver(sum.device);
  }
}

}  // namespace

std::uint64_t prepare(Allocator& allocator, const SleepRequest& request,
                      const std::set<const Tag*>& yielding) {
  const Turnstile::Turn turn(allocator.turnstile(), "prepare");
  allocator.check_open("prepare");
  const std::uint64_t before = allocator.stores().pinned_bytes();
  try {
    try {
      hold_room(allocator, request, yielding);
    } catch (const Error& error) {
      if (!sends_to_overflow(allocator, error)) throw;
      hold_room(allocator, request, yielding);
    }
    return allocator.stores().pinned_bytes() - before;
  } catch (Error& error) {
    annotate(error, "prepare", nullptr);
    throw;
  }
}

}  // namespace cumempool::pool
