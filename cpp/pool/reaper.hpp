// Gives back the memory of allocations that the program has freed, once no work can be using it.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "driver/driver.hpp"
#include "pool/records.hpp"

namespace cumempool::pool {

// A list that is linked through the records, so that push() takes no memory and cannot fail:
// callers are out of memory, or must not throw.
class RecordList {
 public:
  RecordList() = default;
  ~RecordList() {
    while (pop() != nullptr) {
    }
  }
  RecordList(const RecordList&) = delete;
  RecordList(RecordList&&) = delete;
  RecordList& operator=(const RecordList&) = delete;
  RecordList& operator=(RecordList&&) = delete;

  void push(RecordPointer record) noexcept {
    record->next = std::move(first_);
    first_ = std::move(record);
  }
  // Removes a record; null if the list is empty.
  RecordPointer pop() noexcept {
    if (first_ == nullptr) return nullptr;
    RecordPointer record = std::move(first_);
    first_ = std::move(record->next);
    return record;
  }
  void swap(RecordList& other) noexcept { first_.swap(other.first_); }
  bool empty() const noexcept { return first_ == nullptr; }

 private:
  RecordPointer first_;
};

// Thread-safe; no function fails. Mapped memory may be in use until its devices were waited for. A
// thread does that, which lives as long as there is work: a free returns without it if a device
// turns out to be busy. All records that wait at a time form one batch with one fence. See
// docs/adr/0028-retired-memory.md.
class Reaper : public std::enable_shared_from_this<Reaper> {
 public:
  using Duration = std::chrono::nanoseconds;
  // The freeing thread does the work itself, however long that takes.
  static constexpr Duration kForever = Duration::max();

  explicit Reaper(driver::Driver driver) : driver_(driver) {}
  ~Reaper() = default;
  Reaper(const Reaper&) = delete;
  Reaper& operator=(const Reaper&) = delete;

  // Takes a record that has left its set. Returns when its memory is given back, or is leaked
  // because the driver has refused, or when one call of the driver has lasted for the free wait.
  void take(const RecordPointer& record) noexcept;

  // Waits for the devices until all records taken so far are given back or leaked.
  void drain() noexcept;

  // Makes take() wait for the devices from now on, since their contexts are about to go. Then
  // drains, and tries once more to give back leaked records.
  void seal() noexcept;

  // Sets how long a free waits for a driver call that waits for a device.
  void set_free_wait(Duration wait) noexcept { free_wait_ = wait; }

  // The bytes of the waiting records.
  std::uint64_t bytes() const noexcept { return bytes_; }
  // Whether anything is leaked.
  bool holds_leaked() noexcept {
    const Lock lock(mutex_);
    return !leaked_.empty();
  }

 private:
  using Clock = std::chrono::steady_clock;
  using Lock = std::unique_lock<std::mutex>;

  // By device: whether it was idle after its fence; none if it was not waited for.
  using IdleDevices = std::array<std::optional<bool>, 64>;

  template <typename Call>
  auto in_step(const Call& call) noexcept;
  bool fence(int device) noexcept;
  bool unused(const Record& record, IdleDevices& idle) noexcept;

  template <typename Done>
  void wait_for(const Done& done, Lock& lock) noexcept;
  template <typename Done>
  void work_until(const Done& done, Lock& lock) noexcept;
  void work_off(Lock& lock) noexcept;
  void finish(RecordPointer record, bool given_back) noexcept;
  bool start(const Lock& lock) noexcept;
  void run() noexcept;
  bool more_soon(Lock& lock) noexcept;
  void look_out(const std::atomic<std::uint64_t>& count, Lock& lock) noexcept;

  const driver::Driver driver_;
  std::atomic<Duration> free_wait_{std::chrono::milliseconds(1)};
  std::atomic<std::uint64_t> bytes_{0};
  std::atomic<std::uint64_t> taken_{0};     // records that have waited
  std::atomic<std::uint64_t> finished_{0};  // given back, or leaked

  std::mutex mutex_;  // guards everything below
  std::condition_variable changed_;
  RecordList waiting_;
  RecordList leaked_;
  bool sealed_ = false;
  bool thread_lives_ = false;
  bool working_ = false;       // a thread works on a batch
  std::uint64_t batches_ = 0;  // that are done
  bool in_step_ = false;       // a driver call is under way that may wait for a device
  std::uint64_t step_ = 0;     // the number of that call
  Clock::time_point step_began_;
};

}  // namespace cumempool::pool
