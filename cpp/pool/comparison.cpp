// Digests of the allocations that go to sleep, computed by their device.
#include "pool/comparison.hpp"

namespace cumempool::pool {
namespace {

// Slices per launch: enough to fill a device, few enough that the first answers come at once.
constexpr std::size_t kLaunchSlices = 512;

}  // namespace

void Comparison::start(Device& device, const std::vector<Item>& items) {
  if (!allocator_.retains_backups() || items.empty()) return;
  try {
    std::size_t count = 0;
    for (const Item& item : items) count += item.image->slices().size();
    backup::DigestBoard& board = device.digest_board();
    board.begin(count);
    begun_.insert(device.ordinal());
    std::vector<std::size_t> waiting;  // for the next launch
    std::size_t added = 0;
    for (const Item& item : items) {
      for (const backup::Slice& slice : item.image->slices()) {
        const std::size_t at = board.add(item.address + slice.offset, slice.bytes);
        if (slice.position == 0) places_[item.item] = {at, 0};
        ++added;
      }
      waiting.push_back(item.item);
      if (added < kLaunchSlices && &item != &items.back()) continue;
      const std::size_t mark = board.start(allocator_.digest_seed());
      for (const std::size_t waited : waiting) places_[waited].mark = mark;
      waiting.clear();
      added = 0;
    }
  } catch (Error& error) {
    for (const Item& item : items) places_.erase(item.item);
    annotate(error, operation_, nullptr);
    report_.problems.push_back("contents could not be compared, so all of them were copied: " +
                               error.message());
  }
}

const cumempool_digest* Comparison::wait(Device& device, std::size_t item) {
  const auto found = places_.find(item);
  if (found == places_.end()) return nullptr;
  device.digest_queue().wait(found->second.mark);
  return &device.digest_board().digest(found->second.first);
}

void Comparison::finish(Device& device) {
  if (begun_.erase(device.ordinal()) != 0) device.digest_queue().drain();
}

}  // namespace cumempool::pool
