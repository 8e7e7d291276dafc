// A device's private stream: copies, fills and digests in order, and marks that tell how far it has
// come; and the pinned memory that digests are computed into.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "driver/driver.hpp"

namespace cumempool::backup {

// One thread at a time. Every call, construction and destruction included, is made inside a
// ContextScope of the device. Destruction does not wait: drain() first.
class CopyQueue {
 public:
  CopyQueue(driver::Driver driver, int device);
  ~CopyQueue();
  CopyQueue(const CopyQueue&) = delete;
  CopyQueue& operator=(const CopyQueue&) = delete;

  int device() const noexcept { return device_; }

  // Enqueue; throw Error. Both sides stay valid until a later drain() has returned.
  void to_host(std::byte* destination, cumempool_address source, std::size_t bytes);
  void to_device(cumempool_address destination, const std::byte* source, std::size_t bytes);
  void on_device(cumempool_address destination, cumempool_address source, std::size_t bytes);
  void fill_zero(cumempool_address destination, std::size_t bytes);
  // Both arrays are registered host memory.
  void digest(std::uint64_t seed, const cumempool_extent* extents, std::size_t count,
              cumempool_digest* digests);

  // Waits until everything enqueued so far is done: throws Error for what failed in between. Ends
  // all marks.
  void drain();

  // A point in the queue that can be waited for and asked for, until end_mark() or drain().
  std::size_t mark();
  void wait(std::size_t mark);
  bool done(std::size_t mark);
  void end_mark(std::size_t mark) noexcept;

  // What is enqueued from now on waits for a mark of another queue of the device.
  void follow(const CopyQueue& other, std::size_t mark);

  // Records an event of the caller's behind what was enqueued so far.
  void record(cumempool_event event);

  // Copies, fills and digests enqueued so far, in all.
  std::uint64_t enqueued() const noexcept { return enqueued_; }

 private:
  driver::Driver driver_;
  int device_;
  cumempool_stream stream_;
  std::vector<cumempool_event> events_;
  std::vector<std::size_t> free_marks_;  // has room for all of them
  std::uint64_t enqueued_ = 0;
};

// Digests of device memory in the making: what to read and what came out, in pinned host memory
// that the device uses directly. One thread at a time; every call inside a ContextScope of the
// queue's device, drain() included.
class DigestBuffer {
 public:
  DigestBuffer(driver::Driver driver, CopyQueue& queue);
  // The queue was drained.
  ~DigestBuffer();
  DigestBuffer(const DigestBuffer&) = delete;
  DigestBuffer& operator=(const DigestBuffer&) = delete;

  // Begins anew, with room for `count` digests; the queue is idle. Throws Error.
  void begin(std::size_t count);
  // Adds a range to be digested.
  void add(cumempool_address address, std::size_t bytes);
  // Starts on the next `count` of what was added; returns a mark of the queue behind them. Throws
  // Error; CUMEMPOOL_RESULT_NOT_SUPPORTED in it where the device cannot compute digests.
  std::size_t start(std::uint64_t seed, std::size_t count);

  // Of the n-th range, once its mark is done.
  const cumempool_digest& digest(std::size_t n) const noexcept { return digests_[n]; }

  // Gives the memory back; the queue is idle. Returns the bytes unpinned.
  std::uint64_t release() noexcept;
  std::uint64_t bytes() const noexcept { return held_bytes_; }

 private:
  driver::Driver driver_;
  CopyQueue& queue_;
  std::byte* data_ = nullptr;
  std::atomic<std::size_t> held_bytes_{0};
  std::size_t room_ = 0;
  cumempool_extent* extents_ = nullptr;
  cumempool_digest* digests_ = nullptr;
  std::size_t added_ = 0;
  std::size_t started_ = 0;
};

}  // namespace cumempool::backup
