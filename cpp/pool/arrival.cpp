// Allocations on their way back.
#include "pool/arrival.hpp"

#include <algorithm>
#include <exception>
#include <set>
#include <utility>

namespace cumempool::pool {

Arrival::Arrival(Allocator& allocator, const char* operation, Report& report, Queued queued,
                 std::function<void()> withdraw)
    : allocator_(allocator),
      operation_(operation),
      report_(report),
      queued_(std::move(queued)),
      withdraw_(std::move(withdraw)),
      lanes_(allocator, Direction::kIn, report) {}

void Arrival::plan(std::vector<RecordPointer> claimed) {
  records_ = std::move(claimed);
  held_before_.resize(records_.size());
  dropped_.resize(records_.size());  // commit() takes no memory
  attached_.reserve(records_.size());
  for (std::size_t i = 0; i < records_.size(); ++i) {
    const Record& record = *records_[i];
    report_.row(record);
    zero_[record.tag] = allocator_.tags().policy(*record.tag).on_wake == CUMEMPOOL_ON_WAKE_ZERO;
    held_before_[i] = record.memory.holds_physical();
    lanes_.add(record, i);
  }
  busy_.reserve(lanes_.all().size());
}

std::vector<int> Arrival::devices() {
  std::vector<int> devices;
  for (const auto& lane : lanes_.all()) devices.push_back(lane->device->ordinal());
  return devices;
}

std::uint64_t Arrival::bytes_on(int device) const {
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < records_.size(); ++i) {
    if (records_[i]->device == device && !held_before_[i]) bytes += records_[i]->bytes;
  }
  return bytes;
}

bool Arrival::done(int device) {
  const Lane* lane = lanes_.find(device);
  return lane == nullptr || lane->next == lane->items.size();
}

std::uint64_t Arrival::next_bytes(int device) {
  const Lane* lane = lanes_.find(device);
  const std::size_t index = lane->items[lane->next];
  return held_before_[index] ? 0 : records_[index]->bytes;
}

// ---- forward ------------------------------------------------------------------------------------

void Arrival::bring_next(int device) {
  Lane* lane = lanes_.find(device);
  const driver::ContextScope scope(allocator_.driver(), device);
  bring(*lane, lane->items[lane->next]);
  ++lane->next;
  lane->front.poll();
}

void Arrival::bring_all() {
  lanes_.each([](Lane& lane) { lane.front.begin(); });
  lanes_.each_in_turn([this](Lane& lane, std::size_t index) { bring(lane, index); });
}

void Arrival::bring(Lane& lane, std::size_t index) {
  Record& record = *records_[index];
  attach(index);
  std::size_t culprit = index;
  try {
    const cumempool_backup_tier tier =
        record.image && !record.intact ? record.image->tier() : CUMEMPOOL_BACKUP_PINNED;
    lane.copy(index, record, tier, [&] { load(lane, record); });
    if (queued_) {
      lane.transfer.staged.when_queued(
          [this, &lane, &record] { queued_(record, lane.transfer.queue); });
    }
  } catch (Error& error) {
    culprit = lane.transfer.staged.failed_label().value_or(culprit);
    annotate(error, operation_, records_[culprit].get());
    throw;
  }
  cumempool_report_row& row = report_.row(record);
  row.allocations += 1;
  if (!held_before_[index]) row.mapped_bytes += record.bytes;
}

void Arrival::attach(std::size_t index) {
  attached_.push_back(index);
  try {
    allocator_.with_freed_memory([&] { records_[index]->memory.map(); });
    allocator_.follow_use(*records_[index], allocator_.devices_in_use());
  } catch (Error& error) {
    explain(error, index);
    throw;
  }
}

