// The most pinned host memory that the arenas of one allocator may hold between them.
#include "backup/host_budget.hpp"

#include <algorithm>
#include <limits>

namespace cumempool::backup {

std::uint64_t HostBudget::room_locked() const {
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

std::size_t HostBudget::claim(std::size_t wanted, std::size_t least) {
  const std::lock_guard lock(mutex_);
  const std::uint64_t room = room_locked();
  const std::size_t bytes = wanted <= room ? wanted : least <= room ? least : 0;
  claimed_ += bytes;
  return bytes;
}

void HostBudget::unclaim(std::size_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  claimed_ -= bytes;
}

}  // namespace cumempool::backup
