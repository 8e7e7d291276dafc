// The transfer of one device in a transition: copies, digests, report.
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

// Slices per launch. Each slice keeps one multiprocessor busy: enough to fill a device, few enough
// that the first digests come at once.
constexpr std::size_t kLaunchSlices = 512;
// How far launches run ahead of the allocation at hand.
constexpr std::size_t kAheadSlices = 1024;
// Slices per launch behind the copies. Memory is released only after its launch, and small
// allocations share one.
constexpr std::size_t kRecheckSlices = 64;

}  // namespace

void DirtyTracker::start() {
  if (!allocator_.retains_backups() || sources_.empty()) return;
  try {
    std::size_t count = 0;
    for (const Source& source : sources_) count += source.backup->slices().size();
    backup::DigestBuffer& digests = device_.digests();
    digests.begin(count);
    device_.rechecks().begin(count);
    begun_ = true;
    for (Source& source : sources_) {
      source.first = digests.added();
      for (const backup::Slice& slice : source.backup->slices()) {
        digests.add(source.address + slice.offset, slice.bytes);
      }
      source.end = digests.added();
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
  const Source& source = sources_[position];
  device_.digests().wait(source.end);
  return &device_.digests().digest(source.first);
}

void DirtyTracker::pass(std::size_t position) {
  if (!known_) return;
  try {
    advance(sources_[position].end + kAheadSlices);
  } catch (Error& error) {
    give_up(error);
  }
}

void DirtyTracker::complete() {
  try {
    if (known_) advance(device_.digests().added());
  } catch (Error& error) {
    give_up(error);
  }
  finish();
}

void DirtyTracker::finish() {
  if (begun_) device_.digests().queue().drain();
}

// Launches the digests of all slices before `end`.
void DirtyTracker::advance(std::size_t end) {
  backup::DigestBuffer& digests = device_.digests();
  while (digests.started() < std::min(end, digests.added())) {
    digests.start(allocator_.digest_seed(),
                  std::min(kLaunchSlices, digests.added() - digests.started()));
  }
}

// Without digests everything is copied, and the next sleep has none to compare with.
void DirtyTracker::give_up(Error& error) {
  known_ = false;
  annotate(error, operation_, nullptr);
  report_.problems.push_back("contents could not be compared, so all of them were copied: " +
                             error.message());
}

// ---- behind the copies --------------------------------------------------------------------------

void DirtyTracker::recheck(std::size_t position, std::vector<std::size_t> slices,
                           backup::CopyQueue& copies) {
  if (slices.empty() || !known_) return;
  Source& source = sources_[position];
  backup::DigestBuffer& rechecks = device_.rechecks();
  source.first_recheck = rechecks.added();
  for (const std::size_t slice : slices) {
    const backup::Slice& part = source.backup->slices()[slice];
    rechecks.add(source.address + part.offset, part.bytes);
  }
  source.rechecked = std::move(slices);
  if (rechecks.added() - rechecks.started() >= kRecheckSlices) flush(copies);
}

// If a launch fails, its slices have no digests any more.
void DirtyTracker::flush(backup::CopyQueue& copies) {
  if (!begun_ || rechecks_failed_) return;
  backup::DigestBuffer& rechecks = device_.rechecks();
  const std::size_t count = rechecks.added() - rechecks.started();
  if (count == 0) return;
  try {
    const std::size_t copied = copies.mark();
    rechecks.queue().follow(copies, copied);
    copies.end_mark(copied);
    rechecks.start(allocator_.digest_seed(), count);
  } catch (Error& error) {
    rechecks_failed_ = true;
    annotate(error, operation_, nullptr);
    report_.problems.push_back(
        "contents could not be compared behind their copies, so the next sleep copies them: " +
        error.message());
  }
}

std::uint64_t DirtyTracker::verify(std::size_t position, backup::Backup& backup) {
  if (position >= sources_.size()) return 0;
  const Source& source = sources_[position];
  if (source.rechecked.empty()) return 0;
  backup::DigestBuffer& rechecks = device_.rechecks();
  if (!rechecks.wait(source.first_recheck + source.rechecked.size())) {
    rechecks.queue().drain();  // a failed launch may have begun
    backup.set_digests({});
    return 0;
  }
  if (backup.digests().empty()) return 0;
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < source.rechecked.size(); ++i) {
    const std::size_t slice = source.rechecked[i];
    const cumempool_digest& digest = rechecks.digest(source.first_recheck + i);
    if (!backup.differs(slice, digest)) continue;
    backup.forget_digest(slice);
    bytes += backup.slices()[slice].bytes;
  }
  return bytes;
}

void DirtyTracker::finish_rechecks() {
  if (begun_) device_.rechecks().queue().drain();
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
  allocator_.counters().bytes_to_copy += record.bytes;
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
  streams_.bounce_buffers.about(
      [operation = operation_, record](Error& error) { annotate(error, operation, record); });
  about(copied_, [&] {
    start();
    const std::uint64_t enqueued = streams_.queue.enqueued();
    if (backup::uses_bounce_buffers(tier)) {
      poll();
      last_bounced_ = record;
      add_bounce_seconds(seconds_since(begin));
    } else if (enqueued != seen_) {
      item.mark = streams_.queue.mark();
    }
    seen_ = enqueued;
  });
  ++copied_;
}

void DeviceTransfer::finish_bounce_buffers() {
  const Clock::time_point begin = Clock::now();
  about(items_.size() - 1, [this] { streams_.bounce_buffers.finish(); });
  add_bounce_seconds(seconds_since(begin));
}

void DeviceTransfer::add_bounce_seconds(double seconds) {
  if (last_bounced_ == nullptr) return;
  report_.row(*last_bounced_).copy_seconds += seconds;
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
  allocator_.counters().copied_bytes += item.record->bytes;
  ++finished_;
}

// Reports the times of the copies that have finished.
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
      add_secondary(failure, failure_text(caught, operation_, nullptr));
    }
  }
}

}  // namespace cumempool::pool