// Says how much the whole wake needs, which the failing allocation alone does not tell.
void Arrival::explain(Error& error, std::size_t failed) const {
  const int device = records_[failed]->device;
  annotate(error, operation_, records_[failed].get());
  if (error.status != CUMEMPOOL_OUT_OF_MEMORY) return;
  std::uint64_t taken = 0;
  for (const std::size_t i : attached_) {
    if (records_[i]->device == device && i != failed) taken += records_[i]->bytes;
  }
  error.problem = "the wake needs " + format_bytes(bytes_on(device)) +
                  " on the device and had taken " + format_bytes(taken) + ", which it gave back";
  error.advice =
      "free device memory (torch.cuda.empty_cache(), other tags, other processes) and wake again; "
      "everything is still asleep with its backup";
}

void Arrival::load(Lane& lane, Record& record) {
  if (record.intact) return;  // its contents never left
  cumempool_report_row& row = report_.row(record);
  if (record.image != nullptr) {
    record.image->restore(lane.transfer, record.address);
    row.restored_bytes += record.image->bytes();
    if (!zero_.at(record.tag)) return;
    row.zeroed_bytes += record.image->zero_rest(lane.transfer.queue, record.address, record.bytes);
  } else if (zero_.at(record.tag)) {
    lane.transfer.queue.fill_zero(record.address, record.bytes);
    row.zeroed_bytes += record.bytes;
  }
}

void Arrival::finish() {
  lanes_.each([this](Lane& lane) {
    std::size_t culprit = lane.items.back();
    try {
      lane.finish_staged(culprit);
    } catch (Error& error) {
      annotate(error, operation_, records_[culprit].get());
      throw;
    }
  });
  for (const auto& lane : lanes_.all()) {
    const driver::ContextScope scope(allocator_.driver(), lane->device->ordinal());
    while (!lane->front.empty()) {
      const std::size_t index = lane->front.oldest();
      try {
        lane->front.pop();
      } catch (Error& error) {
        annotate(error, operation_, records_[index].get());
        throw;
      }
    }
    lane->transfer.queue.drain();
  }
}

void Arrival::commit() {
  auto drop = dropped_.begin();
  allocator_.records().update([&] {
    for (const RecordPointer& record : records_) {
      record->asleep = false;
      record->unreleased = record->intact = false;
      record->generation += 1;
      const auto& image = record->image;
      const bool comparable =
          image != nullptr && !image->digests().empty() && !image->lent_for_writing();
      if (!comparable) (drop++)->swap(record->image);
    }
  });
  dropped_.clear();  // within the turn: who closes next counts on it
}

// ---- back ---------------------------------------------------------------------------------------

std::vector<int> Arrival::users_of(int device) const {
  std::set<int> users{device};
  for (const std::size_t index : attached_) {
    const Record& record = *records_[index];
    if (record.device != device) continue;
    users.insert(record.memory.access().begin(), record.memory.access().end());
  }
  return {users.begin(), users.end()};
}

// Copies were waited for, unless that failed as well: then they may still write to what is mapped.
// Memory that was handed out is in use by whatever its program has submitted since.
void Arrival::fence_all() {
  for (const auto& lane : lanes_.all()) {
    if (!lane->stuck && !queued_) continue;
    const int device = lane->device->ordinal();
    try {
      const driver::ContextScope scope(allocator_.driver(), device);
      lane->device->settle();
      allocator_.driver().fence(users_of(device));
    } catch (const std::exception&) {
      busy_.push_back(device);  // has room for every lane
    }
  }
}

void Arrival::undo(Error& failure) {
  if (withdraw_) withdraw_();
  lanes_.settle(&failure);
  fence_all();
  for (std::size_t n = attached_.size(); n-- > 0;) {
    Record& record = *records_[attached_[n]];
    try {
      if (std::count(busy_.begin(), busy_.end(), record.device) == 0) {
        record.memory.unmap();
        if (!held_before_[attached_[n]]) {
          driver::check(allocator_.driver().table(), "release", record.memory.release_physical(),
                        record.device, record.bytes);
        }
      } else if (record.image != nullptr) {
        allocator_.strand(record.image, record.device);
      }
    } catch (const std::exception& caught) {
      add_secondary(failure, told(caught, operation_, &record));
    }
    allocator_.records().update([&] { record.unreleased = record.memory.holds_physical(); });
  }
}

}  // namespace cumempool::pool
