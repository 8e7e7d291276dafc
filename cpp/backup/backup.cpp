// The backup of one allocation.
#include "backup/backup.hpp"

#include <algorithm>
#include <utility>

namespace cumempool::backup {
namespace {

std::vector<Slice> slices_of(const std::vector<Extent>& extents) {
  std::vector<Slice> slices;
  std::size_t position = 0;
  for (const Extent& extent : extents) {
    for (std::size_t at = 0; at < extent.bytes; at += kSliceBytes) {
      const std::size_t bytes = std::min(kSliceBytes, extent.bytes - at);
      slices.push_back({extent.offset + at, position, bytes});
      position += bytes;
    }
  }
  return slices;
}

}  // namespace

Backup::Backup(std::vector<Extent> extents, std::unique_ptr<BackupStorage> storage)
    : extents_(std::move(extents)), slices_(slices_of(extents_)), storage_(std::move(storage)) {
  for (const Extent& extent : extents_) bytes_ += extent.bytes;
}

void Backup::save(Transfer& transfer, cumempool_address address) {
  std::size_t position = 0;
  for (const Extent& extent : extents_) {
    storage_->save(transfer, position, address + extent.offset, extent.bytes);
    position += extent.bytes;
  }
}

std::uint64_t Backup::save_changes(Transfer& transfer, cumempool_address address,
                                   const cumempool_digest* digests) {
  std::uint64_t copied = 0;
  for (std::size_t first = 0; first < slices_.size();) {
    if (!differs(first, digests[first])) {
      ++first;
      continue;
    }
    // One copy takes all neighbours that have changed.
    std::size_t bytes = slices_[first].bytes;
    std::size_t last = first + 1;
    while (last < slices_.size() && differs(last, digests[last]) &&
           slices_[last].offset == slices_[first].offset + bytes) {
      bytes += slices_[last++].bytes;
    }
    storage_->save(transfer, slices_[first].position, address + slices_[first].offset, bytes);
    copied += bytes;
    first = last;
  }
  return copied;
}

std::vector<std::size_t> Backup::changed(const cumempool_digest* digests) const {
  std::vector<std::size_t> changed;
  for (std::size_t slice = 0; slice < slices_.size(); ++slice) {
    if (differs(slice, digests[slice])) changed.push_back(slice);
  }
  return changed;
}

void Backup::restore(Transfer& transfer, cumempool_address address) {
  std::size_t position = 0;
  for (const Extent& extent : extents_) {
    storage_->load(transfer, position, address + extent.offset, extent.bytes);
    position += extent.bytes;
  }
}

std::size_t Backup::zero_rest(CopyQueue& queue, cumempool_address address,
                              std::size_t bytes) const {
  std::size_t at = 0;
  for (const Extent& extent : extents_) {
    if (extent.offset > at) queue.fill_zero(address + at, extent.offset - at);
    at = extent.offset + extent.bytes;
  }
  if (bytes > at) queue.fill_zero(address + at, bytes - at);
  return bytes - static_cast<std::size_t>(bytes_);
}

BackupStorage::View Backup::view(std::size_t offset, std::size_t bytes, bool writable) {
  std::size_t position = 0;
  for (const Extent& extent : extents_) {
    const bool inside = offset >= extent.offset && bytes <= extent.bytes &&
                        offset - extent.offset <= extent.bytes - bytes;
    if (inside) {
      BackupStorage::View data = storage_->view(position + offset - extent.offset, bytes, writable);
      if (data != nullptr && writable) {
        lent_for_writing_ = true;
        digests_.clear();
      }
      return data;
    }
    position += extent.bytes;
  }
  return nullptr;
}

}  // namespace cumempool::backup
