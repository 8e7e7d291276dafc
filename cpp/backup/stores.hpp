// Everything that one allocator keeps backups in: arenas of host memory, by NUMA node, files, by
// directory, and memory of other devices.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "backup/file_storage.hpp"
#include "backup/host_arena.hpp"
#include "backup/host_limits.hpp"
#include "backup/peer_storage.hpp"
#include "driver/driver.hpp"

namespace cumempool::backup {

// Thread-safe; what it hands out lives as long as it.
class Stores {
 public:
  // `pinned_limit` bytes of pinned memory are held at the most; 0 = no limit.
  Stores(driver::Driver driver, std::uint64_t pinned_limit);
  ~Stores() = default;
  Stores(const Stores&) = delete;
  Stores& operator=(const Stores&) = delete;

  HostArena& arena(Residence residence, int numa_node);
  // Makes the file at first use. Throws Error (CUMEMPOOL_BACKUP_FAILED).
  BackupFile& file(const std::string& directory);
  PeerMemory& peers() noexcept { return peers_; }
  const PeerMemory& peers() const noexcept { return peers_; }

  // The arenas made so far.
  std::vector<HostArena*> arenas() const;
  const HostBudget& pinned_budget() const noexcept { return pinned_; }
  // The driver pins no more than what is held: no arena asks for more until trim() was called.
  void refuse_pinned() noexcept { pinned_.refuse(); }
  std::uint64_t pinned_bytes() const;
  std::uint64_t pinned_used_bytes() const;
  std::uint64_t pageable_bytes() const;
  std::uint64_t file_bytes() const;

  // Gives back the blocks of all arenas that hold nothing, and closes files that do; returns the
  // bytes of memory. Inside a ContextScope of `device`, for the transition under way.
  std::uint64_t trim(int device);

 private:
  using ArenaKey = std::pair<Residence, int>;

  std::uint64_t sum(Residence residence,
                    const std::function<std::uint64_t(const HostArena&)>& bytes) const;

  driver::Driver driver_;
  HostBudget pinned_;
  HostBudget pageable_;
  PeerMemory peers_;
  mutable std::mutex mutex_;  // guards the maps
  std::map<ArenaKey, std::unique_ptr<HostArena>> arenas_;
  std::map<std::string, std::unique_ptr<BackupFile>> files_;
};

}  // namespace cumempool::backup
