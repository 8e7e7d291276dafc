// Allocations that go to sleep.
#include "pool/offload.hpp"

#include <algorithm>
#include <exception>
#include <numeric>
#include <string>
#include <utility>

#include "pool/backup_plan.hpp"
#include "pool/transitions.hpp"

namespace cumempool::pool {

namespace {

// Threads take part in its copies.
bool is_staged(cumempool_backup_tier tier) {
  return tier == CUMEMPOOL_BACKUP_PAGEABLE || tier == CUMEMPOOL_BACKUP_FILE;
}

}  // namespace

void refuse_to_sleep(Allocator& allocator, const char* operation, const Record& record,
                     Pinned pinned) {
  const std::string holders =
      pinned == Pinned::kCounts ? allocator.tags().holders(*record.tag) : std::string();
  if (!holders.empty()) {
    Error error(CUMEMPOOL_IN_USE, "its memory is pinned by " + holders);
    error.advice = "have the holder deregister the memory and release its pin first";
    annotate(error, operation, &record);
    throw error;
  }
  if (!record.memory.can_sleep()) {
    Error error(CUMEMPOOL_UNSUPPORTED, "its memory is of cudaMalloc, which cannot sleep");
    error.advice = "leave the tag out, or give it backing='vmm'";
    annotate(error, operation, &record);
    throw error;
  }
}

Offload::Offload(Allocator& allocator, const char* operation, const SleepRequest& request,
                 Report& report)
    : allocator_(allocator),
      operation_(operation),
      request_(request),
      dead_(request.dead, request.dead_as_of),
      report_(report),
      transfers_(allocator, operation, Direction::kOut, report) {}

// ---- what is to be done -------------------------------------------------------------------------

void Offload::admit() {
  for (const auto& action : request_.actions) {
    const Tag& tag = *action.first;
    dead_.look_at(tag);
    if (tag.scopes == 0) continue;
    Error error(CUMEMPOOL_IN_USE,
                "a scope of the tag is open, and would hand out memory that sleeps");
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

// Asleep with contents that are to go.
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
    if (!record->contents.asleep()) refuse_to_sleep(allocator_, operation_, *record);
  }
  for (const RecordPointer& record : claimed) {
    if (record->contents.state() == State::kBackedUp) {
      forgotten_.push_back(record);
      continue;
    }
    Sleeper sleeper;
    sleeper.record = record;
    if (!record->memory.mapped()) sleeper.stage = Stage::kDetached;
    if (!discards(*record)) sleeper.live = dead_.live_extents(*record);
    sleepers_.push_back(std::move(sleeper));
  }
  // Made now: past the point of no return, and on the way back, nothing may need memory.
  for (const RecordPointer& record : claimed) {
    report_.row(*record);
    released_.emplace(record->device, 0);
  }
  report_.problems.reserve(report_.problems.size() + 2 * claimed.size());
  dropped_.reserve(claimed.size());
  choose_images();
  for (std::size_t i = 0; i < sleepers_.size(); ++i) {
    if (sleepers_[i].image == nullptr) {
      discarded_.push_back(i);
    } else {
      transfers_.add(*sleepers_[i].record, i);
    }
  }
}

void Offload::choose_images() {
  for (Sleeper& sleeper : sleepers_) {
    if (sleeper.live.empty()) continue;
    sleeper.choice = allocator_.tags().backup(*sleeper.record->tag);
    if (reusable(allocator_, *sleeper.record, sleeper.choice, sleeper.live)) {
      sleeper.fresh = false;
      sleeper.choice = sleeper.record->contents.choice();
      sleeper.image = sleeper.record->contents.image();
      continue;
    }
    // What it has retained is no use any more, and its room is: it is awake and loses nothing.
    std::shared_ptr<backup::Backup> dropped;
    allocator_.records().update([&] { dropped = sleeper.record->contents.drop_retained(); });
  }
  plan_room();
  for (Sleeper& sleeper : sleepers_) {
    if (sleeper.live.empty() || !sleeper.fresh) continue;
    try {
      sleeper.image = make_image(allocator_, *sleeper.record, sleeper.choice, sleeper.live);
    } catch (Error& error) {
      annotate(error, operation_, sleeper.record.get());
      throw;
    }
  }
}

void Offload::plan_room() {
  std::vector<HostNeed> needs;
  for (Sleeper& sleeper : sleepers_) {
    if (sleeper.live.empty() || !sleeper.fresh) continue;
    needs.push_back(
        {sleeper.record->tag, sleeper.record->device, total_bytes(sleeper.live), &sleeper.choice});
  }
  plan_host_memory(allocator_, operation_, needs, Retained::kMayGo);
}

std::uint64_t Offload::bytes_on(int device) const {
  std::uint64_t bytes = 0;
  for (const Sleeper& sleeper : sleepers_) {
    if (sleeper.record->device == device) bytes += sleeper.record->bytes;
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
  for (const Sleeper& sleeper : sleepers_) add(*sleeper.record);
  try {
    allocator_.driver().fence({devices.begin(), devices.end()});
  } catch (Error& error) {
    annotate(error, operation_, nullptr);
    throw;
  }
}

// ---- copies -------------------------------------------------------------------------------------

// Orders the host memory that is missing, before anything of it is used. Backups that are only
// retained make room where the system has none left.
void Offload::make_room() {
  std::map<backup::HostArena*, std::size_t> needs;
  std::map<backup::HostArena*, const Record*> first;
  for (const Sleeper& sleeper : sleepers_) {
    if (sleeper.image == nullptr || !sleeper.fresh) continue;
    backup::HostArena* arena = arena_of(allocator_, sleeper.choice, sleeper.record->device);
    if (arena == nullptr) continue;
    needs[arena] += total_bytes(sleeper.live);
    first.emplace(arena, sleeper.record.get());
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
  std::vector<DirtyTracker::Source> sources;
  sources.reserve(transfer.size());
  for (std::size_t position = 0; position < transfer.size(); ++position) {
    const Sleeper& sleeper = sleepers_[transfer.index(position)];
    sources.push_back({sleeper.record->address, sleeper.image.get()});
  }
  transfer.dirty().start(sources);
}

void Offload::copy(DeviceTransfer& transfer, std::size_t position) {
  Sleeper& sleeper = sleepers_[transfer.index(position)];
  backup::Backup& image = *sleeper.image;
  const cumempool_digest* digests = nullptr;
  if (sleeper.fresh) {
    transfer.dirty().pass(position);
  } else {
    transfer.about(position, [&] { digests = transfer.dirty().wait(position); });
  }
  if (digests == nullptr) {
    sleeper.copied.resize(image.slices().size());
    std::iota(sleeper.copied.begin(), sleeper.copied.end(), std::size_t{0});
  } else {
    sleeper.copied = image.changed(digests);
  }
  transfer.copy(sleeper.choice.tier, [&] {
    std::uint64_t copied = image.bytes();
    if (digests == nullptr) {
      image.save(transfer.streams(), sleeper.record->address);
    } else {
      copied = image.save_changes(transfer.streams(), sleeper.record->address, digests);
    }
    sleeper.clean_bytes = image.bytes() - copied;
  });
  if (!is_staged(sleeper.choice.tier)) recheck(transfer, position);
}

// Digests what was copied of an allocation once more, behind its copies.
void Offload::recheck(DeviceTransfer& transfer, std::size_t position) {
  Sleeper& sleeper = sleepers_[transfer.index(position)];
  transfer.dirty().recheck(position, std::move(sleeper.copied), transfer.streams().queue);
}

// What threads write out is copied when they have ended.
void Offload::finish_copies(DeviceTransfer& transfer) {
  transfer.finish_staged();
  for (std::size_t position = 0; position < transfer.size(); ++position) {
    const Sleeper& sleeper = sleepers_[transfer.index(position)];
    if (is_staged(sleeper.choice.tier)) recheck(transfer, position);
  }
  transfer.dirty().flush(transfer.streams().queue);
}

// A digest is that of the bytes that were copied, or it is forgotten.
void Offload::verify(DeviceTransfer& transfer, std::size_t position) {
  const Sleeper& sleeper = sleepers_[transfer.index(position)];
  const Record& record = *sleeper.record;
  std::uint64_t bytes = 0;
  transfer.about(position, [&] { bytes = transfer.dirty().verify(position, *sleeper.image); });
  if (bytes == 0) return;
  report_.problems.push_back(
      format_bytes(bytes) + " of tag '" + record.tag->name + "' on device " +
      std::to_string(record.device) +
      " changed while they were copied, and the next sleep copies them again: something writes to "
      "memory that goes to sleep");
}

void Offload::keep_digests(DeviceTransfer& transfer) {
  transfer.dirty().complete();
  for (std::size_t position = 0; position < transfer.size(); ++position) {
    const Sleeper& sleeper = sleepers_[transfer.index(position)];
    const cumempool_digest* digests = nullptr;
    transfer.about(position, [&] { digests = transfer.dirty().wait(position); });
    const std::size_t count = digests == nullptr ? 0 : sleeper.image->slices().size();
    sleeper.image->set_digests({digests, digests + count});
  }
}

// ---- giving the memory back ---------------------------------------------------------------------

void Offload::detach(Sleeper& sleeper) {
  try {
    sleeper.record->memory.unmap();
    sleeper.stage = Stage::kDetached;
  } catch (Error& error) {
    annotate(error, operation_, sleeper.record.get());
    throw;
  }
}

// What the driver refuses still has its contents, which the way back would use. commit() leaks it.
void Offload::give_back(Record& record) noexcept {
  try {
    driver::check(allocator_.driver().table(), "release", record.memory.release_physical(),
                  record.device, record.bytes);
    report_.row(record).freed_bytes += record.bytes;
    released_.find(record.device)->second += record.bytes;
  } catch (const std::exception& caught) {
    report_.problem(told(caught, operation_, &record));
  }
}

void Offload::account(const Sleeper& sleeper) {
  cumempool_report_row& row = report_.row(*sleeper.record);
  const std::uint64_t kept = total_bytes(sleeper.live);
  row.allocations += 1;
  row.backed_up_bytes += kept;
  row.clean_bytes += sleeper.clean_bytes;
  row.discarded_bytes += sleeper.record->bytes - kept;
}

void Offload::release(Sleeper& sleeper) {
  if (sleeper.stage == Stage::kAwake) detach(sleeper);
  sleeper.stage = Stage::kReleased;
  account(sleeper);
  give_back(*sleeper.record);
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
    release(sleepers_[transfer->index(position)]);
    return true;
  }
  if (!with_discarded) return false;
  for (const std::size_t i : discarded_) {
    if (sleepers_[i].record->device != device || sleepers_[i].stage == Stage::kReleased) continue;
    release(sleepers_[i]);
    return true;
  }
  return false;
}

// Discarded memory is detached while copies still run: until something has been released, all of it
// can be mapped again as it was, without asking the device for memory.
void Offload::finish() {
  for (const std::size_t i : discarded_) {
    if (sleepers_[i].stage == Stage::kAwake) detach(sleepers_[i]);
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
    for (Sleeper& sleeper : sleepers_) {
      Contents& contents = sleeper.record->contents;
      if (sleeper.image != nullptr) {
        contents.back_up(sleeper.image, sleeper.choice);
      } else {
        dropped_.push_back(contents.discard());
      }
    }
    for (const RecordPointer& record : forgotten_) {
      cumempool_report_row& row = report_.row(*record);
      row.allocations += 1;
      row.discarded_bytes += record->contents.image()->bytes();
      dropped_.push_back(record->contents.discard());
    }
  });
  dropped_.clear();  // outside of the lock: files, peers
  for (Sleeper& sleeper : sleepers_) {
    if (sleeper.stage != Stage::kReleased) release(sleeper);
    sleeper.record->memory.leak();
  }
}

// ---- the way back -------------------------------------------------------------------------------

void Offload::undo(Error& failure) noexcept {
  transfers_.settle(failure);
  orders_.clear();
  for (std::size_t i = sleepers_.size(); i-- > 0;) {
    if (sleepers_[i].stage != Stage::kAwake) reattach(sleepers_[i], failure);
  }
  forget_overwritten();
}

void Offload::reattach(Sleeper& sleeper, Error& failure) noexcept {
  Record& record = *sleeper.record;
  const bool had_contents = record.memory.holds_physical();
  if (had_contents && record.contents.asleep()) return;  // detached, as before
  try {
    if (!had_contents && sleeper.image == nullptr) {
      throw Error(CUMEMPOOL_DRIVER_ERROR, "its contents had been discarded already");
    }
    record.memory.map();
    allocator_.follow_use(record, allocator_.devices_in_use());
    if (had_contents) return;
    const driver::ContextScope scope(allocator_.driver(), record.device);
    backup::Transfer& streams = transfers_.find(record.device)->streams();
    sleeper.image->restore(streams, record.address);
    streams.staged.finish();
    streams.queue.drain();
    allocator_.records().update([&] { record.generation += 1; });
  } catch (const std::exception& caught) {
    keep_asleep(sleeper, failure, told(caught, operation_, &record));
  }
}

// Nothing is lost: the image has the contents, or the handle that is still held.
void Offload::keep_asleep(Sleeper& sleeper, Error& failure, std::string&& why) noexcept {
  Record& record = *sleeper.record;
  add_secondary(failure, std::move(why), "stays asleep: ");
  DeviceTransfer* transfer = transfers_.find(record.device);
  if (transfer != nullptr) transfer->device().unsettle();
  const bool detached = sleeper.image == nullptr && record.memory.holds_physical();
  if (sleeper.image != nullptr && record.memory.holds_physical()) {
    try {
      const driver::ContextScope scope(allocator_.driver(), record.device);
      if (transfer != nullptr) transfer->settle();
      allocator_.driver().fence(record.memory.access());  // copies into it may still run
      record.memory.vacate();
    } catch (const std::exception&) {
      add_secondary(failure, {}, "its device memory could not be given back");
      record.memory.leak();
      allocator_.leak(sleeper.image, record.device);
    }
  }
  std::shared_ptr<backup::Backup> dropped;  // outside of the records' lock
  allocator_.records().update([&] {
    if (sleeper.image == nullptr) {
      dropped = detached ? record.contents.detach() : record.contents.discard();
    } else {
      record.contents.back_up(sleeper.image, sleeper.choice);
      dropped.swap(sleeper.image);
    }
  });
}

// Retained images that were being overwritten say nothing any more. Those that copies may still be
// writing to must stay where they are (R5).
void Offload::forget_overwritten() noexcept {
  for (Sleeper& sleeper : sleepers_) {
    const DeviceTransfer* transfer = transfers_.find(sleeper.record->device);
    if (sleeper.image == nullptr || transfer == nullptr) continue;
    if (transfer->stuck()) allocator_.leak(sleeper.image, sleeper.record->device);
    if (sleeper.fresh) continue;
    std::shared_ptr<backup::Backup> dropped;
    allocator_.records().update([&] { dropped = sleeper.record->contents.drop_retained(); });
  }
}

}  // namespace cumempool::pool
