// The most pinned host memory that the arenas of one allocator may hold between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "driver/error.hpp"

namespace cumempool::backup {

// Thread-safe.
class HostBudget {
 public:
  // `limit` 0 = no limit.
  explicit HostBudget(std::uint64_t limit) : limit_(limit) {}

  std::uint64_t limit() const noexcept { return limit_; }
  std::uint64_t claimed() const;
  // Bytes that can still be claimed; UINT64_MAX where there is no limit.
  std::uint64_t room() const;

  // False, and no effect, where there is not so much room.
  bool claim(std::size_t bytes);
  void unclaim(std::size_t bytes) noexcept;

  // The driver pins no more than what is claimed: there is no room beyond that until allow().
  void refuse() noexcept;
  void allow() noexcept;

  // Why there is no room for so many more: CUMEMPOOL_OUT_OF_HOST_MEMORY.
  Error refusal(std::uint64_t bytes) const;

 private:
  std::uint64_t room_locked() const;

  const std::uint64_t limit_;
  mutable std::mutex mutex_;
  std::uint64_t claimed_ = 0;
  bool refused_ = false;  // by the driver
};

}  // namespace cumempool::backup
