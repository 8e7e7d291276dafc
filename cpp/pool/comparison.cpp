// Digests of the allocations that go to sleep, computed by their device.
#include "pool/comparison.hpp"

#include <algorithm>

namespace cumempool::pool {
namespace {

// Slices per launch, each of which keeps one multiprocessor busy: enough to fill a device, few
// enough that the first answers come at once.
constexpr std::size_t kLaunchSlices = 512;
// How far launches run ahead of the item that is asked for.
constexpr std::size_t kAheadSlices = 1024;

}  // namespace

void Comparison::start(Device& device, const std::vector<Item>& items) {
  if (!allocator_.retains_backups() || items.empty()) return;
  try {
    std::size_t count = 0;
    for (const Item& item : items) count += item.image->slices().size();
    backup::DigestBoard& board = device.digest_board();
    board.begin(count);
    Progress& progress = progress_[device.ordinal()];
    for (const Item& item : items) {
      for (const backup::Slice& slice : item.image->slices()) {
        board.add(item.address + slice.offset, slice.bytes);
      }
      const std::size_t first = progress.added;
      progress.added += item.image->slices().size();
      places_[device.ordinal()][item.item] = {first, progress.added};
    }
    advance(device, kAheadSlices);
  } catch (Error& error) {
    give_up(device, error);
  }
}

const cumempool_digest* Comparison::wait(Device& device, std::size_t item) {
  pass(device, item);
  const auto& places = places_[device.ordinal()];
  const auto found = places.find(item);
  if (found == places.end()) return nullptr;
  const std::vector<Launch>& launches = progress_.at(device.ordinal()).launches;
  const auto last = std::lower_bound(
      launches.begin(), launches.end(), found->second.end,
      [](const Launch& launch, std::size_t wanted) { return launch.end < wanted; });
  device.digest_queue().wait(last->mark);
  return &device.digest_board().digest(found->second.first);
}

void Comparison::pass(Device& device, std::size_t item) {
  const auto& places = places_[device.ordinal()];
  const auto found = places.find(item);
  if (found == places.end()) return;
  try {
    advance(device, found->second.end + kAheadSlices);
  } catch (Error& error) {
    give_up(device, error);
  }
}

void Comparison::complete(Device& device) {
  const auto found = progress_.find(device.ordinal());
  if (found == progress_.end()) return;
  try {
    advance(device, found->second.added);
  } catch (Error& error) {
    give_up(device, error);
  }
  finish(device);
}

void Comparison::finish(Device& device) {
  if (progress_.count(device.ordinal()) != 0) device.digest_queue().drain();
}

// Launches until `end` slices of the board are under way, or all are.
void Comparison::advance(Device& device, std::size_t end) {
  Progress& progress = progress_.at(device.ordinal());
  while (progress.started < std::min(end, progress.added)) {
    const std::size_t count = std::min(kLaunchSlices, progress.added - progress.started);
    const std::size_t mark = device.digest_board().start(allocator_.digest_seed(), count);
    progress.started += count;
    progress.launches.push_back({progress.started, mark});
  }
}

// Without digests everything is copied, and nothing can be compared with the next time.
void Comparison::give_up(Device& device, Error& error) {
  places_.erase(device.ordinal());
  const auto found = progress_.find(device.ordinal());
  if (found != progress_.end()) found->second.added = found->second.started;
  annotate(error, operation_, nullptr);
  report_.problems.push_back("contents could not be compared, so all of them were copied: " +
                             error.message());
}

}  // namespace cumempool::pool
