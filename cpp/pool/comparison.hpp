// Digests of the allocations that go to sleep, computed by their device: which slices have changed
// since the backup that is still there, and what to compare with next time.
#pragma once

#include <cstddef>
#include <map>
#include <vector>

#include "backup/backup.hpp"
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
    const backup::Backup* image;
  };
  // Begins with the allocations of a device, which are asked for in this order.
  void start(Device& device, const std::vector<Item>& items);

  // The digests of an item's slices, in order, once they are computed; null where there are none.
  const cumempool_digest* wait(Device& device, std::size_t item);
  // Goes on with what follows an item, which is not waited for.
  void pass(Device& device, std::size_t item);
  // Computes the rest of a device's digests, and waits for them.
  void complete(Device& device);
  // Digests slices of an item once more, behind what `copies` has been given so far, in groups of
  // items; flush() begins with the last one. No effect where the item has no digests.
  void recheck(Device& device, const Item& item, std::vector<std::size_t> slices,
               backup::CopyQueue& copies);
  void flush(Device& device, backup::CopyQueue& copies);
  // Waits for that, and has the image forget the digests of slices that are others now: what was
  // copied may be neither. Returns their bytes.
  std::uint64_t verify(Device& device, std::size_t item, backup::Backup& image);

  // Waits for all that was begun on a device before the copies, or behind them.
  void finish(Device& device);
  void finish_rechecks(Device& device);

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
    bool failed = false;  // nothing more is launched
  };

  // Digests behind the copies, on a board of their own.
  struct Recheck {
    std::size_t first = 0;
    std::vector<std::size_t> slices;  // of the image
  };
  struct Rechecks {
    Progress progress;
    std::map<std::size_t, Recheck> items;
  };

  void advance(Device& device, std::size_t end);
  static const Launch* launch_of(const Progress& progress, std::size_t end);
  void give_up(Device& device, Error& error);

  Allocator& allocator_;
  const char* operation_;
  Report& report_;
  std::map<int, std::map<std::size_t, Place>> places_;  // by device and item
  std::map<int, Progress> progress_;                    // of devices with digests under way
  std::map<int, Rechecks> rechecks_;                    // the same
};

}  // namespace cumempool::pool
