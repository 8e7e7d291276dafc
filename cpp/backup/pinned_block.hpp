// One registered range of host memory and the intervals of it that are free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

#include "driver/driver.hpp"

namespace cumempool::backup {

// Not thread-safe: the arena's lock guards the intervals.
class PinnedBlock {
 public:
  // Maps `bytes`, a page multiple; nothing is touched or pinned yet. Throws Error
  // (CUMEMPOOL_OUT_OF_HOST_MEMORY).
  PinnedBlock(driver::Driver driver, std::size_t bytes);
  // Leaves memory that could not be unregistered mapped: the driver may still write to it.
  ~PinnedBlock();
  PinnedBlock(const PinnedBlock&) = delete;
  PinnedBlock& operator=(const PinnedBlock&) = delete;

  std::byte* data() const noexcept { return data_; }
  std::size_t bytes() const noexcept { return bytes_; }
  bool empty() const noexcept { return free_bytes_ == bytes_; }
  bool full() const noexcept { return free_bytes_ == 0; }

  // Registers it with the driver. Inside a ContextScope of `device`. Throws Error
  // (CUMEMPOOL_OUT_OF_HOST_MEMORY); then it is as before.
  void pin(int device);

  // Takes up to `bytes` from the first free interval; returns how many, and where.
  std::size_t take(std::size_t bytes, std::size_t& offset);
  void give_back(std::size_t offset, std::size_t bytes);

  // Unregisters. Inside a ContextScope. On failure it stays registered and may be repeated.
  cumempool_result unregister(int device) noexcept;

 private:
  driver::Driver driver_;
  std::byte* data_ = nullptr;
  std::size_t bytes_;
  std::size_t free_bytes_;
  bool registered_ = false;
  std::map<std::size_t, std::size_t> free_;  // offset -> bytes, never adjacent
};

}  // namespace cumempool::backup
