// Limits on host memory for backups: the room that the kernel leaves to the process, and the budget
// of an allocator for pinned memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <mutex>
#include <string>

#include "driver/error.hpp"

namespace cumempool::backup {

// The memory that the process may still take before the kernel ends it: the least of what the
// machine and each control group, from that of the process up to the root, have left.
struct HostRoom {
  static constexpr std::uint64_t kUnknown = std::numeric_limits<std::uint64_t>::max();

  std::uint64_t bytes = kUnknown;  // under the tightest limit
  std::uint64_t limit = 0;         // the tightest limit itself
  std::string source;              // the file of that limit; "" if none could be read

  // The bytes that a backup may take. The rest stays for page tables, for the driver's own records
  // of pinned memory, and for other threads and processes.
  std::uint64_t for_backups() const noexcept;
  // Returns the error for a lack of `needed` bytes: CUMEMPOOL_OUT_OF_HOST_MEMORY.
  Error refusal(std::uint64_t needed) const;
};

// Reads the room of the calling process. Page cache counts as room, since the kernel drops it
// first; swap does not, since pinned memory cannot go there. Reads some ten files, so call it
// rarely.
HostRoom host_room();
// Does the same with all files below another root, for tests.
HostRoom host_room(const std::string& root);
// Sets the root that host_room() reads below; "" is the root of the system. For tests.
void set_host_root(const std::string& root);

// The pinned host memory that the arenas of one allocator may hold together. Thread-safe.
class HostBudget {
 public:
  // A `limit` of 0 is no limit.
  explicit HostBudget(std::uint64_t limit) : limit_(limit) {}

  std::uint64_t limit() const noexcept { return limit_; }
  std::uint64_t claimed() const;
  // Bytes that can still be claimed; UINT64_MAX if there is no limit.
  std::uint64_t room() const;

  // Claims `bytes`; returns false, with no effect, if the room is too small.
  bool claim(std::size_t bytes);
  void unclaim(std::size_t bytes) noexcept;

  // The driver refuses to pin more: there is no room until allow().
  void refuse() noexcept;
  void allow() noexcept;

  // Returns the error for a lack of `bytes`: CUMEMPOOL_OUT_OF_HOST_MEMORY.
  Error refusal(std::uint64_t bytes) const;

 private:
  std::uint64_t room_locked() const;

  const std::uint64_t limit_;
  mutable std::mutex mutex_;
  std::uint64_t claimed_ = 0;
  bool refused_ = false;  // by the driver
};

}  // namespace cumempool::backup
