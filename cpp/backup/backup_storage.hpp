// Where the bytes of one backup are: the interface of pinned, pageable, file and peer storage.
// Positions count the backup's bytes, packed without gaps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "backup/bounce_buffers.hpp"
#include "backup/copy_queue.hpp"
#include "cumempool/cumempool.h"
#include "driver/driver.hpp"

namespace cumempool::backup {

// Contents are compared, and checked, in slices of at most this many bytes.
constexpr std::size_t kSliceBytes = std::size_t{1} << 20;

// What moves bytes between one device and the storages of backups: a stream, and buffers for what a
// stream cannot reach.
struct Transfer {
  Transfer(driver::Driver driver, int device, unsigned threads = BounceBuffers::kThreads)
      : queue(driver, device), staged(driver, queue, threads) {}

  CopyQueue queue;
  BounceBuffers staged;
};

// One thread at a time. Calls that take a Transfer are made inside a ContextScope of its device.
class BackupStorage {
 public:
  BackupStorage() = default;
  virtual ~BackupStorage() = default;
  BackupStorage(const BackupStorage&) = delete;
  BackupStorage& operator=(const BackupStorage&) = delete;

  virtual cumempool_backup_tier tier() const noexcept = 0;

  // Starts the copy of device memory into the backup at `position`, which is at most the bytes
  // saved so far; bytes past those make the storage grow. Each call begins at the start of a slice.
  // Throws Error. The bytes are there once the transfer's queue and bounce buffers have been waited
  // for, and neither side may go before that, whether it threw or not; nor may the same bytes be
  // saved again.
  virtual void save(Transfer& transfer, std::size_t position, cumempool_address source,
                    std::size_t bytes) = 0;

  // Starts the copy back. The storage stays as it is. Throws Error.
  virtual void load(Transfer& transfer, std::size_t position, cumempool_address destination,
                    std::size_t bytes) = 0;

  // The backup at `position` as host memory, `bytes` of it in one piece, or null where it is not
  // so. The bytes stay there as long as the storage and the view; with `writable` they may change
  // from now on.
  using View = std::shared_ptr<std::byte>;
  virtual View view(std::size_t position, std::size_t bytes, bool writable) = 0;
  // No view but the last one is there any more: what it kept for others may go.
  virtual void settle_views() noexcept {}
};

}  // namespace cumempool::backup
