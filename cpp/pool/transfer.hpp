// One device's share of a transition: the copies of its allocations, their digests, and the report
// of how long they took.
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

  // Adds a problem; for those that there is room reserved for, without memory.
  void problem(std::string&& text) noexcept {
    try {
      problems.push_back(std::move(text));
    } catch (const std::exception&) {
      return;  // the numbers of the rows tell of it all the same
    }
  }

  // The row of a record's tag and device, made at first use.
  cumempool_report_row& row(const Record& record);
};

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// ---- digests ------------------------------------------------------------------------------------

// Where the device cannot compute digests, nothing has any, all of it is copied, and the report
// says so. Every call inside a ContextScope of the device, but for construction. Allocations are
// known by their position in the list that start() is given.
class DirtyTracker {
 public:
  DirtyTracker(Allocator& allocator, Device& device, const char* operation, Report& report)
      : allocator_(allocator), device_(device), operation_(operation), report_(report) {}

  struct Source {
    cumempool_address address;
    const backup::Backup* image;
  };
  // Begins with allocations, which are asked for in this order.
  void start(const std::vector<Source>& sources);

  // The digests of an allocation's slices, in order, once they are computed; null where there are
  // none.
  const cumempool_digest* wait(std::size_t position);
  // Goes on with what follows an allocation, which is not waited for.
  void pass(std::size_t position);
  // Computes the rest of the digests, and waits for them.
  void complete();

  // Digests slices of an allocation once more, behind what `copies` has been given so far, in
  // groups of allocations; flush() begins with the last one. No effect where there are no digests.
  void recheck(std::size_t position, std::vector<std::size_t> slices, backup::CopyQueue& copies);
  void flush(backup::CopyQueue& copies);
  // Waits for that, and has the image forget the digests of slices that are others now: what was
  // copied may be neither. Returns their bytes.
  std::uint64_t verify(std::size_t position, backup::Backup& image);

  // Wait for all that was begun before the copies, or behind them.
  void finish();
  void finish_rechecks();

 private:
  struct Allotted {
    Source source;
    std::size_t first = 0;  // of its slices on the board
    std::size_t end = 0;
    std::size_t first_recheck = 0;         // the same of those that are digested once more
    std::vector<std::size_t> rechecked{};  // of the image
  };
  // How far a board has come.
  struct Launches {
    // The mark of the launch that digests the slices before `end`; none: there is no such launch.
    std::optional<std::size_t> mark_of(std::size_t end) const;

    std::size_t added = 0;                       // slices on the board
    std::size_t started = 0;                     // of them
    std::map<std::size_t, std::size_t> marks{};  // by the slices that are done once they are
  };

  void advance(std::size_t end);
  void give_up(Error& error);

  Allocator& allocator_;
  Device& device_;
  const char* operation_;
  Report& report_;
  std::vector<Allotted> allotted_;
  Launches digests_;
  Launches rechecks_;
  bool begun_ = false;            // something may be under way
  bool known_ = false;            // digests are computed, and none was refused
  bool rechecks_failed_ = false;  // nothing more is launched
};

// ---- copies -------------------------------------------------------------------------------------

// Every call inside a ContextScope of the device, but for construction and what is noexcept.
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

  // Appends an allocation, which the caller knows as `index`. Its position counts from 0.
  void add(const Record& record, std::size_t index);
  std::size_t size() const noexcept { return items_.size(); }
  std::size_t index(std::size_t position) const { return items_[position].index; }

  // The position of the allocation that comes next, until advance(); size() where none is left.
  std::size_t next() const noexcept { return next_; }
  bool done() const noexcept { return next_ == items_.size(); }
  void advance();

  // The first copy is about to begin: time counts from here.
  void begin() { since_ = Clock::now(); }
  // Starts the copies of the next allocation, in order, by calling `start`.
  void copy(cumempool_backup_tier tier, const std::function<void()>& start);
  // Waits for the threads that take part in copies.
  void finish_staged();
  // Whether nothing that was copied is left to be popped.
  bool empty() const noexcept { return popped_ == copied_; }
  // Waits for the copies of the oldest allocation, and for nothing else; returns its position.
  // Throws Error; then it is still there.
  std::size_t pop();

  // Runs `step`, and has its Error say that it is about an allocation, unless it knows better.
  template <typename Step>
  void about(std::size_t position, const Step& step) {
    try {
      step();
    } catch (Error& error) {
      annotate(error, operation_, items_[position].record);
      throw;
    }
  }

  // A failure: what was enqueued, digests included, may still run. It is stuck until settle() has
  // waited for that, so that both sides of the copies may go. settle() throws Error.
  void unsettle() noexcept;
  void settle();
  bool stuck() const noexcept { return stuck_; }

 private:
  struct Item {
    const Record* record = nullptr;
    std::size_t index = 0;
    std::optional<std::size_t> mark{};  // behind its copies; none: done
  };

  void note_staged(double seconds);
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
  // So many of the items, from the first on, are in the queue, have had their time entered, and
  // were popped.
  std::size_t copied_ = 0;
  std::size_t finished_ = 0;
  std::size_t popped_ = 0;
  const Record* last_staged_ = nullptr;
  std::uint64_t seen_;       // commands of the queue at the last copy()
  Clock::time_point since_;  // when the last one finished, or the first began
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

  // Calls step(transfer, position) for all that is left, in turns between the devices, inside a
  // ContextScope.
  void each_in_turn(const std::function<void(DeviceTransfer&, std::size_t)>& step);
  // Calls step(transfer) for all transfers, inside a ContextScope.
  void each(const std::function<void(DeviceTransfer&)>& step);
  // After a failure: settles all of them; why one is stuck is added to it.
  void settle(Error& failure) noexcept;

 private:
  Allocator& allocator_;
  const char* operation_;
  const Direction direction_;
  Report& report_;
  std::vector<std::unique_ptr<DeviceTransfer>> transfers_;
};

}  // namespace cumempool::pool
