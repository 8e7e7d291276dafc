// The most pinned host memory that the arenas of one allocator may hold between them.
#include "backup/host_budget.hpp"

#include <algorithm>
#include <limits>

namespace cumempool::backup {

std::uint64_t HostBudget::room_locked() const {
  if (refused_) return 0;
  if (limit_ == 0) return std::numeric_limits<std::uint64_t>::max();
  return limit_ - std::min(limit_, claimed_);
}

std::uint64_t HostBudget::claimed() const {
  const std::lock_guard lock(mutex_);
  return claimed_;
}

std::uint64_t HostBudget::room() const {
  const std::lock_guard lock(mutex_);
  return room_locked();
}

bool HostBudget::claim(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  if (bytes > room_locked()) return false;
  claimed_ += bytes;
  return true;
}

void HostBudget::unclaim(std::size_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  claimed_ -= bytes;
}

void HostBudget::refuse() noexcept {
  const std::lock_guard lock(mutex_);
  refused_ = true;
}

void HostBudget::allow() noexcept {
  const std::lock_guard lock(mutex_);
  refused_ = false;
}

Error HostBudget::refusal(std::uint64_t bytes) const {
  const bool by_driver = [this] {
    const std::lock_guard lock(mutex_);
    return refused_;
  }();
  if (by_driver) {
    Error error(
        CUMEMPOOL_OUT_OF_HOST_MEMORY,
        "the backup needs " + format_bytes(bytes) +
            " more of pinned host memory, and the driver has refused to pin more than the " +
            format_bytes(claimed()) + " that are held");
    error.bytes = bytes;
    error.advice =
        "raise the limit on locked memory (ulimit -l) and call release_host_memory(), or give "
        "host_backup_overflow more room";
    return error;
  }
  Error error(CUMEMPOOL_OUT_OF_HOST_MEMORY,
              "the backup needs " + format_bytes(bytes) + " more of pinned host memory, " +
                  format_bytes(claimed()) + " are held and the limit is " + format_bytes(limit()));
  error.bytes = bytes;
  error.advice =
      "raise host_backup_limit, set host_backup_overflow, or discard tags instead of backing them "
      "up";
  return error;
}

}  // namespace cumempool::backup
