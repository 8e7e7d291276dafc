// The offload of allocations.
#include "pool/offload.hpp"

#include <algorithm>
#include <exception>
#include <numeric>
#include <string>
#include <utility>

#include "pool/backup_plan.hpp"
#include "pool/transitions.hpp"

namespace cumempool::pool {

void refuse_pinned(Allocator& allocator, const char* operation, const Record& record) {
  const std::string holders = allocator.tags().holders(*record.tag);
  if (holders.empty()) return;
  Error error(CUMEMPOOL_IN_USE, "its memory is pinned by " + holders);
  error.advice = "let the holder deregister the memory and release its pin first";
  annotate(error, operation, &record);
  throw error;
}

void refuse_cuda_malloc(const char* operation, const Record& record) {
  if (record.memory.can_sleep()) return;
  Error error(CUMEMPOOL_UNSUPPORTED, "its memory is of cudaMalloc, which cannot sleep");
  error.advice = "leave the tag out, or give it backing='vmm'";
  annotate(error, operation, &record);
  throw error;
}

Offload::Offload(Allocator& allocator, const char* operation, const SleepRequest& request,
                 Report& report)
    : allocator_(allocator),
      operation_(operation),
      request_(request),
      dead_(request.dead, request.dead_as_of),
      report_(report),
      transfers_(allocator, operation, Direction::kOut, report) {}

// ---- the plan -----------------------------------------------------------------------------------

void Offload::admit() {
  for (const auto& action : request_.actions) {
    const Tag& tag = *action.first;
    dead_.look_at(tag);
    if (tag.scopes == 0) continue;
    Error error(CUMEMPOOL_IN_USE, "an open scope of the tag would hand out memory that sleeps");
    error.operation = operation_;
    error.tag = tag.name;
    error.advice = "leave the scope first";
    throw error;
  }
}

bool Offload::wants(const Record& record) const {
  const auto action = request_.actions.find(record.tag);
  if (action == request_.actions.end() || record.freed) return false;
  return !record.contents.asleep() || forgettable(record);
}

bool Offload::discards(const Record& record) const {
  return request_.actions.at(record.tag) == CUMEMPOOL_ON_SLEEP_DISCARD && !record.preserved;
}

// Whether a record is already asleep and its contents must go.
bool Offload::forgettable(const Record& record) const {
  switch (record.contents.state()) {
    case State::kDetached:
      return discards(record) || dead_.live_extents(record).empty();
    case State::kBackedUp:
      return discards(record) && request_.drop_backups;
    default:
      return false;
  }
}

void Offload::plan(const std::vector<RecordPointer>& claimed) {
  for (const RecordPointer& record : claimed) {
    if (record->contents.asleep()) continue;
    refuse_pinned(allocator_, operation_, *record);
    refuse_cuda_malloc(operation_, *record);
  }
  for (const RecordPointer& record : claimed) {
    if (record->contents.state() == State::kBackedUp) {
      forgotten_.push_back(record);
      continue;
    }
    Entry entry;
    entry.record = record;
    if (!record->memory.mapped()) entry.stage = Stage::kDetached;
    if (!discards(*record)) entry.live = dead_.live_extents(*record);
    entries_.push_back(std::move(entry));
  }
  // Made now, since nothing may need memory past the point of no return or on the way back.
  for (const RecordPointer& record : claimed) {
    report_.row(*record);
    released_.emplace(record->device, 0);
  }
  report_.problems.reserve(report_.problems.size() + 2 * claimed.size());
  dropped_.reserve(claimed.size());
  choose_backups();
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (entries_[i].backup == nullptr) {
      discarded_.push_back(i);
    } else {
      transfers_.add(*entries_[i].record, i);
    }
  }
}

void Offload::choose_backups() {
  for (Entry& entry : entries_) {
    if (entry.live.empty()) continue;
    entry.choice = allocator_.tags().backup(*entry.record->tag);
    if (reusable(allocator_, *entry.record, entry.choice, entry.live)) {
      entry.fresh = false;
      entry.choice = entry.record->contents.choice();
      entry.backup = entry.record->contents.backup();
      continue;
    }
    // The retained backup is useless now, but its room is not. The record is awake and loses
    // nothing.
    std::shared_ptr<backup::Backup> dropped;
    allocator_.records().update([&] { dropped = entry.record->contents.drop_retained(); });
  }
  plan_room();
  for (Entry& entry : entries_) {
    if (entry.live.empty() || !entry.fresh) continue;
    try {
      entry.backup = make_backup(allocator_, *entry.record, entry.choice, entry.live);
    } catch (Error& error) {
      annotate(error, operation_, entry.record.get());
      throw;
    }
  }
}

