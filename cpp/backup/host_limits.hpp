// Limits on host memory for backups: what the kernel leaves to the process, and what one allocator
// may pin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <mutex>
#include <string>

#include "driver/error.hpp"

namespace cumempool::backup {

// How much more the process may take before the kernel ends it: what the machine has left, and what
// each control group from its own up to the root leaves of that.
struct HostRoom {
  static constexpr std::uint64_t kUnknown = std::numeric_limits<std::uint64_t>::max();

  std::uint64_t bytes = kUnknown;  // under the limit that leaves the least
  std::uint64_t limit = 0;         // of that one
  std::string source;              // its file; "" where none could be read

  // Bytes that a backup may take of it: some stay for page tables, for what the driver notes of
  // pinned memory, and for what other threads and processes take meanwhile.
  std::uint64_t for_backups() const noexcept;
  // Why there is no room for so many more: CUMEMPOOL_OUT_OF_HOST_MEMORY.
  Error refusal(std::uint64_t needed) const;
};

// Of the calling process. Page cache counts as room, for the kernel drops it first; swap does not,
// since pinned memory cannot go there. Reads some ten files: not for every call.
HostRoom host_room();
// The same with all files below another root, for tests.
HostRoom host_room(const std::string& root);
// What host_room() reads below from now on; "" is the system's own. For tests.
void set_host_root(const std::string& root);

// The most pinned host memory that the arenas of one allocator may hold between them. Thread-safe.
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
