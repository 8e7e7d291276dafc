// The restore of allocations.
#include "pool/restore.hpp"

#include <algorithm>
#include <exception>
#include <set>
#include <utility>

#include "pool/transitions.hpp"

namespace cumempool::pool {

Restore::Restore(Allocator& allocator, const char* operation, Report& report, Queued queued,
                 std::function<void()> withdraw)
    : allocator_(allocator),
      operation_(operation),
      report_(report),
      queued_(std::move(queued)),
      withdraw_(std::move(withdraw)),
      transfers_(allocator, operation, Direction::kIn, report) {}

void Restore::plan(std::vector<RecordPointer> claimed) {
  records_ = std::move(claimed);
  held_before_.resize(records_.size());
  dropped_.resize(records_.size());  // commit() takes no memory
  attached_.reserve(records_.size());
  for (std::size_t i = 0; i < records_.size(); ++i) {
    const Record& record = *records_[i];
    report_.row(record);
    zero_[record.tag] = allocator_.tags().on_wake(*record.tag) == CUMEMPOOL_ON_WAKE_ZERO;
    held_before_[i] = !record.memory.needs_physical();
    transfers_.add(record, i);
  }
  busy_.reserve(transfers_.all().size());
}

std::vector<int> Restore::devices() {
  std::vector<int> devices;
  for (const auto& transfer : transfers_.all()) devices.push_back(transfer->ordinal());
  return devices;
}

std::uint64_t Restore::bytes_on(int device) const {
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < records_.size(); ++i) {
    if (records_[i]->device == device && !held_before_[i]) bytes += records_[i]->bytes;
  }
  return bytes;
}

bool Restore::done(int device) {
  const DeviceTransfer* transfer = transfers_.find(device);
  return transfer == nullptr || transfer->done();
}

std::uint64_t Restore::next_bytes(int device) {
  const DeviceTransfer* transfer = transfers_.find(device);
  const std::size_t index = transfer->index(transfer->next());
  return held_before_[index] ? 0 : records_[index]->bytes;
}

// ---- forward ------------------------------------------------------------------------------------

void Restore::bring_next(int device) {
  DeviceTransfer* transfer = transfers_.find(device);
  const driver::ContextScope scope(allocator_.driver(), device);
  bring(*transfer, transfer->next());
  transfer->advance();
}

void Restore::bring_all() {
  transfers_.each([](DeviceTransfer& transfer) { transfer.begin(); });
  transfers_.each_in_turn(
      [this](DeviceTransfer& transfer, std::size_t position) { bring(transfer, position); });
}

void Restore::bring(DeviceTransfer& transfer, std::size_t position) {
  const std::size_t index = transfer.index(position);
  Record& record = *records_[index];
  attach(index);
  const auto& backup = record.contents.backup();
  const cumempool_backup_tier tier = backup != nullptr ? backup->tier() : CUMEMPOOL_BACKUP_PINNED;
  transfer.copy(tier, [&] { load(transfer.streams(), record); });
  if (queued_) {
    transfer.about(position, [&] {
      backup::Transfer& streams = transfer.streams();
      streams.bounce_buffers.when_queued(
          [this, &streams, &record] { queued_(record, streams.queue); });
    });
  }
  cumempool_report_row& row = report_.row(record);
  row.allocations += 1;
  if (!held_before_[index]) row.mapped_bytes += record.bytes;
}

void Restore::attach(std::size_t index) {
  attached_.push_back(index);
  try {
    allocator_.with_freed_memory([&] { records_[index]->memory.map(); });
    allocator_.follow_use(*records_[index], allocator_.devices_in_use());
  } catch (Error& error) {
    explain(error, index);
    throw;
  }
}

