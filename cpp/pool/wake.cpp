// Wakes tags: physical memory mapped at the same addresses, contents restored.
#include "pool/wake.hpp"

#include <algorithm>
#include <utility>

#include "pool/transition.hpp"

namespace cumempool::pool {
namespace {

// What is asked for first, then in order of allocation, so that what a program uses first is there
// first. Where nobody looks before the end, what has a backup comes first: while it is copied, the
// rest is mapped.
void put_in_order(std::vector<RecordPointer>& records, const WakeRequest& request) {
  const auto rank = [&](const RecordPointer& record) {
    if (request.first.count(record.get()) != 0) return 0;
    return request.queued || record->image != nullptr ? 1 : 2;
  };
  std::stable_sort(records.begin(), records.end(),
                   [&](const auto& left, const auto& right) { return rank(left) < rank(right); });
}

}  // namespace

bool wakes(const WakeRequest& request, const Record& record) {
  return record.asleep && !record.freed && (request.all || request.tags.count(record.tag) != 0);
}

void refuse_without_room(Allocator& allocator, const char* operation, Arrival& arrival,
                         const std::function<std::uint64_t(int)>& more) {
  const auto refuse = [&](int device) {
    std::uint64_t free = 0;
    std::uint64_t total = 0;
    const driver::ContextScope scope(allocator.driver(), device);
    allocator.driver().memory_info(device, &free, &total);
    const std::uint64_t needed = arrival.bytes_on(device);
    const std::uint64_t room = free + more(device);
    if (needed <= room) return;
    Error error(CUMEMPOOL_OUT_OF_MEMORY, "the wake needs " + format_bytes(needed) +
                                             " on the device, which has room for " +
                                             format_bytes(room));
    error.operation = operation;
    error.device = device;
    error.bytes = needed;
    error.free_bytes = free;
    error.total_bytes = total;
    error.advice =
        "free device memory (torch.cuda.empty_cache(), other tags, other processes) and try again; "
        "nothing has changed";
    throw error;
  };
  for (const int device : arrival.devices()) {
    allocator.with_freed_memory([&] { refuse(device); });
  }
}

Report wake(Allocator& allocator, const WakeRequest& request) {
  Report report;
  Arrival arrival(allocator, "wake", report, request.queued, request.withdraw);
  Transition transition(allocator, "wake");
  const Clock::time_point start = Clock::now();
  transition.refuse_captures(request.streams);
  auto records =
      transition.claim([&](const Record& candidate) { return wakes(request, candidate); });
  put_in_order(records, request);
  arrival.plan(records);
  if (request.planned) {
    refuse_without_room(allocator, "wake", arrival, [](int) { return 0; });
    request.planned(records);
  }
  undo_on_failure(arrival, [&] {
    arrival.bring_all();
    arrival.finish();
  });
  arrival.commit();
  transition.commit();
  report.seconds = seconds_since(start);
  return report;
}

}  // namespace cumempool::pool
