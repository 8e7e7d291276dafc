// What sleep and wake have in common: the turn, the claims, and the checks before anything changes.
#include "pool/transition.hpp"

#include <algorithm>
#include <chrono>
#include <exception>
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
  const auto used = allocator_.devices().used();
  for (const cumempool_device_stream& stream : streams) {
    const auto is_device = [&](const Device* device) { return device->ordinal() == stream.device; };
    if (std::none_of(used.begin(), used.end(), is_device)) continue;  // nothing of ours is there
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

// The copies of one device: enqueues them row by row, then waits row by row.
class DeviceCopies {
 public:
  DeviceCopies(Allocator& allocator, const char* operation, Report& report,
               const std::vector<RecordPointer>& records, std::size_t first, std::size_t last)
      : driver_(allocator.driver()),
        operation_(operation),
        report_(report),
        records_(records),
        first_(first),
        last_(last),
        device_(allocator.devices().at(records[first]->device)) {}

  void run(const std::function<void(std::size_t, backup::CopyQueue&)>& work) {
    const driver::ContextScope scope(driver_, device_.ordinal());
    backup::CopyQueue& queue = device_.queue();
    try {
      enqueue(queue, work);
      wait(queue);
    } catch (Error& error) {
      annotate(error, operation_, nullptr);
      if (error.device < 0) error.device = device_.ordinal();
      finish(queue, &error);
      throw;
    } catch (const std::exception&) {  // out of host memory for bookkeeping
      finish(queue, nullptr);
      throw;
    }
    finish(queue, nullptr);
  }

 private:
  void enqueue(backup::CopyQueue& queue,
               const std::function<void(std::size_t, backup::CopyQueue&)>& work) {
    for (std::size_t i = first_; i < last_; ++i) {
      try {
        work(i, queue);
        if (i + 1 == last_ || !same_row(*records_[i], *records_[i + 1])) {
          marks_.push_back({i, queue.mark()});
        }
      } catch (Error& error) {
        annotate(error, operation_, records_[i].get());
        throw;
      }
    }
  }

  void wait(backup::CopyQueue& queue) {
    Clock::time_point since = start_;
    for (const auto& [index, mark] : marks_) {
      queue.wait(mark);
      const Clock::time_point now = Clock::now();
      report_.row(*records_[index]).copy_seconds +=
          std::chrono::duration<double>(now - since).count();
      since = now;
    }
  }

  // Nothing may be let go while a copy can still be running.
  static void finish(backup::CopyQueue& queue, Error* failure) {
    try {
      queue.drain();
    } catch (Error& error) {
      if (failure == nullptr) throw;
      failure->secondary.push_back(error.message());
    }
  }

  driver::Driver driver_;
  const char* operation_;
  Report& report_;
  const std::vector<RecordPointer>& records_;
  std::size_t first_;
  std::size_t last_;
  Device& device_;
  Clock::time_point start_ = Clock::now();
  std::vector<std::pair<std::size_t, std::size_t>> marks_;  // last record of a row, mark behind it
};

}  // namespace

void run_copies(Allocator& allocator, const char* operation,
                const std::vector<RecordPointer>& records, Report& report,
                const std::function<void(std::size_t, backup::CopyQueue&)>& work) {
  for (std::size_t first = 0; first < records.size();) {
    std::size_t last = first;
    while (last < records.size() && records[last]->device == records[first]->device) ++last;
    DeviceCopies(allocator, operation, report, records, first, last).run(work);
    first = last;
  }
}

}  // namespace cumempool::pool
