// What programs read of an allocator beside its transitions: statistics, backups of sleeping
// memory, and handles for other processes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cumempool/cumempool.h"
#include "pool/allocator.hpp"

namespace cumempool::pool {

// ---- statistics ---------------------------------------------------------------------------------

struct Snapshot {
  cumempool_totals totals{};
  std::vector<cumempool_tag_stats> tags;  // names live as long as the process
  std::vector<cumempool_allocation_info> allocations;
  std::string last_malloc_failure;
};

// What is known of a record; under the records' lock, or by who has claimed it.
cumempool_allocation_info describe(const Record& record);

Snapshot take_snapshot(Allocator& allocator, bool allocations);

// What is known of the live allocation that holds `address`. Throws Error (CUMEMPOOL_NOT_OWNED)
// where there is none, or where `allocator` is not null and it belongs to another.
cumempool_allocation_info find_allocation(const Allocator* allocator, cumempool_address address);

// ---- backups ------------------------------------------------------------------------------------

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

// ---- handles ------------------------------------------------------------------------------------

// Writes the exported handle of the awake allocation that holds `address`, and tells which that is.
// Throws Error: CUMEMPOOL_NOT_OWNED, CUMEMPOOL_INVALID_ARGUMENT where it sleeps,
// CUMEMPOOL_UNSUPPORTED for ordinary memory and for handle types that the memory was not made for.
cumempool_allocation_info export_memory(Allocator& allocator, cumempool_address address,
                                        std::uint32_t handle_type, void* exported);

}  // namespace cumempool::pool
