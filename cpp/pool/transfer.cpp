// One device's share of a transition: copies, digests, report.
#include "pool/transfer.hpp"

#include <algorithm>
#include <exception>
#include <utility>

namespace cumempool::pool {

// ---- report -------------------------------------------------------------------------------------

cumempool_report_row& Report::row(const Record& record) {
  const char* tag = record.tag->name.c_str();
  for (cumempool_report_row& row : rows) {
    if (row.tag == tag && row.device == record.device) return row;
  }
  cumempool_report_row row{};
  row.size = sizeof row;
  row.tag = tag;
  row.device = record.device;
  rows.push_back(row);
  return rows.back();
}

// ---- digests ------------------------------------------------------------------------------------

namespace {

// Slices per launch, each of which keeps one multiprocessor busy: enough to fill a device, few
// enough that the first answers come at once.
constexpr std::size_t kLaunchSlices = 512;
// How far launches run ahead of the allocation that is asked for.
constexpr std::size_t kAheadSlices = 1024;
// Slices per launch behind the copies: memory waits for a launch until it goes back, and small
// allocations share one.
constexpr std::size_t kRecheckSlices = 64;

}  // namespace

std::optional<std::size_t> DirtyTracker::Launches::mark_of(std::size_t end) const {
  const auto found = marks.lower_bound(end);
  if (found == marks.end()) return std::nullopt;
  return found->second;
}

void DirtyTracker::start(const std::vector<Source>& sources) {
  if (!allocator_.retains_backups() || sources.empty()) return;
  try {
    std::size_t count = 0;
    for (const Source& source : sources) count += source.image->slices().size();
    backup::DigestBuffer& board = device_.digest_buffer();
    board.begin(count);
    device_.recheck_buffer().begin(count);
    begun_ = true;
    allotted_.reserve(sources.size());
    for (const Source& source : sources) {
      for (const backup::Slice& slice : source.image->slices()) {
        board.add(source.address + slice.offset, slice.bytes);
      }
      const std::size_t first = digests_.added;
      digests_.added += source.image->slices().size();
      allotted_.push_back({source, first, digests_.added});
    }
    known_ = true;
    advance(kAheadSlices);
  } catch (Error& error) {
    give_up(error);
  }
}

const cumempool_digest* DirtyTracker::wait(std::size_t position) {
  pass(position);
  if (!known_) return nullptr;
  const Allotted& allotted = allotted_[position];
  device_.digest_queue().wait(*digests_.mark_of(allotted.end));
  return &device_.digest_buffer().digest(allotted.first);
}

void DirtyTracker::pass(std::size_t position) {
  if (!known_) return;
  try {
    advance(allotted_[position].end + kAheadSlices);
  } catch (Error& error) {
    give_up(error);
  }
}

void DirtyTracker::complete() {
  try {
    advance(digests_.added);
  } catch (Error& error) {
    give_up(error);
  }
  finish();
}

void DirtyTracker::finish() {
  if (begun_) device_.digest_queue().drain();
}

// Launches until `end` slices of the board are under way, or all are.
void DirtyTracker::advance(std::size_t end) {
  while (digests_.started < std::min(end, digests_.added)) {
    const std::size_t count = std::min(kLaunchSlices, digests_.added - digests_.started);
    const std::size_t mark = device_.digest_buffer().start(allocator_.digest_seed(), count);
    digests_.started += count;
    digests_.marks.emplace(digests_.started, mark);
  }
}

// Without digests everything is copied, and nothing can be compared with the next time.
void DirtyTracker::give_up(Error& error) {
  known_ = false;
  digests_.added = digests_.started;
  annotate(error, operation_, nullptr);
  report_.problems.push_back("contents could not be compared, so all of them were copied: " +
                             error.message());
}

// ---- behind the copies --------------------------------------------------------------------------

void DirtyTracker::recheck(std::size_t position, std::vector<std::size_t> slices,
                           backup::CopyQueue& copies) {
  if (slices.empty() || !known_) return;
  Allotted& allotted = allotted_[position];
  for (const std::size_t slice : slices) {
    const backup::Slice& part = allotted.source.image->slices()[slice];
    device_.recheck_buffer().add(allotted.source.address + part.offset, part.bytes);
  }
  allotted.first_recheck = rechecks_.added;
  rechecks_.added += slices.size();
  allotted.rechecked = std::move(slices);
  if (rechecks_.added - rechecks_.started >= kRecheckSlices) flush(copies);
}

// Where it fails, what it was to digest has no digests any more.
void DirtyTracker::flush(backup::CopyQueue& copies) {
  if (rechecks_failed_ || rechecks_.started == rechecks_.added) return;
  try {
    const std::size_t copied = copies.mark();
    device_.recheck_queue().follow(copies, copied);
    copies.end_mark(copied);
    const std::size_t mark = device_.recheck_buffer().start(allocator_.digest_seed(),
                                                            rechecks_.added - rechecks_.started);
    rechecks_.started = rechecks_.added;
    rechecks_.marks.emplace(rechecks_.started, mark);
  } catch (Error& error) {
    rechecks_failed_ = true;
    annotate(error, operation_, nullptr);
    report_.problems.push_back(
        "contents could not be compared behind their copies, so the next sleep copies them: " +
        error.message());
  }
}

std::uint64_t DirtyTracker::verify(std::size_t position, backup::Backup& image) {
  if (position >= allotted_.size()) return 0;
  const Allotted& allotted = allotted_[position];
  if (allotted.rechecked.empty()) return 0;
  const auto mark = rechecks_.mark_of(allotted.first_recheck + allotted.rechecked.size());
  if (!mark) {
    device_.recheck_queue().drain();  // it may have begun before it failed
    image.set_digests({});
    return 0;
  }
  device_.recheck_queue().wait(*mark);
  if (image.digests().empty()) return 0;
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < allotted.rechecked.size(); ++i) {
    const std::size_t slice = allotted.rechecked[i];
    const cumempool_digest& digest = device_.recheck_buffer().digest(allotted.first_recheck + i);
    if (!image.differs(slice, digest)) continue;
    image.forget_digest(slice);
    bytes += image.slices()[slice].bytes;
  }
  return bytes;
}