// Names the need of the whole wake, since that of the failing allocation tells too little.
void Restore::explain(Error& error, std::size_t failed) const {
  const int device = records_[failed]->device;
  annotate(error, operation_, records_[failed].get());
  if (error.status != CUMEMPOOL_OUT_OF_MEMORY) return;
  std::uint64_t taken = 0;
  for (const std::size_t i : attached_) {
    if (records_[i]->device == device && i != failed) taken += records_[i]->bytes;
  }
  error.problem = "the wake needs " + format_bytes(bytes_on(device)) +
                  " on the device; it had taken " + format_bytes(taken) + " and gave them back";
  error.advice =
      "free device memory (torch.cuda.empty_cache(), other tags, other processes) and wake again; "
      "everything is still asleep with its backup";
}

void Restore::load(backup::Transfer& streams, Record& record) {
  if (record.contents.state() == State::kDetached) return;  // the handle still has its contents
  cumempool_report_row& row = report_.row(record);
  if (const auto& backup = record.contents.backup()) {
    backup->restore(streams, record.address);
    row.restored_bytes += backup->bytes();
    if (!zero_.at(record.tag)) return;
    row.zeroed_bytes += backup->zero_rest(streams.queue, record.address, record.bytes);
  } else if (zero_.at(record.tag)) {
    streams.queue.fill_zero(record.address, record.bytes);
    row.zeroed_bytes += record.bytes;
  }
}

void Restore::finish() {
  transfers_.each([](DeviceTransfer& transfer) { transfer.finish_bounce_buffers(); });
  transfers_.each([](DeviceTransfer& transfer) {
    while (!transfer.empty()) transfer.pop();
    transfer.streams().queue.drain();
  });
}

void Restore::commit() {
  auto drop = dropped_.begin();
  allocator_.records().update([&] {
    for (const RecordPointer& record : records_) {
      record->contents.wake();
      record->generation += 1;
      const auto& backup = record->contents.backup();
      const bool comparable =
          backup != nullptr && !backup->digests().empty() && !backup->lent_for_writing();
      if (!comparable) *drop++ = record->contents.drop_retained();
    }
  });
  dropped_.clear();  // within the turn: the next close() relies on it
}

// ---- back ---------------------------------------------------------------------------------------

std::vector<int> Restore::users_of(int device) const {
  std::set<int> users{device};
  for (const std::size_t index : attached_) {
    const Record& record = *records_[index];
    if (record.device != device) continue;
    users.insert(record.memory.access().begin(), record.memory.access().end());
  }
  return {users.begin(), users.end()};
}

// The copies are done, unless the wait for them has failed: then they may still write to mapped
// memory. Memory that was handed out may be in use by any later work of the program.
void Restore::fence_all() {
  for (const auto& transfer : transfers_.all()) {
    if (!transfer->stuck() && !queued_) continue;
    const int device = transfer->ordinal();
    try {
      const driver::ContextScope scope(allocator_.driver(), device);
      transfer->settle();
      allocator_.driver().fence(users_of(device));
    } catch (const std::exception&) {
      busy_.push_back(device);  // has capacity for every transfer
    }
  }
}

void Restore::undo(Error& failure) {
  if (withdraw_) withdraw_();
  transfers_.settle(failure);
  fence_all();
  for (std::size_t n = attached_.size(); n-- > 0;) {
    Record& record = *records_[attached_[n]];
    const bool busy = std::count(busy_.begin(), busy_.end(), record.device) != 0;
    try {
      detach(record, busy);
    } catch (const std::exception& caught) {
      add_secondary(failure, failure_text(caught, operation_, &record));
    }
  }
}

void Restore::detach(Record& record, bool may_be_written_to) {
  if (may_be_written_to) {
    const auto& backup = record.contents.backup();
    if (backup != nullptr) allocator_.leak(backup, record.device);
    if (record.contents.state() != State::kDetached) record.memory.leak();
  } else if (record.contents.state() == State::kDetached) {
    record.memory.unmap();  // the handle keeps the contents
  } else {
    record.memory.vacate();
  }
}

}  // namespace cumempool::pool
