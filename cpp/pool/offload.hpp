// The offload of allocations: which bytes are copied where, the copies, the release of device
// memory behind them, and the way back after a failure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "cumempool/cumempool.h"
#include "pool/allocator.hpp"
#include "pool/backup_plan.hpp"
#include "pool/transfer.hpp"

namespace cumempool::pool {

struct SleepRequest {
  std::map<const Tag*, cumempool_on_sleep> actions;  // OFFLOAD or DISCARD
  bool drop_backups = false;
  std::vector<cumempool_extent> dead;
  std::uint64_t dead_as_of = 0;  // the moment before the list was made; 0: it is known to hold
  std::vector<cumempool_device_stream> streams;
};

// Throw Error if a record cannot sleep: CUMEMPOOL_IN_USE if its tag is pinned,
// CUMEMPOOL_UNSUPPORTED if its memory is of cudaMalloc.
void refuse_pinned(Allocator& allocator, const char* operation, const Record& record);
void refuse_cuda_malloc(const char* operation, const Record& record);

// The steps of one sleep or swap, in the order of the calls. Until finish() has returned, undo()
// takes all of them back.
class Offload {
 public:
  Offload(Allocator& allocator, const char* operation, const SleepRequest& request, Report& report);

  // Runs before the claim, under the lock of the records. Throws Error (CUMEMPOOL_IN_USE) if a
  // scope of one of the tags is open. A later scope gets none of the claimed memory.
  void admit();
  // Whether the request concerns a record.
  bool wants(const Record& record) const;
  // Takes the claimed records, and finds what to copy and where. If it throws Error, nothing has
  // changed.
  void plan(const std::vector<RecordPointer>& claimed);
  // Device memory to release, and released so far.
  std::uint64_t bytes_on(int device) const;
  std::uint64_t released_on(int device) const;
  // Waits for work in flight.
  void fence();

  // Enqueues all copies, and takes the room for them in host memory, files or peers. Returns after
  // the threads of the bounce buffers have written their part.
  void start_copies();
  // Waits for the copies of the next allocation of a device and releases its memory; false if none
  // is left. Discarded allocations come last, and only if `with_discarded`.
  bool release_next(int device, bool with_discarded);
  // Releases the remaining copied allocations, and detaches the remaining discarded ones.
  void finish();
  // The point of no return: changes the states and releases the rest. Memory that the driver
  // refuses to take back is leaked and reported.
  void commit() noexcept;

  // Restores everything. Allocations whose discarded contents are released already stay asleep, and
  // `failure` says so.
  void undo(Error& failure) noexcept;

 private:
  enum class Stage { kAwake, kDetached, kReleased };

  // One allocation. The record gets `backup` when all allocations have succeeded.
  struct Entry {
    RecordPointer record;
    std::vector<backup::Extent> live;        // empty if it is discarded
    std::shared_ptr<backup::Backup> backup;  // null if it is discarded
    BackupChoice choice;
    bool fresh = true;  // the backup is new; else retained since the last sleep
    std::uint64_t clean_bytes = 0;
    std::vector<std::size_t> copied;  // slices of the backup to digest once more
    Stage stage = Stage::kAwake;
  };

  bool discards(const Record& record) const;
  bool forgettable(const Record& record) const;

  void choose_backups();
  void plan_room();
  void make_room();
  void start_digests(DeviceTransfer& transfer);
  void copy(DeviceTransfer& transfer, std::size_t position);
  void recheck(DeviceTransfer& transfer, std::size_t position);
  void finish_copies(DeviceTransfer& transfer);
  void keep_digests(DeviceTransfer& transfer);
  void verify(DeviceTransfer& transfer, std::size_t position);
  void detach(Entry& entry);
  void release(Entry& entry);
  void give_back(Record& record) noexcept;
  void account(const Entry& entry);
  void reattach(Entry& entry, Error& failure) noexcept;
  void keep_asleep(Entry& entry, Error& failure, std::string&& why) noexcept;
  void forget_overwritten() noexcept;

  Allocator& allocator_;
  const char* operation_;
  const SleepRequest& request_;
  DeadRanges dead_;
  Report& report_;
  std::vector<Entry> entries_;
  std::vector<std::size_t> discarded_;                    // of entries_
  std::vector<RecordPointer> forgotten_;                  // already asleep; their backups go
  std::map<int, std::uint64_t> released_;                 // by device
  std::vector<std::shared_ptr<backup::Backup>> dropped_;  // has capacity for all backups to drop
  std::vector<std::unique_ptr<backup::ArenaOrder>> orders_;
  DeviceTransfers transfers_;  // of the copied allocations
};

}  // namespace cumempool::pool
