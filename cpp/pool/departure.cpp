// Allocations on their way to sleep.
#include "pool/departure.hpp"

#include <algorithm>
#include <exception>
#include <numeric>
#include <string>
#include <utility>

#include "pool/host_plan.hpp"
#include "pool/places.hpp"

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

Departure::Departure(Allocator& allocator, const char* operation, const SleepRequest& request,
                     Report& report)
    : allocator_(allocator),
      operation_(operation),
      request_(request),
      dead_(request.dead, request.dead_as_of),
      report_(report),
      lanes_(allocator, Direction::kOut, report),
      comparison_(allocator, operation, report) {}

// ---- what is to be done -------------------------------------------------------------------------

void Departure::admit() {
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

bool Departure::wants(const Record& record) const {
  const auto action = request_.actions.find(record.tag);
  if (action == request_.actions.end() || record.freed) return false;
  return !record.asleep || forgettable(record) || releasable(record);
}

bool Departure::discards(const Record& record) const {
  return request_.actions.at(record.tag) == CUMEMPOOL_ON_SLEEP_DISCARD && !record.preserved;
}

// Asleep, and its backup is to go.
bool Departure::forgettable(const Record& record) const {
  return record.asleep && request_.drop_backups && discards(record) && record.image != nullptr;
}

// Of memory that was not taken back: nothing is lost with it, whatever becomes of the transition.
bool Departure::spare(const Record& record) { return !record.intact || record.image != nullptr; }

// Asleep, but its memory was not taken back: tried again, unless only that memory has its contents.
bool Departure::releasable(const Record& record) const {
  return record.asleep && record.unreleased &&
         (spare(record) || discards(record) || dead_.live_extents(record).empty());
}

void Departure::plan(const std::vector<RecordPointer>& claimed) {
  for (const RecordPointer& record : claimed) {
    if (!record->asleep) refuse_to_sleep(allocator_, operation_, *record);
  }
  for (const RecordPointer& record : claimed) {
    if (record->asleep) {
      if (forgettable(*record)) forgotten_.push_back(record);
      if (releasable(*record)) unreleased_.push_back(record);
      continue;
    }
    Sleeper sleeper;
    sleeper.record = record;
    if (!discards(*record)) sleeper.live = dead_.live_extents(*record);
    sleepers_.push_back(std::move(sleeper));
  }
  // Made now: past the point of no return, and on the way back, nothing may need memory.
  for (const RecordPointer& record : claimed) {
    report_.row(*record);
    released_.emplace(record->device, 0);
  }
  report_.problems.reserve(report_.problems.size() + 2 * claimed.size());
  dropped_.reserve(forgotten_.size());
  choose_images();
  for (std::size_t i = 0; i < sleepers_.size(); ++i) {
    if (sleepers_[i].image == nullptr) {
      discarded_.push_back(i);
    } else {
      lanes_.add(*sleepers_[i].record, i);
    }
  }
}

void Departure::choose_images() {
  for (Sleeper& sleeper : sleepers_) {
    if (sleeper.live.empty()) continue;
    sleeper.choice = allocator_.tags().backup(*sleeper.record->tag);
    if (reusable(allocator_, *sleeper.record, sleeper.choice, sleeper.live)) {
      sleeper.fresh = false;
      sleeper.choice = sleeper.record->image_choice;
      sleeper.image = sleeper.record->image;
      continue;
    }
    // What it has retained is no use any more, and its room is: it is awake and loses nothing.
    std::shared_ptr<backup::Backup> dropped;
    allocator_.records().update([&] { dropped.swap(sleeper.record->image); });
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

void Departure::plan_room() {
  std::vector<HostNeed> needs;
  for (Sleeper& sleeper : sleepers_) {
    if (sleeper.live.empty() || !sleeper.fresh) continue;
    needs.push_back(
        {sleeper.record->tag, sleeper.record->device, total_bytes(sleeper.live), &sleeper.choice});
  }
  plan_host_memory(allocator_, operation_, needs, Retained::kMayGo);
}

std::uint64_t Departure::bytes_on(int device) const {
  std::uint64_t bytes = 0;
  for (const Sleeper& sleeper : sleepers_) {
    if (sleeper.record->device == device) bytes += sleeper.record->bytes;
  }
  for (const RecordPointer& record : unreleased_) {
    if (record->device == device && spare(*record)) bytes += record->bytes;
  }
  return bytes;
}

std::uint64_t Departure::released_on(int device) const {
  const auto found = released_.find(device);
  return found == released_.end() ? 0 : found->second;
}

void Departure::fence() {
  std::set<int> devices;
  const auto add = [&](const Record& record) {
    devices.insert(record.memory.access().begin(), record.memory.access().end());
  };
  for (const Sleeper& sleeper : sleepers_) add(*sleeper.record);
  for (const RecordPointer& record : unreleased_) add(*record);
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
void Departure::make_room(std::map<backup::HostArena*, std::size_t>& needed) {
  for (const auto& [arena, bytes] : needed) {
    try {
      orders_.push_back(std::make_unique<backup::ArenaOrder>(*arena, bytes));
    } catch (const Error& error) {
      if (error.status != CUMEMPOOL_OUT_OF_HOST_MEMORY || !allocator_.drop_retained(bytes)) throw;
      orders_.push_back(std::make_unique<backup::ArenaOrder>(*arena, bytes));
    }
  }
}

void Departure::start_copies() {
  std::size_t culprit = 0;
  try {
    std::map<backup::HostArena*, std::size_t> needed;
    for (std::size_t i = 0; i < sleepers_.size(); ++i) {
      const Sleeper& sleeper = sleepers_[i];
      if (sleeper.image == nullptr || !sleeper.fresh) continue;
      culprit = i;
      backup::HostArena* arena = arena_of(allocator_, sleeper.choice, sleeper.record->device);
      if (arena != nullptr) needed[arena] += total_bytes(sleeper.live);
    }
    make_room(needed);
    lanes_.each([this](Lane& lane) {
      std::vector<Comparison::Item> items;
      for (const std::size_t i : lane.items) {
        items.push_back({i, sleepers_[i].record->address, sleepers_[i].image.get()});
      }
      comparison_.start(*lane.device, items);
      lane.front.begin();
    });
    lanes_.each_in_turn([&](Lane& lane, std::size_t index) {
      culprit = index;
      copy(lane, index, culprit);
    });
    lanes_.each([&](Lane& lane) { finish_copies(lane, culprit); });
    orders_.clear();
    keep_digests();
  } catch (Error& error) {
    annotate(error, operation_, sleepers_.empty() ? nullptr : sleepers_[culprit].record.get());
    throw;
  }
}

void Departure::copy(Lane& lane, std::size_t index, std::size_t& culprit) {
  Sleeper& sleeper = sleepers_[index];
  const cumempool_digest* digests = nullptr;
  if (sleeper.fresh) {
    comparison_.pass(*lane.device, index);
  } else {
    digests = comparison_.wait(*lane.device, index);
  }
  try {
    if (digests == nullptr) {
      sleeper.copied.resize(sleeper.image->slices().size());
      std::iota(sleeper.copied.begin(), sleeper.copied.end(), std::size_t{0});
    } else {
      sleeper.copied = sleeper.image->changed(digests);
    }
    lane.copy(index, *sleeper.record, sleeper.choice.tier, [&] {
      std::uint64_t copied = sleeper.image->bytes();
      if (digests == nullptr) {
        sleeper.image->save(lane.transfer, sleeper.record->address);
      } else {
        copied = sleeper.image->save_changes(lane.transfer, sleeper.record->address, digests);
      }
      sleeper.clean_bytes = sleeper.image->bytes() - copied;
    });
    if (!is_staged(sleeper.choice.tier)) recheck(lane, index);
  } catch (const Error&) {
    culprit = lane.transfer.staged.failed_label().value_or(index);
    throw;
  }
}

// Digests what was copied of an allocation once more, behind its copies.
void Departure::recheck(Lane& lane, std::size_t index) {
  Sleeper& sleeper = sleepers_[index];
  comparison_.recheck(*lane.device, {index, sleeper.record->address, sleeper.image.get()},
                      std::move(sleeper.copied), lane.transfer.queue);
}

// What threads write out is copied when they have ended.
void Departure::finish_copies(Lane& lane, std::size_t& culprit) {
  lane.finish_staged(culprit);
  for (const std::size_t index : lane.items) {
    if (is_staged(sleepers_[index].choice.tier)) recheck(lane, index);
  }
  comparison_.flush(*lane.device, lane.transfer.queue);
}

// A digest is that of the bytes that were copied, or it is forgotten.
void Departure::verify(Lane& lane, std::size_t index) {
  const Record& record = *sleepers_[index].record;
  const std::uint64_t bytes = comparison_.verify(*lane.device, index, *sleepers_[index].image);
  if (bytes == 0) return;
  report_.problems.push_back(
      format_bytes(bytes) + " of tag '" + record.tag->name + "' on device " +
      std::to_string(record.device) +
      " changed while they were copied, and the next sleep copies them again: something writes to "
      "memory that goes to sleep");
}

void Departure::keep_digests() {
  lanes_.each([this](Lane& lane) {
    comparison_.complete(*lane.device);
    for (const std::size_t i : lane.items) {
      backup::Backup& image = *sleepers_[i].image;
      const cumempool_digest* digests = comparison_.wait(*lane.device, i);
      const std::size_t count = digests == nullptr ? 0 : image.slices().size();
      image.set_digests({digests, digests + count});
    }
  });
}

// ---- giving the memory back ---------------------------------------------------------------------

void Departure::detach(Sleeper& sleeper) {
  try {
    sleeper.record->memory.unmap();
    sleeper.stage = Stage::kDetached;
  } catch (Error& error) {
    annotate(error, operation_, sleeper.record.get());
    throw;
  }
}

// Memory that the driver will not take back stays with its allocation.
void Departure::give_back(Record& record, cumempool_report_row& row) noexcept {
  try {
    record.memory.unmap();  // no effect, unless a failed wake has left it mapped
    driver::check(allocator_.driver().table(), "release", record.memory.release_physical(),
                  record.device, record.bytes);
    row.freed_bytes += record.bytes;
    released_.find(record.device)->second += record.bytes;
  } catch (const std::exception& caught) {
    report_.problem(told(caught, operation_, &record));
  }
}

void Departure::account(const Sleeper& sleeper) {
  cumempool_report_row& row = report_.row(*sleeper.record);
  const std::uint64_t kept = total_bytes(sleeper.live);
  row.allocations += 1;
  row.backed_up_bytes += kept;
  row.clean_bytes += sleeper.clean_bytes;
  row.discarded_bytes += sleeper.record->bytes - kept;
}

void Departure::release(Sleeper& sleeper) {
  if (sleeper.stage == Stage::kAwake) detach(sleeper);
  sleeper.stage = Stage::kReleased;
  account(sleeper);
  give_back(*sleeper.record, report_.row(*sleeper.record));
}

void Departure::release_left_over(Record& record) {
  give_back(record, report_.row(record));
  allocator_.records().update([&] {
    record.unreleased = record.memory.holds_physical();
    record.intact = false;
  });
}

bool Departure::release_next(int device, bool with_discarded) {
  const auto left_over = std::find_if(
      unreleased_.begin(), unreleased_.end(),
      [device](const RecordPointer& record) { return record->device == device && spare(*record); });
  if (left_over != unreleased_.end()) {
    const RecordPointer record = *left_over;
    unreleased_.erase(left_over);
    release_left_over(*record);
    return true;
  }
  Lane* lane = lanes_.find(device);
  if (lane != nullptr && !lane->front.empty()) {
    std::size_t index = lane->front.oldest();
    try {
      const driver::ContextScope scope(allocator_.driver(), device);
      index = lane->front.pop();
      verify(*lane, index);
    } catch (Error& error) {
      annotate(error, operation_, sleepers_[index].record.get());
      throw;
    }
    release(sleepers_[index]);
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
void Departure::finish() {
  for (const std::size_t i : discarded_) {
    if (sleepers_[i].stage == Stage::kAwake) detach(sleepers_[i]);
  }
  for (bool any = true; any;) {
    any = false;
    for (const auto& lane : lanes_.all()) {
      any = release_next(lane->device->ordinal(), false) || any;
    }
  }
  lanes_.each([this](Lane& lane) { comparison_.finish_rechecks(*lane.device); });
}

void Departure::commit() noexcept {
  allocator_.records().update([&] {
    for (Sleeper& sleeper : sleepers_) {
      Record& record = *sleeper.record;
      record.asleep = true;
      record.intact = false;
      record.unreleased = record.memory.holds_physical();
      record.image.swap(sleeper.image);
      record.image_choice = std::move(sleeper.choice);
    }
    for (const RecordPointer& record : forgotten_) {
      cumempool_report_row& row = report_.row(*record);
      row.allocations += 1;
      row.discarded_bytes += record->image->bytes();
      dropped_.push_back(std::move(record->image));
    }
  });
  dropped_.clear();  // outside of the lock: files, peers
  for (const std::size_t i : discarded_) {
    if (sleepers_[i].stage != Stage::kReleased) release(sleepers_[i]);
  }
  for (const RecordPointer& record : unreleased_) release_left_over(*record);
  allocator_.records().update([this] {
    for (const std::size_t i : discarded_) {
      sleepers_[i].record->unreleased = sleepers_[i].record->memory.holds_physical();
    }
  });
}

// ---- the way back -------------------------------------------------------------------------------

void Departure::undo(Error& failure) noexcept {
  lanes_.settle(&failure);
  orders_.clear();
  for (const auto& lane : lanes_.all()) {
    try {
      const driver::ContextScope scope(allocator_.driver(), lane->device->ordinal());
      comparison_.finish(*lane->device);
      comparison_.finish_rechecks(*lane->device);
    } catch (const std::exception& caught) {
      lane->stuck = true;
      add_secondary(failure, told(caught, operation_, nullptr));
    }
  }
  for (std::size_t i = sleepers_.size(); i-- > 0;) {
    if (sleepers_[i].stage != Stage::kAwake) reattach(sleepers_[i], failure);
  }
  forget_overwritten();
}

void Departure::reattach(Sleeper& sleeper, Error& failure) noexcept {
  Record& record = *sleeper.record;
  const bool had_contents = record.memory.holds_physical();
  try {
    if (!had_contents && sleeper.image == nullptr) {
      throw Error(CUMEMPOOL_DRIVER_ERROR, "its contents had been discarded already");
    }
    record.memory.map();
    allocator_.follow_use(record, allocator_.devices_in_use());
    if (had_contents) return;
    const driver::ContextScope scope(allocator_.driver(), record.device);
    backup::Transfer& transfer = lanes_.find(record.device)->transfer;
    sleeper.image->restore(transfer, record.address);
    transfer.staged.finish();
    transfer.queue.drain();
    allocator_.records().update([&] { record.generation += 1; });
  } catch (const std::exception& caught) {
    keep_asleep(sleeper, failure, told(caught, operation_, &record));
  }
}

// Nothing is lost: the image has the contents, or the handle that is still held.
void Departure::keep_asleep(Sleeper& sleeper, Error& failure, std::string&& why) noexcept {
  Record& record = *sleeper.record;
  add_secondary(failure, std::move(why), "stays asleep: ");
  const bool intact = sleeper.stage == Stage::kDetached;
  Lane* lane = lanes_.find(record.device);
  if (lane != nullptr) lane->device->unsettle();
  if (!intact && record.memory.holds_physical()) {
    try {
      const driver::ContextScope scope(allocator_.driver(), record.device);
      if (lane != nullptr) lane->device->settle();
      allocator_.driver().fence(record.memory.access());  // copies into it may still run
      record.memory.unmap();
      record.memory.release_physical();
    } catch (const std::exception&) {
      // It stays held, is counted as unreleased, and the next wake copies into it again.
      add_secondary(failure, {}, "its device memory could not be given back");
      if (sleeper.image != nullptr) allocator_.strand(sleeper.image, sleeper.record->device);
    }
  }
  allocator_.records().update([&] {
    record.asleep = true;
    record.unreleased = record.memory.holds_physical();
    record.intact = intact && record.memory.holds_physical();
    record.image = std::move(sleeper.image);
    record.image_choice = std::move(sleeper.choice);
  });
}

// Retained images that were being overwritten say nothing any more. Those that copies may still be
// writing to must stay where they are (R5).
void Departure::forget_overwritten() noexcept {
  for (Sleeper& sleeper : sleepers_) {
    Lane* lane = lanes_.find(sleeper.record->device);
    if (sleeper.image == nullptr || lane == nullptr) continue;
    if (lane->stuck) allocator_.strand(sleeper.image, sleeper.record->device);
    if (sleeper.fresh) continue;
    std::shared_ptr<backup::Backup> dropped;
    allocator_.records().update([&] {
      if (!sleeper.record->asleep) dropped.swap(sleeper.record->image);
    });
  }
}

}  // namespace cumempool::pool
