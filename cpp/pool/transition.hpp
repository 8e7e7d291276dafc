// What transitions have in common: the turn, the claims, and the checks before anything changes.
// This is the only door through which allocations change state (R3).
#pragma once

#include <exception>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "pool/allocator.hpp"
#include "pool/host_plan.hpp"
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

  // See RecordSet::claim.
  std::vector<RecordPointer> claim(const std::function<bool(const Record&)>& wanted,
                                   const std::function<void()>& admit = nullptr);

  // Runs `attempt`, which claims, and returns the report of what it did. Where the driver refuses
  // to pin host memory for its backups, and a tier takes the overflow, runs it once more, and the
  // report says so.
  template <typename Attempt>
  Report with_overflow(const Attempt& attempt) {
    std::string refused;
    try {
      return attempt();
    } catch (const Error& error) {
      if (!sends_to_overflow(allocator_, error)) throw;
      refused = error.account();
    }
    begin_again();
    Report report = attempt();
    report.problem(std::move(refused));
    return report;
  }

  // Tells that the transition succeeded; without it, it counts as failed.
  void commit() noexcept { committed_ = true; }

  Allocator& allocator() noexcept { return allocator_; }

 private:
  void begin_again() noexcept;

  Allocator& allocator_;
  Turnstile::Turn turn_;
  const char* operation_;
  std::vector<RecordPointer> claimed_;
  bool committed_ = false;
};

// Runs `work`. Where it fails, `party.undo(error)` takes back what was done, and it throws on.
template <typename Party, typename Work>
void undo_on_failure(Party& party, const Work& work) {
  try {
    work();
  } catch (Error& error) {
    party.undo(error);
    throw;
  } catch (const std::exception& error) {  // no memory for the bookkeeping
    Error other(CUMEMPOOL_OUT_OF_HOST_MEMORY, error.what());
    party.undo(other);
    throw other;
  }
}

}  // namespace cumempool::pool
