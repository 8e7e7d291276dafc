// The transitions of an allocator: sleep, wake, swap, asynchronous wake, and the preparation of a
// sleep. Only transitions change the state of allocations (R3).
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

// ---- common parts of transitions ----------------------------------------------------------------

// One transition of an allocator, from the start of its turn to the end of its claims. Frees of
// claimed records wait until its destructor carries them out.
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

  // Runs `attempt`, which claims records, and returns its report. If the driver refuses to pin host
  // memory for the backups and there is an overflow tier, runs it once more and says so in the
  // report.
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

  // Marks the transition as successful; without this it counts as failed.
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

// Runs `work`. If it throws, calls `party.undo(error)` and throws on.
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

// All or nothing (R4). If it throws Error, every allocation is awake with its contents as before.
// If undoing failed as well, some are asleep with their contents kept, and the error says so.
Report sleep(Allocator& allocator, const SleepRequest& request);

// ---- wake ---------------------------------------------------------------------------------------

// Whether the request concerns a record.
bool wakes(const WakeRequest& request, const Record& record);

// Throws Error (CUMEMPOOL_OUT_OF_MEMORY) if a device has less room than a planned restore needs,
// including the `more(device)` bytes that will become free meanwhile.
void refuse_without_room(Allocator& allocator, const char* operation, Restore& restore,
                         const std::function<std::uint64_t(int device)>& more);

// All or nothing (R4). If it throws Error, every allocation is as asleep as before, with its
// backup.
Report wake(Allocator& allocator, const WakeRequest& request);

// ---- swap ---------------------------------------------------------------------------------------

// Takes no more device memory than is free and the sleep releases. All or nothing (R4), except for
// discarded allocations: if their memory had to be reused before the failure, they stay asleep, and
// the error says so. Throws Error.
Report swap(Allocator& allocator, const SleepRequest& sleep, const WakeRequest& wake);

// ---- prepare ------------------------------------------------------------------------------------

// Pins the host memory that the backups of `request` need beyond the free bytes; returns the bytes
// pinned. Transitions that start meanwhile wait. Throws the Error that would refuse the sleep, as
// if the pins of the tags in `yielding` were released, or CUMEMPOOL_OUT_OF_HOST_MEMORY; the memory
// pinned until then stays.
std::uint64_t prepare(Allocator& allocator, const SleepRequest& request,
                      const std::set<const Tag*>& yielding = {});

// ---- asynchronous wake --------------------------------------------------------------------------

// Thread-safe.
class AsyncWake {
 public:
  // Returns once there is known to be room for all of it. If it throws Error, nothing has changed.
  AsyncWake(std::shared_ptr<Allocator> allocator, WakeRequest request);
  // Waits for the end.
  ~AsyncWake();
  AsyncWake(const AsyncWake&) = delete;
  AsyncWake& operator=(const AsyncWake&) = delete;

  // Makes later work of a stream, of any device with an active context, wait until the allocation
  // at `address` has its contents; does not wait itself. If the wake has failed, throws its Error.
  void wait(cumempool_address address, const cumempool_device_stream& stream);
  // Whether the wake has ended, successfully or not.
  bool done() const;
  // Waits for the end. Throws Error if the wake has failed; returns the report, the first time.
  std::optional<Report> finish();

 private:
  // The point at which an allocation has its contents.
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
  void hand_out(const cumempool_device_stream& stream, cumempool_event event);
  void destroy_events() noexcept;
  void throw_failure() const;
  void throw_failure_locked() const;

  const std::shared_ptr<Allocator> allocator_;
  WakeRequest request_;

  mutable std::mutex mutex_;  // guards everything below but the thread
  std::condition_variable changed_;
  bool planned_ = false;
  bool ended_ = false;
  bool withdrawn_ = false;  // the wake has failed: no memory is handed out any more
  int handing_out_ = 0;     // calls of wait() under way that came before that
  std::map<const Record*, Ready> ready_;
  std::vector<std::shared_ptr<Device>> devices_;  // of the events
  // Contexts of other devices with waiting streams, until the end.
  std::map<int, std::unique_ptr<driver::RetainedContext>> contexts_;
  std::exception_ptr failure_;
  std::optional<Report> report_;
  std::thread thread_;
};

}  // namespace cumempool::pool