void Offload::plan_room() {
  std::vector<HostNeed> needs;
  for (Entry& entry : entries_) {
    if (entry.live.empty() || !entry.fresh) continue;
    needs.push_back(
        {entry.record->tag, entry.record->device, total_bytes(entry.live), &entry.choice});
  }
  plan_host_memory(allocator_, operation_, needs, /*may_drop_retained=*/true);
}

std::uint64_t Offload::bytes_on(int device) const {
  std::uint64_t bytes = 0;
  for (const Entry& entry : entries_) {
    if (entry.record->device == device) bytes += entry.record->bytes;
  }
  return bytes;
}

std::uint64_t Offload::released_on(int device) const {
  const auto found = released_.find(device);
  return found == released_.end() ? 0 : found->second;
}

void Offload::fence() {
  std::set<int> devices;
  const auto add = [&](const Record& record) {
    devices.insert(record.memory.access().begin(), record.memory.access().end());
  };
  for (const Entry& entry : entries_) add(*entry.record);
  try {
    allocator_.driver().fence({devices.begin(), devices.end()});
  } catch (Error& error) {
    annotate(error, operation_, nullptr);
    throw;
  }
}

// ---- copies -------------------------------------------------------------------------------------

// Orders the missing host memory before any of it is used. If the system has none left, retained
// backups make room.
void Offload::make_room() {
  std::map<backup::HostArena*, std::size_t> needs;
  std::map<backup::HostArena*, const Record*> first;
  for (const Entry& entry : entries_) {
    if (entry.backup == nullptr || !entry.fresh) continue;
    backup::HostArena* arena = arena_of(allocator_, entry.choice, entry.record->device);
    if (arena == nullptr) continue;
    needs[arena] += total_bytes(entry.live);
    first.emplace(arena, entry.record.get());
  }
  for (const auto& [arena, bytes] : needs) {
    try {
      orders_.push_back(std::make_unique<backup::ArenaOrder>(*arena, bytes));
    } catch (Error& error) {
      annotate(error, operation_, first.at(arena));
      if (error.status != CUMEMPOOL_OUT_OF_HOST_MEMORY || !allocator_.drop_retained(bytes)) throw;
      orders_.push_back(std::make_unique<backup::ArenaOrder>(*arena, bytes));
    }
  }
}

void Offload::start_copies() {
  try {
    make_room();
    transfers_.each([this](DeviceTransfer& transfer) {
      start_digests(transfer);
      transfer.begin();
    });
    transfers_.each_in_turn(
        [this](DeviceTransfer& transfer, std::size_t position) { copy(transfer, position); });
    transfers_.each([this](DeviceTransfer& transfer) { finish_copies(transfer); });
    orders_.clear();
    transfers_.each([this](DeviceTransfer& transfer) { keep_digests(transfer); });
  } catch (Error& error) {
    annotate(error, operation_, nullptr);
    throw;
  }
}

void Offload::start_digests(DeviceTransfer& transfer) {
  for (std::size_t position = 0; position < transfer.size(); ++position) {
    const Entry& entry = entries_[transfer.index(position)];
    transfer.dirty().add(entry.record->address, *entry.backup);
  }
  transfer.dirty().start();
}

void Offload::copy(DeviceTransfer& transfer, std::size_t position) {
  Entry& entry = entries_[transfer.index(position)];
  backup::Backup& backup = *entry.backup;
  const cumempool_digest* digests = nullptr;
  if (entry.fresh) {
    transfer.dirty().pass(position);
  } else {
    transfer.about(position, [&] { digests = transfer.dirty().wait(position); });
  }
  if (digests == nullptr) {
    entry.copied.resize(backup.slices().size());
    std::iota(entry.copied.begin(), entry.copied.end(), std::size_t{0});
  } else {
    entry.copied = backup.changed(digests);
  }
  transfer.copy(entry.choice.tier, [&] {
    std::uint64_t copied = backup.bytes();
    if (digests == nullptr) {
      backup.save(transfer.streams(), entry.record->address);
    } else {
      copied = backup.save_changes(transfer.streams(), entry.record->address, digests);
    }
    entry.clean_bytes = backup.bytes() - copied;
  });
  if (!backup::uses_bounce_buffers(entry.choice.tier)) recheck(transfer, position);
}

