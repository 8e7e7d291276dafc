// The stores of one allocator's backups: arenas of host memory by NUMA node, files by directory,
// and memory of peers.
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

// Thread-safe. Arenas live as long as the object, files until a trim() finds them empty.
class Stores {
 public:
  // The arenas hold at most `pinned_limit` bytes of pinned memory; 0 is no limit.
  Stores(driver::Driver driver, std::uint64_t pinned_limit);
  ~Stores() = default;
  Stores(const Stores&) = delete;
  Stores& operator=(const Stores&) = delete;

  // Both make their store at first use. `tier` is PINNED or PAGEABLE; file() throws Error
  // (CUMEMPOOL_BACKUP_FAILED).
  HostArena& arena(cumempool_backup_tier tier, int numa_node);
  BackupFile& file(const std::string& directory);
  PeerMemory& peers() noexcept { return peers_; }
  const PeerMemory& peers() const noexcept { return peers_; }

  // The arenas made so far.
  std::vector<HostArena*> arenas() const;
  const HostBudget& pinned_budget() const noexcept { return pinned_; }
  // The driver refuses to pin more: no arena asks for more until trim().
  void refuse_pinned() noexcept { pinned_.refuse(); }
  std::uint64_t pinned_bytes() const;
  std::uint64_t pinned_used_bytes() const;
  std::uint64_t pageable_bytes() const;
  std::uint64_t file_bytes() const;

  // Gives back the empty blocks of all arenas and closes empty files; returns the bytes of memory.
  // Runs inside a ContextScope of `device`, for the transition under way.
  std::uint64_t trim(int device);

 private:
  using ArenaKey = std::pair<cumempool_backup_tier, int>;  // and the NUMA node

  std::uint64_t sum(cumempool_backup_tier tier,
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
