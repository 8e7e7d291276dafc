// Wakes tags: physical memory mapped at the same addresses, contents restored.
#include "pool/wake.hpp"

#include <algorithm>
#include <cstddef>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "pool/transition.hpp"

namespace cumempool::pool {
namespace {

class Wake {
 public:
  Wake(Allocator& allocator, const WakeRequest& request)
      : allocator_(allocator), request_(request), transition_(allocator, "wake") {}

  Report run() {
    const Clock::time_point start = Clock::now();
    transition_.refuse_captures(request_.streams);
    records_ = transition_.claim([this](const Record& record) {
      return record.asleep && !record.doomed &&
             (request_.all || request_.tags.count(record.tag) != 0);
    });
    // What has a backup comes first: while it is copied, the rest is mapped.
    std::stable_sort(records_.begin(), records_.end(), [](const auto& left, const auto& right) {
      return std::make_tuple(left->device, !left->backup) <
             std::make_tuple(right->device, !right->backup);
    });
    held_before_.reserve(records_.size());
    try {
      copy_in();
    } catch (Error& error) {
      wait_for_copies();
      undo(&error);
      throw;
    } catch (const std::exception&) {  // out of host memory for bookkeeping
      wait_for_copies();
      undo(nullptr);
      throw;
    }
    commit();
    transition_.commit();
    report_.seconds = seconds_since(start);
    return std::move(report_);
  }

 private:
  void attach(std::size_t index) {
    Record& record = *records_[index];
    held_before_.push_back(record.memory.holds_physical());
    try {
      record.memory.map();
    } catch (Error& error) {
      explain(error, index);
      throw;
    }
  }

  // Says how much the whole wake needs, which the failing allocation alone does not tell.
  void explain(Error& error, std::size_t failed) const {
    std::uint64_t needed = 0;
    std::uint64_t mapped = 0;
    for (std::size_t i = 0; i < records_.size(); ++i) {
      if (records_[i]->device != records_[failed]->device) continue;
      needed += records_[i]->bytes;
      if (i < failed) mapped += records_[i]->bytes;
    }
    annotate(error, "wake", records_[failed].get());
    if (error.status != CUMEMPOOL_OUT_OF_MEMORY) return;
    error.problem = "the wake needs " + format_bytes(needed) + " on the device and had taken " +
                    format_bytes(mapped) + ", which it gave back";
    error.advice =
        "free device memory (torch.cuda.empty_cache(), other tags, other processes) and wake "
        "again; "
        "everything is still asleep with its backup";
  }

  // Copies were waited for, unless that failed as well: then they may still write to what is
  // mapped.
  void wait_for_copies() {
    for (const RecordPointer& record : records_) {
      if (idle_.count(record->device) != 0 || busy_.count(record->device) != 0) continue;
      try {
        const driver::ContextScope scope(allocator_.driver(), record->device);
        allocator_.driver().fence(record->device);
        idle_.insert(record->device);
      } catch (const Error&) {
        busy_.insert(record->device);
      }
    }
  }

  // Takes back what this call has mapped so far. Memory that an earlier failure had left with its
  // allocation stays with it, and so does what copies may still write to (R5).
  void undo(Error* failure) {
    for (std::size_t i = held_before_.size(); i-- > 0;) {
      Record& record = *records_[i];
      if (busy_.count(record.device) != 0) {
        allocator_.records().update([&] { record.unreleased = record.memory.holds_physical(); });
        continue;
      }
      try {
        record.memory.unmap();
        if (held_before_[i]) continue;
        driver::check(allocator_.driver().table(), "release", record.memory.release_physical(),
                      record.device, record.bytes);
      } catch (Error& error) {
        annotate(error, "wake", &record);
        if (failure != nullptr) failure->secondary.push_back(error.account());
        allocator_.records().update([&] { record.unreleased = record.memory.holds_physical(); });
      }
    }
  }

  void copy_in() {
    std::map<const Tag*, bool> zero;
    for (const RecordPointer& record : records_) {
      zero[record->tag] = allocator_.tags().policy(*record->tag).on_wake == CUMEMPOOL_ON_WAKE_ZERO;
    }
    run_copies(
        allocator_, "wake", records_, report_, [&](std::size_t index, backup::CopyQueue& queue) {
          Record& record = *records_[index];
          attach(index);
          cumempool_report_row& row = report_.row(record);
          row.allocations += 1;
          if (!held_before_[index]) row.mapped_bytes += record.bytes;
          if (record.intact) return;  // its contents never left
          if (record.backup) {
            record.backup->restore(queue, record.address);
            row.restored_bytes += record.backup->bytes();
            if (!zero[record.tag]) return;
            row.zeroed_bytes += record.backup->zero_rest(queue, record.address, record.bytes);
          } else if (zero[record.tag]) {
            queue.fill_zero(record.address, record.bytes);
            row.zeroed_bytes += record.bytes;
          }
        });
  }

  void commit() {
    allocator_.records().update([this] {
      for (const RecordPointer& record : records_) {
        record->asleep = false;
        record->unreleased = record->intact = false;
        record->generation += 1;
        record->backup.reset();
      }
    });
  }

  Allocator& allocator_;
  const WakeRequest& request_;
  Transition transition_;
  std::vector<RecordPointer> records_;
  std::vector<bool> held_before_;  // of the records attached so far
  std::set<int> idle_;             // devices whose copies are known to be over, after a failure
  std::set<int> busy_;             // and those that could not be asked
  Report report_;
};

}  // namespace

Report wake(Allocator& allocator, const WakeRequest& request) {
  return Wake(allocator, request).run();
}

}  // namespace cumempool::pool
