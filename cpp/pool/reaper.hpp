// Gives back the memory of allocations that the program has freed, once no work can be using it.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#include "driver/driver.hpp"
#include "pool/records.hpp"

namespace cumempool::pool {

// A list that is linked through the records, so that entering one takes no memory and cannot fail:
// this happens where memory has run out, and where nothing may throw.
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
  // Null where it is empty.
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

// Thread-safe; no function fails. Memory that is mapped may be in use until its devices were waited
// for. That is done by a thread, which lives as long as there is something to do: a free goes on
// without it when a device turns out to be busy. All records that wait at a time are one batch,
// with one fence. See docs/adr/0028-retired-memory.md.
class Reaper : public std::enable_shared_from_this<Reaper> {
 public:
  using Duration = std::chrono::nanoseconds;
  // The thread that frees does what is to be done, however long that takes.
  static constexpr Duration kForever = Duration::max();

  explicit Reaper(driver::Driver driver) : driver_(driver) {}
  ~Reaper() = default;
  Reaper(const Reaper&) = delete;
  Reaper& operator=(const Reaper&) = delete;

  // Takes a record that is in no set any more. Returns when its memory was given back, or is leaked
  // because the driver has refused that, or one call of the driver has lasted for the free wait
  // already.
  void take(const RecordPointer& record) noexcept;

  // Waits for the devices: what was taken so far has been given back, or is leaked.
  void drain() noexcept;

  // From now on take() waits for the devices, since their contexts are about to go. Then drains,
  // and tries once more to give back what is leaked.
  void seal() noexcept;

  // How long a free waits for a call of the driver that waits for a device.
  void set_free_wait(Duration wait) noexcept { free_wait_ = wait; }

  // Of what waits.
  std::uint64_t bytes() const noexcept { return bytes_; }
  // Whether anything is leaked.
  bool holds_leaked() noexcept {
    const Lock lock(mutex_);
    return !leaked_.empty();
  }

 private:
  using Clock = std::chrono::steady_clock;
  using Lock = std::unique_lock<std::mutex>;

  class Step;
  class Fences;

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
  bool working_ = false;       // some thread, on a batch
  std::uint64_t batches_ = 0;  // done
  bool in_step_ = false;       // a call of the driver that may wait
  std::uint64_t step_ = 0;     // its number
  Clock::time_point step_began_;
};

}  // namespace cumempool::pool
