// Read access to an allocator: statistics, backups, handles.
#include "pool/access.hpp"

#include <algorithm>
#include <exception>
#include <map>
#include <optional>
#include <utility>

#include "pool/records.hpp"

namespace cumempool::pool {

// ---- statistics ---------------------------------------------------------------------------------

namespace {

cumempool_state public_state(State state) noexcept {
  if (state == State::kAwake) return CUMEMPOOL_AWAKE;
  return state == State::kBackedUp ? CUMEMPOOL_ASLEEP_BACKED_UP : CUMEMPOOL_ASLEEP_DISCARDED;
}

}  // namespace

cumempool_allocation_info describe(const Record& record) {
  cumempool_allocation_info info{};
  info.size = sizeof info;
  info.address = record.address;
  info.bytes = record.bytes;
  info.requested_bytes = record.requested_bytes;
  info.tag = record.tag->name.c_str();
  info.device = record.device;
  info.state = public_state(record.contents.state());
  info.generation = record.generation;
  if (const auto& backup = record.contents.backup()) {
    info.backup_bytes = backup->bytes();
    info.backup_tier = backup->tier();
  }
  info.sequence = record.sequence;
  info.preserved = record.preserved ? 1 : 0;
  info.backing = record.memory.kind();
  return info;
}

namespace {

void count(const cumempool_allocation_info& info, const Record& record,
           cumempool_tag_stats& stats) {
  switch (info.state) {
    case CUMEMPOOL_AWAKE:
      stats.awake_allocations += 1;
      stats.awake_bytes += info.bytes;
      break;
    case CUMEMPOOL_ASLEEP_BACKED_UP:
      stats.backed_up_allocations += 1;
      stats.backed_up_bytes += info.bytes;
      break;
    case CUMEMPOOL_ASLEEP_DISCARDED:
      stats.discarded_allocations += 1;
      stats.discarded_bytes += info.bytes;
      break;
  }
  (record.contents.asleep() ? stats.backup_bytes : stats.retained_bytes) += info.backup_bytes;
  if (record.contents.state() == State::kDetached) stats.unreleased_bytes += info.bytes;
  if (record.preserved) stats.preserved_bytes += info.bytes;
}

using Properties = std::map<int, cumempool_memory_properties>;            // by device
using Rows = std::map<std::pair<std::string, int>, cumempool_tag_stats>;  // by tag and device

Properties properties_by_device(Allocator& allocator) {
  Properties properties;
  for (const auto& device : allocator.devices().used()) {
    properties[device->ordinal()] = device->kind().properties;
  }
  return properties;
}

// Returns the row of a tag on a device; makes it at first use.
cumempool_tag_stats& row_of(Allocator& allocator, Rows& rows, const Tag& tag, int device) {
  const auto [at, made] = rows.try_emplace({tag.name, device});
  cumempool_tag_stats& stats = at->second;
  if (!made) return stats;
  const TagTable& tags = allocator.tags();
  stats.size = sizeof stats;
  stats.tag = tag.name.c_str();
  stats.device = device;
  stats.on_sleep = tags.on_sleep(tag);
  stats.on_wake = tags.on_wake(tag);
  stats.backup_tier = tags.backup(tag).tier;
  stats.backing = tags.memory(tag).backing;
  stats.pins = tags.pin_count(tag);
  return stats;
}

// Reads the counters of device memory under the records' lock: later, the memory of counted records
// may be released.
void read_memory_stats(Allocator& allocator, cumempool_totals& totals) {
  const vmm::MemoryStats& stats = allocator.memory_stats();
  totals.size = sizeof totals;
  totals.reserved_address_bytes = stats.reserved_bytes;
  totals.physical_bytes = stats.physical_bytes;
  // The peak may not include the latest allocation yet.
  totals.peak_physical_bytes = std::max(totals.physical_bytes, stats.peak_physical_bytes.load());
  totals.mapped_bytes = stats.mapped_bytes;
  totals.leaked_bytes = stats.leaked_bytes + allocator.stores().peers().leaked_bytes();
}

void read_counters(Allocator& allocator, cumempool_totals& totals) {
  const backup::Stores& stores = allocator.stores();
  totals.pending_free_bytes += allocator.pending_free_bytes();
  totals.host_bytes = stores.pinned_bytes();
  totals.host_used_bytes = stores.pinned_used_bytes();
  totals.pageable_bytes = stores.pageable_bytes();
  totals.file_bytes = stores.file_bytes();
  totals.peer_bytes = stores.peers().held_bytes();
  for (const auto& device : allocator.devices().used()) {
    totals.staging_bytes += device->buffer_bytes();
  }
  const Counters& counters = allocator.counters();
  totals.malloc_calls = counters.malloc_calls;
  totals.malloc_failures = counters.malloc_failures;
  totals.free_calls = counters.free_calls;
  totals.sleeps = counters.sleeps;
  totals.wakes = counters.wakes;
  totals.swaps = counters.swaps;
  totals.failed_transitions = counters.failed_transitions;
}

}  // namespace

Snapshot take_snapshot(Allocator& allocator, bool allocations) {
  Snapshot snapshot;
  Rows rows;
  Properties properties = properties_by_device(allocator);
  const auto visit = [&](const Record& record) {
    if (record.freed) {
      snapshot.totals.pending_free_bytes += record.bytes;
      return;
    }
    const cumempool_allocation_info info = describe(record);
    cumempool_tag_stats& row = row_of(allocator, rows, *record.tag, record.device);
    // Memory of cudaMalloc has no properties; its row shows those of virtual memory of the device.
    const cumempool_memory_properties* own = record.memory.properties();
    const auto& known = own != nullptr ? *own : properties[record.device];
    row.handle_types = known.handle_types;
    row.rdma = known.rdma;
    count(info, record, row);
    if (allocations) snapshot.allocations.push_back(info);
  };
  allocator.records().for_each(visit, [&] { read_memory_stats(allocator, snapshot.totals); });
  for (const Tag* tag : allocator.tags().all()) {
    const auto first = rows.lower_bound({tag->name, -1});
    if (first == rows.end() || first->first.first != tag->name) row_of(allocator, rows, *tag, -1);
  }
  for (const auto& entry : rows) snapshot.tags.push_back(entry.second);
  read_counters(allocator, snapshot.totals);
  snapshot.last_malloc_failure = allocator.last_malloc_failure();
  return snapshot;
}

cumempool_allocation_info find_allocation(const Allocator* allocator, cumempool_address address) {
  const RecordPointer record = Registry::instance().find(address);
  const bool others = record != nullptr && allocator != nullptr && record->owner.get() != allocator;
  std::optional<cumempool_allocation_info> info;
  if (record != nullptr && !others) {
    record->owner->records().update([&] {
      if (!record->freed) info = describe(*record);  // else it is being torn down
    });
  }
  if (info) return *info;
  Error error(CUMEMPOOL_NOT_OWNED, others ? "the address belongs to another allocator"
                                          : "the address lies in no allocation of cumempool");
  error.operation = "find";
  error.advice = "pass a tensor allocated inside use_memory_pool() or by empty() or adopt()";
  throw error;
}

// ---- backups ------------------------------------------------------------------------------------

namespace {

Error refusal(cumempool_status status, const char* why, const Record* record, const char* advice) {
  Error error(status, why);
  error.advice = advice;
  annotate(error, "read_backup", record);
  return error;
}

}  // namespace

BackupView::BackupView(std::shared_ptr<Allocator> allocator, cumempool_address address,
                       std::size_t bytes, bool writable)
    : allocator_(std::move(allocator)) {
  const TransitionLock::Turn turn = allocator_->transition_lock().enter("read_backup");
  if (bytes == 0) {
    throw refusal(CUMEMPOOL_INVALID_ARGUMENT, "a view needs at least one byte", nullptr,
                  "ask for the bytes that you read");
  }
  const RecordPointer record = Registry::instance().find(address);
  bool lives = false;
  bool asleep = false;
  if (record != nullptr && record->owner == allocator_) {
    allocator_->records().update([&] {
      if (record->freed) return;  // a teardown may be changing its contents
      lives = true;
      asleep = record->contents.asleep();
      if (asleep) backup_ = record->contents.backup();
    });
  }
  if (!lives) {
    throw refusal(CUMEMPOOL_NOT_OWNED, "the address lies in no allocation of the allocator",
                  nullptr, "pass a tensor of the allocator's pools");
  }
  if (backup_ == nullptr) {
    throw refusal(CUMEMPOOL_INVALID_ARGUMENT,
                  asleep ? "its contents were discarded" : "the memory is awake", record.get(),
                  "read backups of tags that sleep with a backup");
  }
  {
    const driver::ContextScope scope(allocator_->driver(), record->device);
    data_ = backup_->view(address - record->address, bytes, writable);
    if (backup_.use_count() == 2) backup_->settle_views();  // the record and this view
  }
  if (data_ == nullptr && backup_->tier() == CUMEMPOOL_BACKUP_PEER) {
    throw refusal(CUMEMPOOL_UNSUPPORTED, "the backup is in the memory of another device",
                  record.get(), "wake it, or use another tier");
  }
  if (data_ == nullptr) {
    throw refusal(CUMEMPOOL_INVALID_ARGUMENT, "the backup does not hold all of the bytes",
                  record.get(), "read live bytes of one allocation");
  }
  allocator_->counters().open_views += 1;
}

BackupView::~BackupView() {
  const bool was_open = data_ != nullptr;
  data_.reset();
  backup_.reset();
  if (was_open) allocator_->counters().open_views -= 1;
}

// ---- handles ------------------------------------------------------------------------------------

namespace {

Error refusal(cumempool_status status, const char* why, const char* advice) {
  Error error(status, why);
  error.advice = advice;
  return error;
}

void refuse(Allocator& allocator, const Record& record, std::uint32_t handle_type) {
  if (!record.memory.can_export()) {
    throw refusal(CUMEMPOOL_UNSUPPORTED, "memory of cudaMalloc has no handle to export",
                  "share it with torch's own means, or give the tag backing='vmm'");
  }
  if (record.contents.asleep()) {
    throw refusal(CUMEMPOOL_INVALID_ARGUMENT, "the memory is asleep", "wake its tag first");
  }
  const auto& properties = allocator.devices().at(record.device)->kind().properties;
  if ((properties.handle_types & handle_type) == 0) {
    throw refusal(CUMEMPOOL_UNSUPPORTED, "the memory cannot be exported as that type of handle",
                  "cumempool.probe() says which types the device grants");
  }
}

}  // namespace

cumempool_allocation_info export_memory(Allocator& allocator, cumempool_address address,
                                        std::uint32_t handle_type, void* exported) {
  const TransitionLock::Turn turn = allocator.transition_lock().enter("export");
  const RecordPointer record = Registry::instance().find(address);
  // Claims the record, so that it cannot be freed meanwhile.
  const auto claimed = allocator.records().claim("export", [&](const Record& candidate) {
    return &candidate == record.get() && !candidate.freed;
  });
  if (claimed.empty()) {
    throw refusal(CUMEMPOOL_NOT_OWNED, "the address lies in no allocation of the allocator",
                  "pass a tensor of the allocator's pools");
  }
  try {
    refuse(allocator, *record, handle_type);
    const auto& table = allocator.driver().table();
    driver::check(table, "export_handle",
                  table.export_handle(table.self, record->memory.handle(), handle_type, exported),
                  record->device, record->bytes);
  } catch (Error& error) {
    allocator.unclaim(claimed);
    annotate(error, "export", record.get());
    throw;
  } catch (const std::exception&) {  // no memory for the message
    allocator.unclaim(claimed);
    throw;
  }
  const cumempool_allocation_info info = describe(*record);
  allocator.unclaim(claimed);
  return info;
}

}  // namespace cumempool::pool
