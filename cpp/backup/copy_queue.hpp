// A private stream of a device, with marks for its progress, and the pinned buffer that digests are
// computed into.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "driver/driver.hpp"

namespace cumempool::backup {

// Runs copies, fills and digests in order. Not thread-safe. Every call, construction and
// destruction included, runs inside a ContextScope of the device. Destruction does not wait:
// drain() first.
class CopyQueue {
 public:
  CopyQueue(driver::Driver driver, int device);
  ~CopyQueue();
  CopyQueue(const CopyQueue&) = delete;
  CopyQueue& operator=(const CopyQueue&) = delete;

  int device() const noexcept { return device_; }

  // Enqueue a command; throw Error. Both sides must stay valid until a later drain() has returned.
  void to_host(std::byte* destination, cumempool_address source, std::size_t bytes);
  void to_device(cumempool_address destination, const std::byte* source, std::size_t bytes);
  void on_device(cumempool_address destination, cumempool_address source, std::size_t bytes);
  void fill_zero(cumempool_address destination, std::size_t bytes);
  // Both arrays must be registered host memory.
  void digest(std::uint64_t seed, const cumempool_extent* extents, std::size_t count,
              cumempool_digest* digests);

  // Waits for everything enqueued so far; throws Error if any of it failed. Ends all marks.
  void drain();

  // Marks this point in the queue. A mark lives until end_mark() or drain().
  std::size_t mark();
  void wait(std::size_t mark);
  bool done(std::size_t mark);
  void end_mark(std::size_t mark) noexcept;

  // Makes later commands wait for a mark of another queue of the device.
  void follow(const CopyQueue& other, std::size_t mark);

  // Records an event of the caller behind the commands enqueued so far.
  void record(cumempool_event event);

  // The number of copies, fills and digests enqueued so far.
  std::uint64_t enqueued() const noexcept { return enqueued_; }

 private:
  driver::Driver driver_;
  int device_;
  cumempool_stream stream_;
  std::vector<cumempool_event> events_;
  std::vector<std::size_t> free_marks_;  // has capacity for all marks
  std::uint64_t enqueued_ = 0;
};

// Computes digests of device memory in a queue of its own. The ranges and their digests are in
// pinned host memory that the device uses directly. Not thread-safe, but for bytes(); every call
// runs inside a ContextScope of the device.
class DigestBuffer {
 public:
  DigestBuffer(driver::Driver driver, int device);
  // Drain the queue first.
  ~DigestBuffer();
  DigestBuffer(const DigestBuffer&) = delete;
  DigestBuffer& operator=(const DigestBuffer&) = delete;

  CopyQueue& queue() noexcept { return queue_; }

  // Drops all ranges and makes room for `count`; the queue must be idle. Throws Error.
  void begin(std::size_t count);
  // Adds a range to digest.
  void add(cumempool_address address, std::size_t bytes);
  // Launches the digests of the next `count` ranges. Throws Error, with
  // CUMEMPOOL_RESULT_NOT_SUPPORTED if the device cannot compute digests.
  void start(std::uint64_t seed, std::size_t count);

  // The number of ranges added, and of those whose digests are launched.
  std::size_t added() const noexcept { return added_; }
  std::size_t started() const noexcept { return started_; }

  // Waits for the digests of the ranges before `end`; false if they are not launched. Throws Error.
  bool wait(std::size_t end);
  // The digest of the n-th range, once it is computed.
  const cumempool_digest& digest(std::size_t n) const noexcept { return digests_[n]; }

  // Gives the memory back; the queue must be idle. Returns the bytes unpinned.
  std::uint64_t release() noexcept;
  std::uint64_t bytes() const noexcept { return held_bytes_; }

 private:
  driver::Driver driver_;
  CopyQueue queue_;
  std::byte* data_ = nullptr;
  std::atomic<std::size_t> held_bytes_{0};
  std::size_t room_ = 0;
  cumempool_extent* extents_ = nullptr;
  cumempool_digest* digests_ = nullptr;
  std::size_t added_ = 0;
  std::size_t started_ = 0;
  std::map<std::size_t, std::size_t> marks_;  // of launches, by the ranges started up to each
};

}  // namespace cumempool::backup
