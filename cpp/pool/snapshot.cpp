// A consistent picture of an allocator: totals, tags, and single allocations where asked.
#include "pool/snapshot.hpp"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "pool/registry.hpp"

namespace cumempool::pool {

cumempool_allocation_info describe(const Record& record) {
  cumempool_allocation_info info{};
  info.size = sizeof info;
  info.address = record.address;
  info.bytes = record.bytes;
  info.requested_bytes = record.requested_bytes;
  info.tag = record.tag->name.c_str();
  info.device = record.device;
  info.state = CUMEMPOOL_AWAKE;
  if (record.asleep) {
    info.state = record.image ? CUMEMPOOL_ASLEEP_BACKED_UP : CUMEMPOOL_ASLEEP_DISCARDED;
  }
  info.generation = record.generation;
  if (record.image != nullptr) {
    info.backup_bytes = record.image->bytes();
    info.backup_tier = record.image->tier();
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
  (record.asleep ? stats.backup_bytes : stats.retained_bytes) += info.backup_bytes;
  if (record.unreleased) stats.unreleased_bytes += info.bytes;
  if (record.preserved) stats.preserved_bytes += info.bytes;
}

class Collector {
 public:
  Collector(Allocator& allocator, bool allocations)
      : allocator_(allocator), allocations_(allocations) {
    for (const auto& device : allocator.devices().used()) {
      kinds_[device->ordinal()] = device->kind().properties;
    }
  }

  Snapshot collect() {
    allocator_.records().for_each([this](Record& record) { visit(record); }, [this] { held(); });
    for (const Tag* tag : allocator_.tags().all()) {
      const auto first = rows_.lower_bound({tag->name, -1});
      if (first == rows_.end() || first->first.first != tag->name) row(*tag, nullptr);
    }
    for (auto& [key, stats] : rows_) snapshot_.tags.push_back(stats);
    total();
    snapshot_.last_malloc_failure = allocator_.last_malloc_failure();
    return std::move(snapshot_);
  }

 private:
  void visit(const Record& record) {
    if (record.freed) {
      snapshot_.totals.pending_free_bytes += record.bytes;
      return;
    }
    const cumempool_allocation_info info = describe(record);
    count(info, record, row(*record.tag, &record));
    if (allocations_) snapshot_.allocations.push_back(info);
  }

  // Where the driver chooses them, those that virtual memory of the device would have.
  const cumempool_memory_properties& properties_of(const Record& record) {
    const cumempool_memory_properties* own = record.memory.properties();
    return own != nullptr ? *own : kinds_[record.device];
  }

  // Of a tag on the device of a record; null: of a tag without any.
  cumempool_tag_stats& row(const Tag& tag, const Record* record) {
    const int device = record == nullptr ? -1 : record->device;
    const auto [at, made] = rows_.try_emplace({tag.name, device});
    cumempool_tag_stats& stats = at->second;
    if (!made) return stats;
    stats.size = sizeof stats;
    const TagPolicy policy = allocator_.tags().policy(tag);
    stats.tag = tag.name.c_str();
    stats.device = device;
    stats.on_sleep = policy.on_sleep;
    stats.on_wake = policy.on_wake;
    stats.backup_tier = allocator_.tags().backup(tag).tier;
    stats.backing = allocator_.tags().memory(tag).backing;
    stats.pins = allocator_.tags().pin_count(tag);
    if (record != nullptr) {
      const auto& properties = properties_of(*record);
      stats.handle_types = properties.handle_types;
      stats.rdma = properties.rdma;
    }
    return stats;
  }

  // Under the records' lock: later, the memory of records that were counted may have gone back.
  void held() {
    cumempool_totals& totals = snapshot_.totals;
    totals.size = sizeof totals;
    totals.reserved_address_bytes = allocator_.memory_stats().reserved_bytes;
    totals.physical_bytes = allocator_.memory_stats().physical_bytes;
    // What has just been taken may not be in the peak yet.
    totals.peak_physical_bytes =
        std::max(totals.physical_bytes, allocator_.memory_stats().peak_physical_bytes.load());
    totals.mapped_bytes = allocator_.memory_stats().mapped_bytes;
  }

  void total() {
    cumempool_totals& totals = snapshot_.totals;
    Counters& counters = allocator_.counters();
    totals.pending_free_bytes += allocator_.pending_free_bytes();
    const backup::Stores& stores = allocator_.stores();
    totals.host_bytes = stores.pinned_bytes();
    totals.host_used_bytes = stores.pinned_used_bytes();
    totals.pageable_bytes = stores.pageable_bytes();
    totals.file_bytes = stores.file_bytes();
    totals.peer_bytes = stores.peers().held_bytes();
    for (const auto& device : allocator_.devices().used()) {
      totals.staging_bytes += device->staging_bytes();
    }
    totals.malloc_calls = counters.malloc_calls;
    totals.malloc_failures = counters.malloc_failures;
    totals.free_calls = counters.free_calls;
    totals.sleeps = counters.sleeps;
    totals.wakes = counters.wakes;
    totals.swaps = counters.swaps;
    totals.failed_transitions = counters.failed_transitions;
  }

  Allocator& allocator_;
  bool allocations_;
  std::map<int, cumempool_memory_properties> kinds_;
  std::map<std::pair<std::string, int>, cumempool_tag_stats> rows_;
  Snapshot snapshot_;
};

}  // namespace

Snapshot take_snapshot(Allocator& allocator, bool allocations) {
  return Collector(allocator, allocations).collect();
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

}  // namespace cumempool::pool
