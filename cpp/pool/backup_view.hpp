// A look at the backup of sleeping memory, without a copy.
#pragma once

#include <cstddef>
#include <memory>

#include "pool/allocator.hpp"

namespace cumempool::pool {

// Keeps the host memory, or the file, that it shows.
class BackupView {
 public:
  // Throws Error: CUMEMPOOL_NOT_OWNED, CUMEMPOOL_INVALID_ARGUMENT where the memory is awake or the
  // bytes are not in its backup, CUMEMPOOL_UNSUPPORTED where the backup is not in host memory.
  BackupView(std::shared_ptr<Allocator> allocator, cumempool_address address, std::size_t bytes,
             bool writable);
  ~BackupView();
  BackupView(const BackupView&) = delete;
  BackupView& operator=(const BackupView&) = delete;

  std::byte* data() const noexcept { return data_.get(); }

 private:
  std::shared_ptr<Allocator> allocator_;
  std::shared_ptr<backup::Backup> image_;
  backup::BackupStorage::View data_;
};

}  // namespace cumempool::pool
