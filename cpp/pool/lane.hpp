// One device's share of a transition: its streams, the allocations to be moved, and how far the
// copies have come.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include "pool/allocator.hpp"
#include "pool/copy_front.hpp"

namespace cumempool::pool {

struct Lane {
  Lane(std::shared_ptr<Device> of, Direction direction, Report& report, Progress& progress)
      : device(std::move(of)),
        transfer(device->transfer(direction)),
        front(transfer.queue, report, progress) {}

  std::shared_ptr<Device> device;
  backup::Transfer transfer;
  CopyFront front;
  std::vector<std::size_t> items;  // in order
  std::size_t next = 0;            // of items
  bool stuck = false;              // what was enqueued cannot be waited for

  // Starts the copies of an item by calling `start`, and enters it at the front.
  void copy(std::size_t item, const Record& record, cumempool_backup_tier tier,
            const std::function<void()>& start);
  // Waits for the threads. Throws Error; `culprit` is then the item that it is about.
  void finish_staged(std::size_t& culprit);
};

// The lanes of a transition, one per device, so that all devices copy at the same time.
class Lanes {
 public:
  Lanes(Allocator& allocator, Direction direction, Report& report)
      : allocator_(allocator), direction_(direction), report_(report) {}

  // Appends an item, which is a record, to the lane of its device. Throws Error.
  void add(const Record& record, std::size_t item);

  std::vector<std::unique_ptr<Lane>>& all() noexcept { return lanes_; }
  Lane* find(int device) noexcept;

  // Calls step(lane, item) for all items, in turns between the lanes, inside a ContextScope.
  void each_in_turn(const std::function<void(Lane&, std::size_t)>& step);
  // Calls step(lane) for all lanes, inside a ContextScope.
  void each(const std::function<void(Lane&)>& step);

  // After a failure: waits for everything that was enqueued, so that both sides of the copies may
  // go. Lanes that cannot be waited for are stuck; why is added to `failure`, where there is one.
  void settle(Error* failure) noexcept;

 private:
  Allocator& allocator_;
  const Direction direction_;
  Report& report_;
  std::vector<std::unique_ptr<Lane>> lanes_;
};

}  // namespace cumempool::pool
