// Digests of the allocations that go to sleep, computed by their device: which slices have changed
// since the backup that is still there, and what to compare with next time.
#pragma once

#include <cstddef>
#include <map>
#include <vector>

#include "backup/image.hpp"
#include "pool/allocator.hpp"
#include "pool/report.hpp"

namespace cumempool::pool {

// Where a device cannot compute digests, nothing has any, all of it is copied, and the report says
// so. Every call inside a ContextScope of the device concerned, but for construction.
class Comparison {
 public:
  Comparison(Allocator& allocator, const char* operation, Report& report)
      : allocator_(allocator), operation_(operation), report_(report) {}

  struct Item {
    std::size_t item;  // the caller's name for it
    cumempool_address address;
    const backup::Image* image;
  };
  // Begins with the allocations of a device, which are asked for in this order.
  void start(Device& device, const std::vector<Item>& items);

  // The digests of an item's slices, in order, once they are computed; null where there are none.
  const cumempool_digest* wait(Device& device, std::size_t item);
  // Goes on with what follows an item, which is not waited for.
  void pass(Device& device, std::size_t item);
  // Computes the rest of a device's digests, and waits for them.
  void complete(Device& device);
  // Waits for all that was begun on a device.
  void finish(Device& device);

 private:
  // Slices of an item, on the board.
  struct Place {
    std::size_t first;
    std::size_t end;
  };
  struct Launch {
    std::size_t end;  // slices on the board that are done once the mark is
    std::size_t mark;
  };
  struct Progress {
    std::size_t added = 0;    // slices on the board
    std::size_t started = 0;  // of them
    std::vector<Launch> launches;
  };

  void advance(Device& device, std::size_t end);
  void give_up(Device& device, Error& error);

  Allocator& allocator_;
  const char* operation_;
  Report& report_;
  std::map<int, std::map<std::size_t, Place>> places_;  // by device and item
  std::map<int, Progress> progress_;                    // of devices with digests under way
};

}  // namespace cumempool::pool
