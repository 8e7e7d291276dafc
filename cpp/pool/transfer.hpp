// The transfer of one device in a transition: the copies of its allocations, their digests, and the
// report with the times.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backup/backup.hpp"
#include "cumempool/cumempool.h"
#include "pool/allocator.hpp"
#include "pool/records.hpp"

namespace cumempool::pool {

// ---- report -------------------------------------------------------------------------------------

struct Report {
  double seconds = 0;
  std::vector<cumempool_report_row> rows;  // names live as long as the process
  std::vector<std::string> problems;

  // Adds a problem. It takes no memory if `problems` has capacity.
  void problem(std::string&& text) noexcept {
    try {
      problems.push_back(std::move(text));
    } catch (const std::exception&) {
      return;  // the numbers of the rows still show it
    }
  }

  // Returns the row of the record's tag and device; makes it at first use.
  cumempool_report_row& row(const Record& record);
};

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// ---- digests ------------------------------------------------------------------------------------

// Dirty tracking by digests. If the device cannot compute digests, all contents are copied and the
// report says so. Calls, but for construction, run inside a ContextScope of the device. Allocations
// are known by their position in the order of add().
class DirtyTracker {
 public:
  DirtyTracker(Allocator& allocator, Device& device, const char* operation, Report& report)
      : allocator_(allocator), device_(device), operation_(operation), report_(report) {}

  // Adds an allocation and its backup. wait() and pass() come in the order of add().
  void add(cumempool_address address, const backup::Backup& backup) {
    sources_.push_back({address, &backup});
  }
  // Starts to compute digests.
  void start();

  // Waits for the digests of an allocation's slices and returns them, in order; null if there are
  // none.
  const cumempool_digest* wait(std::size_t position);
  // Starts the digests that follow those of an allocation, without a wait.
  void pass(std::size_t position);
  // Computes the remaining digests, and waits for them.
  void complete();

  // Digests slices of an allocation once more, behind the commands of `copies` so far. Launches are
  // shared by several allocations; flush() starts the last one. No effect if there are no digests.
  void recheck(std::size_t position, std::vector<std::size_t> slices, backup::CopyQueue& copies);
  void flush(backup::CopyQueue& copies);
  // Waits for the second digests. Forgets the digests in the backup that differ from them, since
  // the copy may match neither. Returns the bytes of those slices.
  std::uint64_t verify(std::size_t position, backup::Backup& backup);

  // Wait for all digests before, or behind, the copies.
  void finish();
  void finish_rechecks();

 private:
  struct Source {
    cumempool_address address = 0;
    const backup::Backup* backup = nullptr;
    std::size_t first = 0;  // of its slices in the digest buffer
    std::size_t end = 0;
    std::size_t first_recheck = 0;         // of its slices in the buffer of second digests
    std::vector<std::size_t> rechecked{};  // slices of the backup
  };

  void advance(std::size_t end);
  void give_up(Error& error);

  Allocator& allocator_;
  Device& device_;
  const char* operation_;
  Report& report_;
  std::vector<Source> sources_;
  bool begun_ = false;            // digests may be under way
  bool known_ = false;            // digests are computed, and no launch has failed
  bool rechecks_failed_ = false;  // no more launches behind the copies
};

// ---- copies -------------------------------------------------------------------------------------

// Calls run inside a ContextScope of the device, but for construction and noexcept calls.
class DeviceTransfer {
 public:
  DeviceTransfer(Allocator& allocator, const char* operation, std::shared_ptr<Device> device,
                 Direction direction, Report& report);
  DeviceTransfer(const DeviceTransfer&) = delete;
  DeviceTransfer& operator=(const DeviceTransfer&) = delete;
  ~DeviceTransfer() = default;

  Device& device() noexcept { return *device_; }
  int ordinal() const noexcept { return device_->ordinal(); }
  backup::Transfer& streams() noexcept { return streams_; }
  DirtyTracker& dirty() noexcept { return dirty_; }

  // Appends an allocation, with the caller's `index` of it. Positions count from 0.
  void add(const Record& record, std::size_t index);
  std::size_t size() const noexcept { return items_.size(); }
  std::size_t index(std::size_t position) const { return items_[position].index; }

  // The position of the next allocation, until advance(); size() if none is left.
  std::size_t next() const noexcept { return next_; }
  bool done() const noexcept { return next_ == items_.size(); }
  void advance();

  // Starts the clock, before the first copy.
  void begin() { since_ = Clock::now(); }
  // Starts the copies of the next allocation, in order: calls `start`.
  void copy(cumempool_backup_tier tier, const std::function<void()>& start);
  // Waits for the threads of the bounce buffers.
  void finish_bounce_buffers();
  // Whether all copied allocations are popped.
  bool empty() const noexcept { return popped_ == copied_; }
  // Waits for the copies of the oldest allocation only; returns its position. If this throws Error,
  // the allocation is not popped.
  std::size_t pop();

  // Runs `step`. Annotates its Error with the allocation, unless the Error names another one.
  template <typename Step>
  void about(std::size_t position, const Step& step) {
    try {
      step();
    } catch (Error& error) {
      annotate(error, operation_, items_[position].record);
      throw;
    }
  }

  // After a failure, commands, digests included, may still run: the transfer is stuck until
  // settle() has waited for them. Until then both sides of the copies must stay. settle() throws
  // Error.
  void unsettle() noexcept;
  void settle();
  bool stuck() const noexcept { return stuck_; }

 private:
  struct Item {
    const Record* record = nullptr;
    std::size_t index = 0;
    std::optional<std::size_t> mark{};  // behind its copies; none if they are done
  };

  void add_bounce_seconds(double seconds);
  void finish_oldest();
  void poll();

  Allocator& allocator_;
  const char* operation_;
  const std::shared_ptr<Device> device_;
  backup::Transfer& streams_;
  Report& report_;
  DirtyTracker dirty_;
  std::vector<Item> items_;
  std::size_t next_ = 0;
  // Numbers of items, from the first on: in the queue, with their time in the report, and popped.
  std::size_t copied_ = 0;
  std::size_t finished_ = 0;
  std::size_t popped_ = 0;
  const Record* last_bounced_ = nullptr;
  std::uint64_t seen_;       // commands in the queue after the last copy()
  Clock::time_point since_;  // the end of the last copy, or the start of the first
  bool stuck_ = false;
};

// The transfers of a transition, one per device, so that all devices copy at the same time.
class DeviceTransfers {
 public:
  DeviceTransfers(Allocator& allocator, const char* operation, Direction direction, Report& report)
      : allocator_(allocator), operation_(operation), direction_(direction), report_(report) {}

  // Appends an allocation to the transfer of its device. Throws Error.
  void add(const Record& record, std::size_t index);

  std::vector<std::unique_ptr<DeviceTransfer>>& all() noexcept { return transfers_; }
  DeviceTransfer* find(int device) noexcept;

  // Calls step(transfer, position) for all remaining allocations, in turns between the devices,
  // inside a ContextScope.
  void each_in_turn(const std::function<void(DeviceTransfer&, std::size_t)>& step);
  // Calls step(transfer) for each transfer, inside a ContextScope.
  void each(const std::function<void(DeviceTransfer&)>& step);
  // Settles all transfers after a failure; adds the reason to it if one stays stuck.
  void settle(Error& failure) noexcept;

 private:
  Allocator& allocator_;
  const char* operation_;
  const Direction direction_;
  Report& report_;
  std::vector<std::unique_ptr<DeviceTransfer>> transfers_;
};

}  // namespace cumempool::pool
