// The interface of backup storage: pinned, pageable, file and peer. A position counts the bytes of
// a backup, which are packed without gaps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "backup/bounce_buffers.hpp"
#include "backup/copy_queue.hpp"
#include "cumempool/cumempool.h"
#include "driver/driver.hpp"

namespace cumempool::backup {

// The largest slice. Contents are compared and checked slice by slice.
constexpr std::size_t kSliceBytes = std::size_t{1} << 20;

// Moves bytes between one device and backup storage: a stream, and bounce buffers for storage that
// the stream cannot reach.
struct Transfer {
  Transfer(driver::Driver driver, int device, unsigned threads = BounceBuffers::kThreads)
      : queue(driver, device), bounce_buffers(driver, queue, threads) {}

  CopyQueue queue;
  BounceBuffers bounce_buffers;
};

// Whether copies of a tier go through bounce buffers.
inline bool uses_bounce_buffers(cumempool_backup_tier tier) noexcept {
  return tier == CUMEMPOOL_BACKUP_PAGEABLE || tier == CUMEMPOOL_BACKUP_FILE;
}

// Not thread-safe. Calls that take a Transfer run inside a ContextScope of its device.
class BackupStorage {
 public:
  BackupStorage() = default;
  virtual ~BackupStorage() = default;
  BackupStorage(const BackupStorage&) = delete;
  BackupStorage& operator=(const BackupStorage&) = delete;

  virtual cumempool_backup_tier tier() const noexcept = 0;

  // Starts a copy of device memory into the backup at `position`, which is at most the number of
  // bytes saved so far. The storage grows by the bytes past those. Each call begins at the start of
  // a slice. Throws Error. The copy is done once the caller has waited for the queue and the bounce
  // buffers of the transfer. Until then both sides must stay, even if the call has thrown, and the
  // same bytes must not be saved again.
  virtual void save(Transfer& transfer, std::size_t position, cumempool_address source,
                    std::size_t bytes) = 0;

  // Starts the copy back. The storage does not change. Throws Error.
  virtual void load(Transfer& transfer, std::size_t position, cumempool_address destination,
                    std::size_t bytes) = 0;

  // Returns `bytes` of the backup at `position` as one range of host memory, or null if there is no
  // such range. The bytes stay there as long as both the storage and the view live. If `writable`,
  // they may change from now on.
  using View = std::shared_ptr<std::byte>;
  virtual View view(std::size_t position, std::size_t bytes, bool writable) = 0;
  // Releases what the storage has kept for earlier views; only the last view is still open.
  virtual void settle_views() noexcept {}
};

}  // namespace cumempool::backup
