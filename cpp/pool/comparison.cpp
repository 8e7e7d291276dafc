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
// Slices per launch behind the copies: memory waits for a launch until it goes back, and small
// allocations share one.
constexpr std::size_t kRecheckSlices = 64;

}  // namespace

void Comparison::start(Device& device, const std::vector<Item>& items) {
  if (!allocator_.retains_backups() || items.empty()) return;
  try {
    std::size_t count = 0;
    for (const Item& item : items) count += item.image->slices().size();
    backup::DigestBuffer& board = device.digest_buffer();
    board.begin(count);
    device.recheck_buffer().begin(count);
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
  device.digest_queue().wait(launch_of(progress_.at(device.ordinal()), found->second.end)->mark);
  return &device.digest_buffer().digest(found->second.first);
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

// The launch that digests the slices before `end`, or null.
const Comparison::Launch* Comparison::launch_of(const Progress& progress, std::size_t end) {
  const auto found = std::lower_bound(
      progress.launches.begin(), progress.launches.end(), end,
      [](const Launch& launch, std::size_t wanted) { return launch.end < wanted; });
  return found == progress.launches.end() ? nullptr : &*found;
}

// ---- behind the copies --------------------------------------------------------------------------

void Comparison::recheck(Device& device, const Item& item, std::vector<std::size_t> slices,
                         backup::CopyQueue& copies) {
  if (slices.empty() || places_[device.ordinal()].count(item.item) == 0) return;
  Rechecks& rechecks = rechecks_[device.ordinal()];
  Progress& progress = rechecks.progress;
  backup::DigestBuffer& board = device.recheck_buffer();
  for (const std::size_t slice : slices) {
    const backup::Slice& part = item.image->slices()[slice];
    board.add(item.address + part.offset, part.bytes);
  }
  const std::size_t first = progress.added;
  progress.added += slices.size();
  rechecks.items[item.item] = {first, std::move(slices)};
  if (progress.added - progress.started >= kRecheckSlices) flush(device, copies);
}

// Where it fails, what it was to digest has no digests any more.
void Comparison::flush(Device& device, backup::CopyQueue& copies) {
  const auto found = rechecks_.find(device.ordinal());
  if (found == rechecks_.end()) return;
  Progress& progress = found->second.progress;
  if (progress.failed || progress.started == progress.added) return;
  try {
    const std::size_t copied = copies.mark();
    device.recheck_queue().follow(copies, copied);
    copies.end_mark(copied);
    const std::size_t mark =
        device.recheck_buffer().start(allocator_.digest_seed(), progress.added - progress.started);
    progress.started = progress.added;
    progress.launches.push_back({progress.started, mark});
  } catch (Error& error) {
    progress.failed = true;
    annotate(error, operation_, nullptr);
    report_.problems.push_back(
        "contents could not be compared behind their copies, so the next sleep copies them: " +
        error.message());
  }
}

std::uint64_t Comparison::verify(Device& device, std::size_t item, backup::Backup& image) {
  const auto rechecks = rechecks_.find(device.ordinal());
  if (rechecks == rechecks_.end()) return 0;
  const auto found = rechecks->second.items.find(item);
  if (found == rechecks->second.items.end()) return 0;
  const Recheck& recheck = found->second;
  const Launch* launch =
      launch_of(rechecks->second.progress, recheck.first + recheck.slices.size());
  if (launch == nullptr) {
    device.recheck_queue().drain();  // it may have begun before it failed
    image.set_digests({});
    return 0;
  }
  device.recheck_queue().wait(launch->mark);
  if (image.digests().empty()) return 0;
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < recheck.slices.size(); ++i) {
    const std::size_t slice = recheck.slices[i];
    if (!image.differs(slice, device.recheck_buffer().digest(recheck.first + i))) continue;
    image.forget_digest(slice);
    bytes += image.slices()[slice].bytes;
  }
  return bytes;
}

void Comparison::finish_rechecks(Device& device) {
  if (progress_.count(device.ordinal()) != 0) device.recheck_queue().drain();
}

// Launches until `end` slices of the board are under way, or all are.
void Comparison::advance(Device& device, std::size_t end) {
  Progress& progress = progress_.at(device.ordinal());
  while (progress.started < std::min(end, progress.added)) {
    const std::size_t count = std::min(kLaunchSlices, progress.added - progress.started);
    const std::size_t mark = device.digest_buffer().start(allocator_.digest_seed(), count);
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
