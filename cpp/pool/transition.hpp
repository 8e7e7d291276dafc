// What sleep and wake have in common: the turn, the claims, and the checks before anything changes.
// This is the only door through which allocations change state (R3).
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "pool/allocator.hpp"
#include "pool/report.hpp"

namespace cumempool::pool {

// One transition of an allocator, from its turn to the release of its claims. While it lives, frees
// of claimed records are put off; its destructor carries them out.
class Transition {
 public:
  // Waits for its turn. Throws Error (CUMEMPOOL_BUSY, CUMEMPOOL_CLOSED).
  Transition(Allocator& allocator, const char* operation);
  ~Transition();
  Transition(const Transition&) = delete;
  Transition& operator=(const Transition&) = delete;

  // Throws Error (CUMEMPOOL_CAPTURING) if one of the caller's streams is being captured.
  void refuse_captures(const std::vector<cumempool_device_stream>& streams) const;

  // Claims what `wanted` picks, grouped by device and tag, in order of allocation.
  const std::vector<RecordPointer>& claim(const std::function<bool(const Record&)>& wanted);

  // Tells that the transition succeeded; without it, it counts as failed.
  void commit() noexcept { committed_ = true; }

  Allocator& allocator() noexcept { return allocator_; }

 private:
  Allocator& allocator_;
  Turnstile::Turn turn_;
  const char* operation_;
  std::vector<RecordPointer> claimed_;
  bool committed_ = false;
};

// Runs `work(index, queue)`, which enqueues copies and fills, for each of `records` (as claim()
// orders them), one device after the other, inside its ContextScope; waits for them and enters the
// time per row. On failure it waits for what was enqueued before it throws, so that both sides of
// the copies may be let go.
void run_copies(Allocator& allocator, const char* operation,
                const std::vector<RecordPointer>& records, Report& report,
                const std::function<void(std::size_t index, backup::CopyQueue& queue)>& work);

}  // namespace cumempool::pool
