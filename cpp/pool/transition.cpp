// What transitions have in common: the turn, the claims, and the checks before anything changes.
#include "pool/transition.hpp"

#include <exception>
#include <string>

namespace cumempool::pool {

Transition::Transition(Allocator& allocator, const char* operation)
    : allocator_(allocator), turn_(allocator.turnstile(), operation), operation_(operation) {
  allocator_.check_open(operation);
  allocator_.progress().done = allocator_.progress().total = 0;
  allocator_.release_leftovers();
  allocator_.follow_use_inside();
}

Transition::~Transition() {
  allocator_.unclaim(claimed_);
  Counters& counters = allocator_.counters();
  if (!committed_) {
    counters.failed_transitions += 1;
  } else {
    const std::string operation = operation_;
    (operation == "wake"   ? counters.wakes
     : operation == "swap" ? counters.swaps
                           : counters.sleeps) += 1;
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

std::vector<RecordPointer> Transition::claim(const std::function<bool(const Record&)>& wanted,
                                             const std::function<void()>& admit) {
  std::vector<RecordPointer> claimed = allocator_.records().claim(wanted, admit);
  try {
    claimed_.insert(claimed_.end(), claimed.begin(), claimed.end());
  } catch (const std::exception&) {  // out of host memory: then nobody would end the claims
    allocator_.unclaim(claimed);
    throw;
  }
  return claimed;
}

void Transition::begin_again() noexcept {
  allocator_.unclaim(claimed_);
  claimed_.clear();
  allocator_.progress().done = allocator_.progress().total = 0;
}

}  // namespace cumempool::pool
