// The contents of one allocation, kept outside of it: which bytes, where they are, and digests that
// tell whether the allocation has changed since.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "backup/backup_storage.hpp"

namespace cumempool::backup {

// Bytes of an allocation, counted from its start.
struct Extent {
  std::size_t offset;
  std::size_t bytes;
};

inline bool operator==(const Extent& left, const Extent& right) {
  return left.offset == right.offset && left.bytes == right.bytes;
}

// At most kSliceBytes of one extent: what is compared, and copied, as a whole.
struct Slice {
  std::size_t offset;    // in the allocation
  std::size_t position;  // in the backup
  std::size_t bytes;
};

// One thread at a time. Calls that take a Transfer are made inside a ContextScope of its device.
class Backup {
 public:
  // Of `extents`, in order of their offset. Nothing is saved yet.
  Backup(std::vector<Extent> extents, std::unique_ptr<BackupStorage> storage);

  const std::vector<Extent>& extents() const noexcept { return extents_; }
  const std::vector<Slice>& slices() const noexcept { return slices_; }
  std::uint64_t bytes() const noexcept { return bytes_; }
  cumempool_backup_tier tier() const noexcept { return storage_->tier(); }

  // Starts the copies of the allocation at `address`. The backup holds the contents once the
  // transfer was waited for, and must not be destroyed before that, whether it threw Error or not.
  void save(Transfer& transfer, cumempool_address address);
  // The same for the slices whose digest is not the one the backup has; returns their bytes.
  std::uint64_t save_changes(Transfer& transfer, cumempool_address address,
                             const cumempool_digest* digests);

  // Starts the copies back. The backup stays as it is.
  void restore(Transfer& transfer, cumempool_address address);
  // Enqueues zeros for what it does not hold of an allocation of `bytes`; returns how many.
  std::size_t zero_rest(CopyQueue& queue, cumempool_address address, std::size_t bytes) const;

  // The digests of its slices, in order; empty where they are not known.
  const std::vector<cumempool_digest>& digests() const noexcept { return digests_; }
  void set_digests(std::vector<cumempool_digest> digests) {
    digests_ = std::move(digests);
    forgotten_.clear();
  }
  // Whether a slice has another digest, or one that was forgotten. Only where digests are known.
  bool differs(std::size_t slice, const cumempool_digest& digest) const {
    const cumempool_digest& known = digests_[slice];
    return (!forgotten_.empty() && forgotten_[slice]) || known.low != digest.low ||
           known.high != digest.high;
  }
  // The slices that differ, which save_changes() copies.
  std::vector<std::size_t> changed(const cumempool_digest* digests) const;
  // The slice may hold other bytes than its digest is of.
  void forget_digest(std::size_t slice) {
    forgotten_.resize(slices_.size());
    forgotten_[slice] = true;
  }

  // `bytes` of the allocation from `offset` on as host memory; null where its tier has none there,
  // or they are not all in the backup. With `writable` the digests are forgotten, since what is
  // written through the view is not in them.
  BackupStorage::View view(std::size_t offset, std::size_t bytes, bool writable);
  // See BackupStorage::settle_views().
  void settle_views() noexcept { storage_->settle_views(); }
  // Whether somebody may be writing to it: then it says nothing about memory that is awake.
  bool lent_for_writing() const noexcept { return lent_for_writing_; }

  // The link of a list of backups that must stay; takes no memory, so that it cannot fail.
  std::shared_ptr<Backup> next;
  int leaked_by = -1;  // the device whose copies keep it there

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
