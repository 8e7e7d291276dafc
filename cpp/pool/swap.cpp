// Puts some tags to sleep while others wake.
#include "pool/swap.hpp"

#include <map>

#include "pool/departure.hpp"
#include "pool/transition.hpp"

namespace cumempool::pool {
namespace {

// Device memory that may be taken, by device: what was free at the start, and what came back since.
class Room {
 public:
  Room(Allocator& allocator, const std::vector<int>& devices) {
    for (const int device : devices) {
      std::uint64_t total = 0;
      const driver::ContextScope scope(allocator.driver(), device);
      allocator.driver().memory_info(device, &free_[device], &total);
    }
  }

  bool take(int device, std::uint64_t bytes) {
    std::uint64_t& free = free_.at(device);
    if (bytes > free) return false;
    free -= bytes;
    return true;
  }
  void put(int device, std::uint64_t bytes) { free_.at(device) += bytes; }

 private:
  std::map<int, std::uint64_t> free_;
};

class Swap {
 public:
  Swap(Transition& transition, const SleepRequest& sleep, const WakeRequest& wake)
      : allocator_(transition.allocator()),
        sleep_(sleep),
        wake_(wake),
        departure_(allocator_, "swap", sleep, report_),
        arrival_(allocator_, "swap", report_),
        transition_(transition) {}

  Report run() {
    plan();
    departure_.fence();
    undo_on_failure(*this, [this] {
      departure_.start_copies();
      for (bool any = true; any;) {
        any = false;
        for (const int device : arrival_.devices()) any = bring_next(device) || any;
      }
      // Memory that nothing here waits for goes back last: a device clears what it gets back, and
      // copies that still run would lose time to it.
      arrival_.finish();
      departure_.finish();
    });
    departure_.commit();
    arrival_.commit();
    return std::move(report_);
  }

  // What arrived goes first, since what departed may need its memory.
  void undo(Error& failure) {
    arrival_.undo(failure);
    departure_.undo(failure);
  }

 private:
  void plan() {
    const auto leaving =
        transition_.claim([this](const Record& record) { return departure_.wants(record); },
                          [this] { departure_.admit(); });
    const auto coming = transition_.claim([this](const Record& record) {
      return !record.claimed && wakes(wake_, record) && sleep_.actions.count(record.tag) == 0;
    });
    departure_.plan(leaving);
    arrival_.plan(coming);
    refuse_without_room(allocator_, "swap", arrival_,
                        [this](int device) { return departure_.bytes_on(device); });
    room_.emplace(allocator_, arrival_.devices());
  }

  // Brings one allocation, once there is room for it.
  bool bring_next(int device) {
    if (arrival_.done(device)) return false;
    const std::uint64_t needed = arrival_.next_bytes(device);
    while (!room_->take(device, needed)) {
      const std::uint64_t before = departure_.released_on(device);
      // Without room that we know of, the device has the last word.
      if (!departure_.release_next(device, true)) break;
      room_->put(device, departure_.released_on(device) - before);
    }
    arrival_.bring_next(device);
    return true;
  }

  Allocator& allocator_;
  const SleepRequest& sleep_;
  const WakeRequest& wake_;
  Report report_;
  Departure departure_;
  Arrival arrival_;
  Transition& transition_;
  std::optional<Room> room_;
};

}  // namespace

Report swap(Allocator& allocator, const SleepRequest& sleep, const WakeRequest& wake) {
  Transition transition(allocator, "swap");
  const Clock::time_point start = Clock::now();
  transition.refuse_captures(sleep.streams);
  Report report = transition.with_overflow([&] { return Swap(transition, sleep, wake).run(); });
  transition.commit();
  report.seconds = seconds_since(start);
  return report;
}

}  // namespace cumempool::pool