// Digests the copied slices of an allocation once more, behind their copies.
void Offload::recheck(DeviceTransfer& transfer, std::size_t position) {
  Entry& entry = entries_[transfer.index(position)];
  transfer.dirty().recheck(position, std::move(entry.copied), transfer.streams().queue);
}

// Copies through bounce buffers are complete once their threads have finished.
void Offload::finish_copies(DeviceTransfer& transfer) {
  transfer.finish_bounce_buffers();
  for (std::size_t position = 0; position < transfer.size(); ++position) {
    const Entry& entry = entries_[transfer.index(position)];
    if (backup::uses_bounce_buffers(entry.choice.tier)) recheck(transfer, position);
  }
  transfer.dirty().flush(transfer.streams().queue);
}

// Forgets digests that do not match the copied bytes.
void Offload::verify(DeviceTransfer& transfer, std::size_t position) {
  const Entry& entry = entries_[transfer.index(position)];
  const Record& record = *entry.record;
  std::uint64_t bytes = 0;
  transfer.about(position, [&] { bytes = transfer.dirty().verify(position, *entry.backup); });
  if (bytes == 0) return;
  report_.problems.push_back(
      format_bytes(bytes) + " of tag '" + record.tag->name + "' on device " +
      std::to_string(record.device) +
      " changed during the copy, so the next sleep copies them again: something writes to "
      "memory that goes to sleep");
}

void Offload::keep_digests(DeviceTransfer& transfer) {
  transfer.dirty().complete();
  for (std::size_t position = 0; position < transfer.size(); ++position) {
    const Entry& entry = entries_[transfer.index(position)];
    const cumempool_digest* digests = nullptr;
    transfer.about(position, [&] { digests = transfer.dirty().wait(position); });
    const std::size_t count = digests == nullptr ? 0 : entry.backup->slices().size();
    entry.backup->set_digests({digests, digests + count});
  }
}

// ---- the release of device memory ---------------------------------------------------------------

void Offload::detach(Entry& entry) {
  try {
    entry.record->memory.unmap();
    entry.stage = Stage::kDetached;
  } catch (Error& error) {
    annotate(error, operation_, entry.record.get());
    throw;
  }
}

// If the driver refuses, the memory keeps its contents for the way back; commit() leaks it.
void Offload::give_back(Record& record) noexcept {
  try {
    driver::check(allocator_.driver().table(), "release", record.memory.release_physical(),
                  record.device, record.bytes);
    report_.row(record).freed_bytes += record.bytes;
    released_.find(record.device)->second += record.bytes;
  } catch (const std::exception& caught) {
    report_.problem(failure_text(caught, operation_, &record));
  }
}

void Offload::account(const Entry& entry) {
  cumempool_report_row& row = report_.row(*entry.record);
  const std::uint64_t kept = total_bytes(entry.live);
  row.allocations += 1;
  row.backed_up_bytes += kept;
  row.clean_bytes += entry.clean_bytes;
  row.discarded_bytes += entry.record->bytes - kept;
}

void Offload::release(Entry& entry) {
  if (entry.stage == Stage::kAwake) detach(entry);
  entry.stage = Stage::kReleased;
  account(entry);
  give_back(*entry.record);
}

bool Offload::release_next(int device, bool with_discarded) {
  DeviceTransfer* transfer = transfers_.find(device);
  if (transfer != nullptr && !transfer->empty()) {
    std::size_t position = 0;
    {
      const driver::ContextScope scope(allocator_.driver(), device);
      position = transfer->pop();
      verify(*transfer, position);
    }
    release(entries_[transfer->index(position)]);
    return true;
  }
  if (!with_discarded) return false;
  for (const std::size_t i : discarded_) {
    if (entries_[i].record->device != device || entries_[i].stage == Stage::kReleased) continue;
    release(entries_[i]);
    return true;
  }
  return false;
}