void DirtyTracker::finish_rechecks() {
  if (begun_) device_.recheck_queue().drain();
}

// ---- one device ---------------------------------------------------------------------------------

DeviceTransfer::DeviceTransfer(Allocator& allocator, const char* operation,
                               std::shared_ptr<Device> device, Direction direction, Report& report)
    : allocator_(allocator),
      operation_(operation),
      device_(std::move(device)),
      streams_(device_->transfer(direction)),
      report_(report),
      dirty_(allocator, *device_, operation, report),
      seen_(streams_.queue.enqueued()),
      since_(Clock::now()) {}

void DeviceTransfer::add(const Record& record, std::size_t index) {
  items_.push_back({&record, index});
  allocator_.progress().total += record.bytes;
}

void DeviceTransfer::advance() {
  ++next_;
  poll();
}

// ---- copies -------------------------------------------------------------------------------------

void DeviceTransfer::copy(cumempool_backup_tier tier, const std::function<void()>& start) {
  Item& item = items_[copied_];
  const Record* const record = item.record;
  const Clock::time_point begin = Clock::now();
  streams_.staged.about(
      [operation = operation_, record](Error& error) { annotate(error, operation, record); });
  about(copied_, [&] {
    start();
    const std::uint64_t enqueued = streams_.queue.enqueued();
    if (tier == CUMEMPOOL_BACKUP_PAGEABLE || tier == CUMEMPOOL_BACKUP_FILE) {
      poll();
      last_staged_ = record;
      note_staged(seconds_since(begin));
    } else if (enqueued != seen_) {
      item.mark = streams_.queue.mark();
    }
    seen_ = enqueued;
  });
  ++copied_;
}

void DeviceTransfer::finish_staged() {
  const Clock::time_point begin = Clock::now();
  about(items_.size() - 1, [this] { streams_.staged.finish(); });
  note_staged(seconds_since(begin));
}

void DeviceTransfer::note_staged(double seconds) {
  if (last_staged_ == nullptr) return;
  report_.row(*last_staged_).copy_seconds += seconds;
  if (finished_ == copied_) since_ = Clock::now();
}

void DeviceTransfer::finish_oldest() {
  Item& item = items_[finished_];
  if (item.mark) {
    streams_.queue.end_mark(*item.mark);
    item.mark.reset();
    const Clock::time_point now = Clock::now();
    report_.row(*item.record).copy_seconds += std::chrono::duration<double>(now - since_).count();
    since_ = now;
  }
  allocator_.progress().done += item.record->bytes;
  ++finished_;
}

// Enters the times of what has finished meanwhile.
void DeviceTransfer::poll() {
  while (finished_ < copied_) {
    const Item& item = items_[finished_];
    bool done = true;
    about(finished_, [&] { done = !item.mark || streams_.queue.done(*item.mark); });
    if (!done) return;
    finish_oldest();
  }
}

std::size_t DeviceTransfer::pop() {
  if (finished_ == popped_) {
    const Item& item = items_[popped_];
    about(popped_, [&] {
      if (item.mark) streams_.queue.wait(*item.mark);
    });
    finish_oldest();
  }
  return popped_++;
}

void DeviceTransfer::unsettle() noexcept {
  stuck_ = true;
  device_->unsettle();
}

void DeviceTransfer::settle() {
  device_->settle();
  stuck_ = false;
}

// ---- all devices --------------------------------------------------------------------------------

DeviceTransfer* DeviceTransfers::find(int device) noexcept {
  for (const auto& transfer : transfers_) {
    if (transfer->ordinal() == device) return transfer.get();
  }
  return nullptr;
}

void DeviceTransfers::add(const Record& record, std::size_t index) {
  DeviceTransfer* transfer = find(record.device);
  if (transfer == nullptr) {
    const driver::ContextScope scope(allocator_.driver(), record.device);
    const std::shared_ptr<Device> device = allocator_.devices().at(record.device);
    device->settle();
    transfers_.push_back(
        std::make_unique<DeviceTransfer>(allocator_, operation_, device, direction_, report_));
    transfer = transfers_.back().get();
  }
  transfer->add(record, index);
}

void DeviceTransfers::each_in_turn(const std::function<void(DeviceTransfer&, std::size_t)>& step) {
  for (bool any = true; any;) {
    any = false;
    for (const auto& transfer : transfers_) {
      if (transfer->done()) continue;
      any = true;
      const driver::ContextScope scope(allocator_.driver(), transfer->ordinal());
      step(*transfer, transfer->next());
      transfer->advance();
    }
  }
}

void DeviceTransfers::each(const std::function<void(DeviceTransfer&)>& step) {
  for (const auto& transfer : transfers_) {
    const driver::ContextScope scope(allocator_.driver(), transfer->ordinal());
    step(*transfer);
  }
}

void DeviceTransfers::settle(Error& failure) noexcept {
  for (const auto& transfer : transfers_) {
    transfer->unsettle();
    try {
      const driver::ContextScope scope(allocator_.driver(), transfer->ordinal());
      transfer->settle();
    } catch (const std::exception& caught) {
      add_secondary(failure, told(caught, operation_, nullptr));
    }
  }
}

}  // namespace cumempool::pool
