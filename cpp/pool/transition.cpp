// What sleep and wake have in common: the turn, the claims, and the checks before anything changes.
#include "pool/transition.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <tuple>
#include <utility>

#include "pool/report.hpp"

namespace cumempool::pool {

Transition::Transition(Allocator& allocator, const char* operation)
    : allocator_(allocator), turn_(allocator.turnstile(), operation), operation_(operation) {
  allocator_.check_open(operation);
}

Transition::~Transition() {
  allocator_.bury(allocator_.records().unclaim(claimed_));
  Counters& counters = allocator_.counters();
  if (!committed_) {
    counters.failed_transitions += 1;
  } else {
    (std::string(operation_) == "wake" ? counters.wakes : counters.sleeps) += 1;
  }
}

void Transition::refuse_captures(const std::vector<cumempool_device_stream>& streams) const {
  for (const cumempool_device_stream& stream : streams) {
    if (allocator_.devices().find(stream.device) == nullptr) continue;  // nothing of ours is there
    const driver::ContextScope scope(allocator_.driver(), stream.device);
    if (!allocator_.driver().stream_is_capturing(stream.device, stream.stream)) continue;
    Error error(CUMEMPOOL_CAPTURING, "the calling thread's current stream is being captured");
    error.operation = operation_;
    error.device = stream.device;
    error.advice = "end the capture first; the capture goes on undisturbed";
    throw error;
  }
}

const std::vector<RecordPointer>& Transition::claim(
    const std::function<bool(const Record&)>& wanted) {
  claimed_ = allocator_.records().claim(wanted);
  std::stable_sort(claimed_.begin(), claimed_.end(), [](const auto& left, const auto& right) {
    return std::tie(left->device, left->tag->name) < std::tie(right->device, right->tag->name);
  });
  return claimed_;
}

namespace {

bool same_row(const Record& left, const Record& right) {
  return left.device == right.device && left.tag == right.tag;
}

// The copies of one device, enqueued without a gap. A row is waited for when copies of a later one
// are in the queue behind it, so that its time is its own and the link is never idle.
class DeviceCopies {
 public:
  using Work = std::function<void(std::size_t index, backup::CopyQueue& queue)>;

  DeviceCopies(Allocator& allocator, const char* operation,
               const std::vector<RecordPointer>& records, Report& report, const Work& work,
               backup::CopyQueue& queue)
      : operation_(operation),
        records_(records),
        report_(report),
        work_(work),
        queue_(queue),
        device_(allocator.devices().at(queue.device())) {}

  // Copies the records [first, last), all of the queue's device.
  void run(std::size_t first, std::size_t last) {
    std::size_t at = first;
    try {
      while (at < last) at = run_row(at, last);
      wait_for_rows();
      queue_.drain();
    } catch (Error& error) {
      annotate(error, operation_, records_[std::min(at, last - 1)].get());
      settle(error);
      throw;
    } catch (const std::exception& error) {  // out of host memory for bookkeeping
      Error other(CUMEMPOOL_OUT_OF_HOST_MEMORY, error.what());
      annotate(other, operation_, records_[std::min(at, last - 1)].get());
      settle(other);
      throw other;
    }
  }

 private:
  struct Row {
    const Record* record;
    std::size_t mark;
    Clock::time_point start;
  };

  std::size_t run_row(std::size_t first, std::size_t last) {
    const std::uint64_t before = queue_.enqueued();
    const Clock::time_point start = Clock::now();
    std::size_t at = first;
    for (; at < last && same_row(*records_[first], *records_[at]); ++at) {
      work_(at, queue_);
      if (queue_.enqueued() != before) wait_for_rows();
    }
    if (queue_.enqueued() != before) {
      rows_.push_back({records_[first].get(), queue_.mark(), start});
    }
    return at;
  }

  void wait_for_rows() {
    for (const Row& row : rows_) {
      queue_.wait(row.mark);
      const Clock::time_point now = Clock::now();
      const std::chrono::duration<double> time = now - std::max(row.start, finished_);
      report_.row(*row.record).copy_seconds += time.count();
      finished_ = now;
    }
    rows_.clear();
  }

  // Neither side of a copy may be let go while it can still be running.
  void settle(Error& failure) {
    try {
      queue_.drain();
    } catch (Error& error) {
      failure.secondary.push_back(error.account());
    }
  }

  const char* operation_;
  const std::vector<RecordPointer>& records_;
  Report& report_;
  const Work& work_;
  backup::CopyQueue& queue_;
  std::shared_ptr<Device> device_;  // keeps the queue
  std::vector<Row> rows_;           // enqueued, not waited for
  Clock::time_point finished_;      // when the last row that was waited for had finished
};

}  // namespace

void run_copies(Allocator& allocator, const char* operation,
                const std::vector<RecordPointer>& records, Report& report,
                const std::function<void(std::size_t, backup::CopyQueue&)>& work) {
  for (std::size_t first = 0; first < records.size();) {
    const int ordinal = records[first]->device;
    std::size_t last = first;
    while (last < records.size() && records[last]->device == ordinal) ++last;
    const driver::ContextScope scope(allocator.driver(), ordinal);
    backup::CopyQueue& queue = allocator.devices().at(ordinal)->queue();
    DeviceCopies(allocator, operation, records, report, work, queue).run(first, last);
    first = last;
  }
}

}  // namespace cumempool::pool
