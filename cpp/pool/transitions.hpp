// The transitions of an allocator: sleep, wake, swap, asynchronous wake, and what a sleep can be
// prepared by. This is the only door through which allocations change state (R3).
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "pool/allocator.hpp"
#include "pool/backup_plan.hpp"
#include "pool/offload.hpp"
#include "pool/restore.hpp"
#include "pool/transfer.hpp"

namespace cumempool::pool {

// ---- what transitions have in common ------------------------------------------------------------

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
  TransitionLock::Turn turn_;
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

// ---- sleep --------------------------------------------------------------------------------------

// All or nothing (R4). Throws Error; then every allocation is awake with its contents as before,
// or, where undoing failed as well, asleep with its contents kept, and the error says so.
Report sleep(Allocator& allocator, const SleepRequest& request);

// ---- wake ---------------------------------------------------------------------------------------

// Whether the request concerns a record.
bool wakes(const WakeRequest& request, const Record& record);

// Throws Error (CUMEMPOOL_OUT_OF_MEMORY) where a device has not the room that a planned restore
// needs, `more(device)` bytes included that will become free meanwhile.
void refuse_without_room(Allocator& allocator, const char* operation, Restore& restore,
                         const std::function<std::uint64_t(int device)>& more);

// All or nothing (R4). Throws Error; then every allocation is as asleep as before, with its backup.
Report wake(Allocator& allocator, const WakeRequest& request);

// ---- swap ---------------------------------------------------------------------------------------

// Takes no more device memory than what is free and what the sleep gives back. All or nothing
// (R4), but for what the sleep discards: where its memory had to be reused before the failure, it
// stays asleep, and the error says so. Throws Error.
Report swap(Allocator& allocator, const SleepRequest& sleep, const WakeRequest& wake);

// ---- prepare ------------------------------------------------------------------------------------

// Pins what `request` would need for its backups beyond what is free; returns the bytes pinned. A
// transition that starts meanwhile waits. Throws Error: what the sleep would be refused with, where
// holders of the tags in `yielding` will have taken their pins off; CUMEMPOOL_OUT_OF_HOST_MEMORY,
// and what was pinned until then stays.
std::uint64_t prepare(Allocator& allocator, const SleepRequest& request,
                      const std::set<const Tag*>& yielding = {});

// ---- asynchronous wake --------------------------------------------------------------------------

// Thread-safe.
class AsyncWake {
 public:
  // Returns when it is known that there is room for all of it. Throws Error; then nothing has
  // changed.
  AsyncWake(std::shared_ptr<Allocator> allocator, WakeRequest request);
  // Waits for the end.
  ~AsyncWake();
  AsyncWake(const AsyncWake&) = delete;
  AsyncWake& operator=(const AsyncWake&) = delete;

  // Makes later work of a stream, of any device with an active context, wait until the allocation
  // at `address` has its contents; returns as soon as that is arranged. Throws Error: of the wake,
  // where it failed.
  void wait(cumempool_address address, const cumempool_device_stream& stream);
  // Whether it has ended, well or not.
  bool done() const;
  // Waits for the end. Throws Error where it failed; returns the report, the first time.
  std::optional<Report> finish();

 private:
  // When an allocation has its contents.
  struct Ready {
    int device = 0;
    cumempool_event event = 0;  // behind its copies, once they are in the queue
    bool queued = false;
  };

  void run();
  void note_planned(const std::vector<RecordPointer>& records);
  void note_queued(const Record& record, backup::CopyQueue& queue);
  void withdraw();
  void hold_context(int device);
  void wait_for_event(const cumempool_device_stream& stream, cumempool_event event);
  void destroy_events() noexcept;
  void throw_failure() const;
  void throw_failure_locked() const;

  const std::shared_ptr<Allocator> allocator_;
  WakeRequest request_;

  mutable std::mutex mutex_;  // guards everything below but the thread
  std::condition_variable changed_;
  bool planned_ = false;
  bool ended_ = false;
  bool withdrawn_ = false;  // it fails: nothing is handed out any more
  int handing_out_ = 0;     // calls of wait() that have seen that it does not
  std::map<const Record*, Ready> ready_;
  std::vector<std::shared_ptr<Device>> devices_;  // of the events
  // Contexts of other devices whose streams wait, until the end.
  std::map<int, std::unique_ptr<driver::RetainedContext>> contexts_;
  std::exception_ptr failure_;
  std::optional<Report> report_;
  std::thread thread_;
};

}  // namespace cumempool::pool
