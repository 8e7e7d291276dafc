// The stores of one allocator's backups.
#include "backup/stores.hpp"

#include <iterator>

namespace cumempool::backup {

Stores::Stores(driver::Driver driver, std::uint64_t pinned_limit)
    : driver_(driver), pinned_(pinned_limit), pageable_(0), peers_(driver) {}

HostArena& Stores::arena(cumempool_backup_tier tier, int numa_node) {
  const std::lock_guard lock(mutex_);
  std::unique_ptr<HostArena>& arena = arenas_[{tier, numa_node}];
  if (arena == nullptr) {
    HostBudget& budget = tier == CUMEMPOOL_BACKUP_PINNED ? pinned_ : pageable_;
    arena = std::make_unique<HostArena>(driver_, tier, numa_node, budget);
  }
  return *arena;
}

BackupFile& Stores::file(const std::string& directory) {
  const std::lock_guard lock(mutex_);
  const auto found = files_.find(directory);
  if (found != files_.end()) return *found->second;
  return *files_.emplace(directory, std::make_unique<BackupFile>(directory)).first->second;
}

std::uint64_t Stores::sum(cumempool_backup_tier tier,
                          const std::function<std::uint64_t(const HostArena&)>& bytes) const {
  const std::lock_guard lock(mutex_);
  std::uint64_t total = 0;
  for (const auto& [key, arena] : arenas_) {
    if (key.first == tier && arena != nullptr) total += bytes(*arena);
  }
  return total;
}

std::uint64_t Stores::pinned_bytes() const {
  return sum(CUMEMPOOL_BACKUP_PINNED, [](const HostArena& arena) { return arena.held_bytes(); });
}

std::uint64_t Stores::pinned_used_bytes() const {
  return sum(CUMEMPOOL_BACKUP_PINNED, [](const HostArena& arena) { return arena.used_bytes(); });
}

std::uint64_t Stores::pageable_bytes() const {
  return sum(CUMEMPOOL_BACKUP_PAGEABLE, [](const HostArena& arena) { return arena.held_bytes(); });
}

std::uint64_t Stores::file_bytes() const {
  const std::lock_guard lock(mutex_);
  std::uint64_t total = 0;
  for (const auto& entry : files_) total += entry.second->held_bytes();
  return total;
}

std::vector<HostArena*> Stores::arenas() const {
  const std::lock_guard lock(mutex_);
  std::vector<HostArena*> all;
  all.reserve(arenas_.size());
  for (const auto& entry : arenas_) {
    if (entry.second != nullptr) all.push_back(entry.second.get());
  }
  return all;
}

std::uint64_t Stores::trim(int device) {
  {
    const std::lock_guard lock(mutex_);
    for (auto file = files_.begin(); file != files_.end();) {
      file = file->second->held_bytes() == 0 ? files_.erase(file) : std::next(file);
    }
  }
  pinned_.allow();
  std::uint64_t bytes = 0;
  for (HostArena* arena : arenas()) bytes += arena->trim(device);
  return bytes;
}

}  // namespace cumempool::backup
