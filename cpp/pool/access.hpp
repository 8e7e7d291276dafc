// Read access to an allocator: statistics, backups of sleeping memory, and handles for other
// processes.
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

// Describes a record. Runs under the records' lock, or in the operation that has claimed the
// record.
cumempool_allocation_info describe(const Record& record);

Snapshot take_snapshot(Allocator& allocator, bool allocations);

// Describes the live allocation that contains `address`. Throws Error (CUMEMPOOL_NOT_OWNED) if
// there is none, or if `allocator` is not null and it belongs to another one.
cumempool_allocation_info find_allocation(const Allocator* allocator, cumempool_address address);

// ---- backups ------------------------------------------------------------------------------------

// A view of a backup. It keeps the host memory, or the file, that it shows.
class BackupView {
 public:
  // Throws Error: CUMEMPOOL_NOT_OWNED; CUMEMPOOL_INVALID_ARGUMENT if the memory is awake or the
  // backup does not hold all bytes; CUMEMPOOL_UNSUPPORTED if the backup is not in host memory.
  BackupView(std::shared_ptr<Allocator> allocator, cumempool_address address, std::size_t bytes,
             bool writable);
  ~BackupView();
  BackupView(const BackupView&) = delete;
  BackupView& operator=(const BackupView&) = delete;

  std::byte* data() const noexcept { return data_.get(); }

 private:
  std::shared_ptr<Allocator> allocator_;
  std::shared_ptr<backup::Backup> backup_;
  backup::BackupStorage::View data_;
};

// ---- handles ------------------------------------------------------------------------------------

// Exports the handle of the awake allocation that contains `address`, and describes the allocation.
// Throws Error: CUMEMPOOL_NOT_OWNED; CUMEMPOOL_INVALID_ARGUMENT if it is asleep;
// CUMEMPOOL_UNSUPPORTED for memory of cudaMalloc and for handle types that the memory was not made
// for.
cumempool_allocation_info export_memory(Allocator& allocator, cumempool_address address,
                                        std::uint32_t handle_type, void* exported);

}  // namespace cumempool::pool
