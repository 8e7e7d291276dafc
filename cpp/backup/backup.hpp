// The backup of one allocation: which bytes it holds, where they are, and digests that tell whether
// the allocation has changed since.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "backup/backup_storage.hpp"
#include "backup/interval_set.hpp"

namespace cumempool::backup {

// At most kSliceBytes of one extent: the unit of comparing and copying.
struct Slice {
  std::size_t offset;    // in the allocation
  std::size_t position;  // in the backup
  std::size_t bytes;
};

// Not thread-safe. Calls that take a Transfer run inside a ContextScope of its device.
class Backup {
 public:
  // Makes an empty backup of `extents`: offsets from the start of the allocation, in ascending
  // order.
  Backup(std::vector<Extent> extents, std::unique_ptr<BackupStorage> storage);

  const std::vector<Extent>& extents() const noexcept { return extents_; }
  const std::vector<Slice>& slices() const noexcept { return slices_; }
  std::uint64_t bytes() const noexcept { return bytes_; }
  cumempool_backup_tier tier() const noexcept { return storage_->tier(); }

  // Starts to copy the allocation at `address` into the backup, which holds the contents once the
  // caller has waited for the transfer. The backup must live until then, even if this throws Error.
  void save(Transfer& transfer, cumempool_address address);
  // Does the same for the slices whose digest differs from that of the backup; returns their bytes.
  std::uint64_t save_changes(Transfer& transfer, cumempool_address address,
                             const cumempool_digest* digests);

  // Starts the copies back. The backup does not change.
  void restore(Transfer& transfer, cumempool_address address);
  // Enqueues zeros for the bytes of an allocation of `bytes` that the backup does not hold; returns
  // their number.
  std::size_t zero_rest(CopyQueue& queue, cumempool_address address, std::size_t bytes) const;

  // The digests of the slices, in order; empty if they are not known.
  const std::vector<cumempool_digest>& digests() const noexcept { return digests_; }
  void set_digests(std::vector<cumempool_digest> digests) {
    digests_ = std::move(digests);
    forgotten_.clear();
  }
  // Whether the digest of a slice is another one, or was forgotten. Needs known digests.
  bool differs(std::size_t slice, const cumempool_digest& digest) const {
    const cumempool_digest& known = digests_[slice];
    return (!forgotten_.empty() && forgotten_[slice]) || known.low != digest.low ||
           known.high != digest.high;
  }
  // The slices that differ; save_changes() copies them.
  std::vector<std::size_t> changed(const cumempool_digest* digests) const;
  // Forgets a digest that may not match the bytes of its slice.
  void forget_digest(std::size_t slice) {
    forgotten_.resize(slices_.size());
    forgotten_[slice] = true;
  }

  // Returns `bytes` of the allocation from `offset` on as host memory; null if the tier is not in
  // host memory or the backup does not hold all of them. If `writable`, forgets the digests, since
  // they do not cover writes through the view.
  BackupStorage::View view(std::size_t offset, std::size_t bytes, bool writable);
  // See BackupStorage::settle_views().
  void settle_views() noexcept { storage_->settle_views(); }
  // Whether a program may be writing to the backup. Then it cannot be compared with awake memory.
  bool lent_for_writing() const noexcept { return lent_for_writing_; }

  // Links the list of leaked backups. Entering the list takes no memory, so it cannot fail.
  std::shared_ptr<Backup> next;
  int leaked_by = -1;  // the device whose copies may still use the backup

 private:
  const std::vector<Extent> extents_;
  std::vector<Slice> slices_;
  std::uint64_t bytes_ = 0;
  std::vector<cumempool_digest> digests_;
  std::vector<bool> forgotten_;  // of the digests; empty: none
  std::unique_ptr<BackupStorage> storage_;
  bool lent_for_writing_ = false;
};

}  // namespace cumempool::backup
