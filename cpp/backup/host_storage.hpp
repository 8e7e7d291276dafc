// Backup storage in host memory of an arena. Copy engines reach pinned memory; pageable memory goes
// through bounce buffers.
#pragma once

#include <cstddef>
#include <vector>

#include "backup/backup_storage.hpp"
#include "backup/host_arena.hpp"

namespace cumempool::backup {

class HostStorage : public BackupStorage {
 public:
  // Takes memory of the arena only when save() needs it.
  HostStorage(HostArena& arena, int device);
  ~HostStorage() override;
  HostStorage(const HostStorage&) = delete;
  HostStorage& operator=(const HostStorage&) = delete;

  cumempool_backup_tier tier() const noexcept override { return arena_.tier(); }
  void save(Transfer& transfer, std::size_t position, cumempool_address source,
            std::size_t bytes) override;
  void load(Transfer& transfer, std::size_t position, cumempool_address destination,
            std::size_t bytes) override;
  // Moves the backup into one span if the bytes are in several, or if the view is writable and the
  // backup is in several. A program may copy the bytes in one call. Runs inside a ContextScope of
  // the device.
  View view(std::size_t position, std::size_t bytes, bool writable) override;
  void settle_views() noexcept override;

 private:
  // A span, and its position in the backup.
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
  const int device_;
  std::vector<Part> parts_;  // in order, without gaps
  std::size_t bytes_ = 0;
  std::vector<HostSpan> replaced_;  // by gather(); views may still show them
};

}  // namespace cumempool::backup
