// A backup in host memory of an arena: pinned, where copy engines reach it, or pageable, where
// threads bring it.
#pragma once

#include <cstddef>
#include <vector>

#include "backup/backup_storage.hpp"
#include "backup/host_arena.hpp"

namespace cumempool::backup {

class HostStorage : public BackupStorage {
 public:
  // Takes room as it is saved. `tier` is PINNED or PAGEABLE, as the arena.
  HostStorage(HostArena& arena, cumempool_backup_tier tier, int device);
  ~HostStorage() override;
  HostStorage(const HostStorage&) = delete;
  HostStorage& operator=(const HostStorage&) = delete;

  cumempool_backup_tier tier() const noexcept override { return tier_; }
  void save(Transfer& transfer, std::size_t position, cumempool_address source,
            std::size_t bytes) override;
  void load(Transfer& transfer, std::size_t position, cumempool_address destination,
            std::size_t bytes) override;
  // Moves the backup into one span where the bytes are in several, or are to be written and others
  // are. A program may copy the bytes in one call. Inside a ContextScope of the device.
  View view(std::size_t position, std::size_t bytes, bool writable) override;
  void settle_views() noexcept override;

 private:
  struct Part {
    std::size_t position = 0;
    HostSpan span;
  };

  template <typename Visit>
  void for_each_run(std::size_t position, std::size_t bytes, Visit visit) const;
  std::vector<Part>::const_iterator part_at(std::size_t position) const;
  void grow(std::size_t most);
  void gather();

  HostArena& arena_;
  const cumempool_backup_tier tier_;
  const int device_;
  std::vector<Part> parts_;  // in order, without gaps
  std::size_t bytes_ = 0;
  std::vector<HostSpan> left_behind_;  // by gather(); views may still be on them
};

}  // namespace cumempool::backup
