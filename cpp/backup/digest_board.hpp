// Digests of device memory in the making: what to read and what came out, in pinned host memory
// that the device uses directly.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "backup/copy_queue.hpp"
#include "driver/driver.hpp"

namespace cumempool::backup {

// One thread at a time; every call inside a ContextScope of the queue's device, drain() included.
class DigestBoard {
 public:
  DigestBoard(driver::Driver driver, CopyQueue& queue);
  // The queue was drained.
  ~DigestBoard();
  DigestBoard(const DigestBoard&) = delete;
  DigestBoard& operator=(const DigestBoard&) = delete;

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
