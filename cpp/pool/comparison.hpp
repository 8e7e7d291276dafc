// Digests of the allocations that go to sleep, computed by their device: which slices have changed
// since the backup that is still there, and what to compare with next time.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <set>
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
  // Starts on all allocations of a device, which are asked for in this order.
  void start(Device& device, const std::vector<Item>& items);

  // The digests of an item's slices, in order, once they are computed; null where there are none.
  const cumempool_digest* wait(Device& device, std::size_t item);
  // Waits for all that a device was given.
  void finish(Device& device);

 private:
  struct Place {
    std::size_t first;  // on the board
    std::size_t mark;
  };

  Allocator& allocator_;
  const char* operation_;
  Report& report_;
  std::map<std::size_t, Place> places_;
  std::set<int> begun_;  // devices with digests under way
};

}  // namespace cumempool::pool
