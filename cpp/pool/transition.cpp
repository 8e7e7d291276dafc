// What sleep and wake have in common: the turn, the claims, and the checks before anything changes.
#include "pool/transition.hpp"

#include <algorithm>
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

// The copies of one device, row by row; each row is waited for, so that its time is its own.
class DeviceCopies {
 public:
  using Work = std::function<void(std::size_t index, backup::CopyQueue& queue)>;

  DeviceCopies(Allocator& allocator, const char* operation,
               const std::vector<RecordPointer>& records, Report& report, const Work& work)
      : allocator_(allocator),
        operation_(operation),
        records_(records),
        report_(report),
        work_(work) {}

  // Copies the records [first, last), all of one device.
  void run(std::size_t first, std::size_t last) {
    const int device = records_[first]->device;
    const driver::ContextScope scope(allocator_.driver(), device);
    const std::shared_ptr<Device> held = allocator_.devices().at(device);
    backup::CopyQueue& queue = held->queue();
    for (std::size_t at = first; at < last;) at = run_row(queue, at, last);
  }

 private:
  std::size_t run_row(backup::CopyQueue& queue, std::size_t first, std::size_t last) {
    const Clock::time_point start = Clock::now();
    std::size_t at = first;
    try {
      for (; at < last && same_row(*records_[first], *records_[at]); ++at) work_(at, queue);
      queue.drain();
    } catch (Error& error) {
      annotate(error, operation_, records_[first].get());
      settle(queue, error);
      throw;
    } catch (const std::exception& error) {  // out of host memory for bookkeeping
      Error other(CUMEMPOOL_OUT_OF_HOST_MEMORY, error.what());
      annotate(other, operation_, records_[first].get());
      settle(queue, other);
      throw other;
    }
    report_.row(*records_[first]).copy_seconds += seconds_since(start);
    return at;
  }

  // Neither side of a copy may be let go while it can still be running.
  static void settle(backup::CopyQueue& queue, Error& failure) {
    try {
      queue.drain();
    } catch (Error& error) {
      failure.secondary.push_back(error.account());
    }
  }

  Allocator& allocator_;
  const char* operation_;
  const std::vector<RecordPointer>& records_;
  Report& report_;
  const Work& work_;
};

}  // namespace

void run_copies(Allocator& allocator, const char* operation,
                const std::vector<RecordPointer>& records, Report& report,
                const std::function<void(std::size_t, backup::CopyQueue&)>& work) {
  DeviceCopies copies(allocator, operation, records, report, work);
  for (std::size_t first = 0; first < records.size();) {
    std::size_t last = first;
    while (last < records.size() && records[last]->device == records[first]->device) ++last;
    copies.run(first, last);
    first = last;
  }
}

}  // namespace cumempool::pool
