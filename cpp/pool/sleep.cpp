// Puts tags to sleep: contents to the host or discarded, physical memory back to the device.
#include "pool/sleep.hpp"

#include <cstddef>
#include <set>
#include <utility>

#include "pool/dead_ranges.hpp"
#include "pool/transition.hpp"

namespace cumempool::pool {
namespace {

using backup::Extent;

// One record on its way to sleep. `saved` is handed to the record only when all have made it.
struct Sleeper {
  RecordPointer record;
  std::vector<Extent> live;  // empty where it is discarded
  backup::Backup saved;
};

class Sleep {
 public:
  Sleep(Allocator& allocator, const SleepRequest& request)
      : allocator_(allocator),
        request_(request),
        dead_(request.dead),
        transition_(allocator, "sleep") {}

  Report run() {
    const Clock::time_point start = Clock::now();
    transition_.refuse_captures(request_.streams);
    plan();
    wait_for_work_in_flight();
    copy_out();
    detach();
    commit();
    give_back();
    transition_.commit();
    report_.seconds = seconds_since(start);
    return std::move(report_);
  }

 private:
  bool wanted(const Record& record) const {
    const auto action = request_.actions.find(record.tag);
    if (action == request_.actions.end() || record.doomed) return false;
    return !record.asleep || forgettable(record) || releasable(record);
  }

  bool discards(const Record& record) const {
    return request_.actions.at(record.tag) == CUMEMPOOL_ON_SLEEP_DISCARD;
  }

  // Asleep, and its backup is to go.
  bool forgettable(const Record& record) const {
    return request_.drop_backups && discards(record) && record.backup;
  }

  // Asleep, but its memory was not taken back: tried again, unless only that memory has its
  // contents.
  bool releasable(const Record& record) const {
    return record.unreleased && (!record.intact || record.backup || discards(record) ||
                                 dead_.live_extents(record).empty());
  }

  void plan() {
    for (const RecordPointer& record :
         transition_.claim([this](const Record& candidate) { return wanted(candidate); })) {
      if (record->asleep) {
        if (forgettable(*record)) forgotten_.push_back(record);
        if (releasable(*record)) unreleased_.push_back(record);
        continue;
      }
      sleepers_.push_back({record,
                           discards(*record) ? std::vector<Extent>{} : dead_.live_extents(*record),
                           backup::Backup(allocator_.arena())});
      expected_bytes_ += total_bytes(sleepers_.back().live);
    }
  }

  void wait_for_work_in_flight() {
    std::set<int> devices;
    for (const Sleeper& sleeper : sleepers_) devices.insert(sleeper.record->device);
    for (const RecordPointer& record : unreleased_) devices.insert(record->device);
    for (const int device : devices) {
      try {
        const driver::ContextScope scope(allocator_.driver(), device);
        allocator_.driver().fence(device);
      } catch (Error& error) {
        annotate(error, "sleep", nullptr);
        throw;
      }
    }
  }

  void copy_out() {
    std::vector<RecordPointer> records;
    records.reserve(sleepers_.size());
    for (const Sleeper& sleeper : sleepers_) records.push_back(sleeper.record);
    try {
      const backup::ArenaOrder order(allocator_.arena(), expected_bytes_);
      run_copies(allocator_, "sleep", records, report_,
                 [this](std::size_t index, backup::CopyQueue& queue) {
                   Sleeper& sleeper = sleepers_[index];
                   sleeper.saved.save(queue, sleeper.record->address, sleeper.live);
                 });
    } catch (Error& error) {
      annotate(error, "sleep", records.empty() ? nullptr : records.front().get());
      throw;
    }
  }

  // Unmaps everything and releases nothing yet: until the last unmap has succeeded, all of it can
  // be mapped again with its contents, without asking the device for memory.
  void detach() {
    for (std::size_t i = 0; i < sleepers_.size(); ++i) {
      try {
        sleepers_[i].record->memory.unmap();
      } catch (Error& error) {
        annotate(error, "sleep", sleepers_[i].record.get());
        while (i-- > 0) reattach(sleepers_[i], error);
        throw;
      }
    }
  }

  void reattach(Sleeper& sleeper, Error& failure) {
    try {
      sleeper.record->memory.map();
    } catch (Error& error) {
      // Its handle still holds the contents: asleep, nothing lost, and wake maps the same memory.
      annotate(error, "sleep", sleeper.record.get());
      failure.secondary.push_back(error.account());
      keep_asleep(sleeper);
    }
  }

  void keep_asleep(Sleeper& sleeper) {
    allocator_.records().update([&] {
      Record& record = *sleeper.record;
      record.asleep = true;
      record.unreleased = record.intact = true;
      if (!sleeper.live.empty()) record.backup.emplace(std::move(sleeper.saved));
    });
  }

  void commit() {
    allocator_.records().update([this] {
      for (Sleeper& sleeper : sleepers_) {
        sleeper.record->asleep = true;
        if (!sleeper.live.empty()) sleeper.record->backup.emplace(std::move(sleeper.saved));
      }
      for (const RecordPointer& record : forgotten_) {
        cumempool_report_row& row = report_.row(*record);
        row.allocations += 1;
        row.discarded_bytes += record->backup->bytes();
        record->backup.reset();
      }
    });
  }

  // Past the point of no return: memory that the driver will not take back now stays with its
  // allocation, is shown in the statistics, and is used by the next wake.
  void give_back() {
    for (const Sleeper& sleeper : sleepers_) {
      Record& record = *sleeper.record;
      cumempool_report_row& row = report_.row(record);
      const std::size_t backed_up = total_bytes(sleeper.live);
      row.allocations += 1;
      row.backed_up_bytes += backed_up;
      row.discarded_bytes += record.bytes - backed_up;
      release(record, row);
    }
    for (const RecordPointer& record : unreleased_) release(*record, report_.row(*record));
  }

  void release(Record& record, cumempool_report_row& row) {
    bool released = true;
    try {
      record.memory.unmap();  // no effect, unless a failed wake has left it mapped
      driver::check(allocator_.driver().table(), "release", record.memory.release_physical(),
                    record.device, record.bytes);
      row.freed_bytes += record.bytes;
    } catch (Error& error) {
      released = false;
      annotate(error, "sleep", &record);
      report_.problems.push_back(error.message());
    }
    allocator_.records().update([&] {
      record.unreleased = !released;
      record.intact = false;
    });
  }

  Allocator& allocator_;
  const SleepRequest& request_;
  const DeadRanges dead_;
  Transition transition_;
  std::vector<Sleeper> sleepers_;
  std::vector<RecordPointer> forgotten_;   // asleep already; their backups go
  std::vector<RecordPointer> unreleased_;  // asleep already; their memory goes
  std::size_t expected_bytes_ = 0;
  Report report_;
};

}  // namespace

Report sleep(Allocator& allocator, const SleepRequest& request) {
  return Sleep(allocator, request).run();
}

}  // namespace cumempool::pool