// Detaches discarded memory while copies still run. Until something has been released, all of it
// can be mapped again without asking the device for memory.
void Offload::finish() {
  for (const std::size_t i : discarded_) {
    if (entries_[i].stage == Stage::kAwake) detach(entries_[i]);
  }
  for (bool any = true; any;) {
    any = false;
    for (const auto& transfer : transfers_.all()) {
      any = release_next(transfer->ordinal(), false) || any;
    }
  }
  transfers_.each([](DeviceTransfer& transfer) { transfer.dirty().finish_rechecks(); });
}

void Offload::commit() noexcept {
  allocator_.records().update([&] {
    for (Entry& entry : entries_) {
      Contents& contents = entry.record->contents;
      if (entry.backup != nullptr) {
        contents.back_up(entry.backup, entry.choice);
      } else {
        dropped_.push_back(contents.discard());
      }
    }
    for (const RecordPointer& record : forgotten_) {
      cumempool_report_row& row = report_.row(*record);
      row.allocations += 1;
      row.discarded_bytes += record->contents.backup()->bytes();
      dropped_.push_back(record->contents.discard());
    }
  });
  dropped_.clear();  // outside the lock: calls the kernel for files, the driver for peers
  for (Entry& entry : entries_) {
    if (entry.stage != Stage::kReleased) release(entry);
    entry.record->memory.leak();
  }
}

// ---- the way back -------------------------------------------------------------------------------

void Offload::undo(Error& failure) noexcept {
  transfers_.settle(failure);
  orders_.clear();
  for (std::size_t i = entries_.size(); i-- > 0;) {
    if (entries_[i].stage != Stage::kAwake) reattach(entries_[i], failure);
  }
  forget_overwritten();
}

void Offload::reattach(Entry& entry, Error& failure) noexcept {
  Record& record = *entry.record;
  const bool had_contents = record.memory.holds_physical();
  if (had_contents && record.contents.asleep()) return;  // detached, as before
  try {
    if (!had_contents && entry.backup == nullptr) {
      throw Error(CUMEMPOOL_DRIVER_ERROR, "its contents are discarded already");
    }
    record.memory.map();
    allocator_.follow_use(record, allocator_.devices_in_use());
    if (had_contents) return;
    const driver::ContextScope scope(allocator_.driver(), record.device);
    backup::Transfer& streams = transfers_.find(record.device)->streams();
    entry.backup->restore(streams, record.address);
    streams.bounce_buffers.finish();
    streams.queue.drain();
    allocator_.records().update([&] { record.generation += 1; });
  } catch (const std::exception& caught) {
    keep_asleep(entry, failure, failure_text(caught, operation_, &record));
  }
}

// Loses nothing: the contents are in the backup, or in the handle that is still held.
void Offload::keep_asleep(Entry& entry, Error& failure, std::string&& why) noexcept {
  Record& record = *entry.record;
  add_secondary(failure, std::move(why), "stays asleep: ");
  DeviceTransfer* transfer = transfers_.find(record.device);
  if (transfer != nullptr) transfer->device().unsettle();
  const bool detached = entry.backup == nullptr && record.memory.holds_physical();
  if (entry.backup != nullptr && record.memory.holds_physical()) {
    try {
      const driver::ContextScope scope(allocator_.driver(), record.device);
      if (transfer != nullptr) transfer->settle();
      allocator_.driver().fence(record.memory.access());  // copies into it may still run
      record.memory.vacate();
    } catch (const std::exception&) {
      add_secondary(failure, {}, "its device memory could not be given back");
      record.memory.leak();
      allocator_.leak(entry.backup, record.device);
    }
  }
  std::shared_ptr<backup::Backup> dropped;  // outside of the records' lock
  allocator_.records().update([&] {
    if (entry.backup == nullptr) {
      dropped = detached ? record.contents.detach() : record.contents.discard();
    } else {
      record.contents.back_up(entry.backup, entry.choice);
      dropped.swap(entry.backup);
    }
  });
}

// Drops retained backups that were being overwritten. Backups that copies may still write to stay
// where they are (R5).
void Offload::forget_overwritten() noexcept {
  for (Entry& entry : entries_) {
    const DeviceTransfer* transfer = transfers_.find(entry.record->device);
    if (entry.backup == nullptr || transfer == nullptr) continue;
    if (transfer->stuck()) allocator_.leak(entry.backup, entry.record->device);
    if (entry.fresh) continue;
    std::shared_ptr<backup::Backup> dropped;
    allocator_.records().update([&] { dropped = entry.record->contents.drop_retained(); });
  }
}

}  // namespace cumempool::pool
