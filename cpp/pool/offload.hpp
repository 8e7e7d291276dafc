// Allocations that go to sleep: which of their bytes are copied where, the copies, the return of
// their memory to the device behind them, and the way back if something fails.
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
  std::uint64_t dead_as_of = 0;  // the moment before that list was made; 0 = it holds
  std::vector<cumempool_device_stream> streams;
};

// Throws Error where memory that is awake cannot sleep: CUMEMPOOL_IN_USE where it is pinned, unless
// `pinned` is left out, CUMEMPOOL_UNSUPPORTED where it is ordinary.
enum class Pinned { kCounts, kIsLeftOut };
void refuse_to_sleep(Allocator& allocator, const char* operation, const Record& record,
                     Pinned pinned = Pinned::kCounts);

// The steps of one sleep or swap, in the order of the calls. Until finish() has returned, undo()
// takes all of it back.
class Offload {
 public:
  Offload(Allocator& allocator, const char* operation, const SleepRequest& request, Report& report);

  // Before records are claimed, under their lock: throws Error (CUMEMPOOL_IN_USE) where a scope of
  // one of the tags is open. One that begins later is given nothing of what was claimed.
  void admit();
  // Whether the request concerns a record.
  bool wants(const Record& record) const;
  // Takes on what was claimed, finds out what has to be copied, and where it will go. Throws Error,
  // and nothing has changed.
  void plan(const std::vector<RecordPointer>& claimed);
  // Device memory that it will give back, and what it has given back so far.
  std::uint64_t bytes_on(int device) const;
  std::uint64_t released_on(int device) const;
  // Waits for work in flight.
  void fence();

  // Enqueues all copies, with everything they need in host memory, files or peers; what threads
  // write out has been written when it returns.
  void start_copies();
  // Waits for the copies of the next allocation of a device, and gives its memory back; false where
  // none is left. Allocations that are discarded come last, and only where `with_discarded`.
  bool release_next(int device, bool with_discarded);
  // Gives back the rest of what is copied, and detaches the rest of what is discarded.
  void finish();
  // Past the point of no return: changes the states, and gives back what is left. What the driver
  // refuses to take back is leaked, and reported.
  void commit() noexcept;

  // Everything as it was. Contents that were discarded and given back already cannot return: those
  // allocations sleep, and `failure` says so.
  void undo(Error& failure) noexcept;

 private:
  enum class Stage { kAwake, kDetached, kReleased };

  // One allocation. `image` is handed to the record only when all have made it.
  struct Sleeper {
    RecordPointer record;
    std::vector<backup::Extent> live;       // empty where it is discarded
    std::shared_ptr<backup::Backup> image;  // null where it is discarded
    BackupChoice choice;
    bool fresh = true;  // the image is new; else it was retained since the last sleep
    std::uint64_t clean_bytes = 0;
    std::vector<std::size_t> copied;  // slices of the image whose digests are to be checked
    Stage stage = Stage::kAwake;
  };

  bool discards(const Record& record) const;
  bool forgettable(const Record& record) const;

  void choose_images();
  void plan_room();
  void make_room();
  void start_digests(DeviceTransfer& transfer);
  void copy(DeviceTransfer& transfer, std::size_t position);
  void recheck(DeviceTransfer& transfer, std::size_t position);
  void finish_copies(DeviceTransfer& transfer);
  void keep_digests(DeviceTransfer& transfer);
  void verify(DeviceTransfer& transfer, std::size_t position);
  void detach(Sleeper& sleeper);
  void release(Sleeper& sleeper);
  void give_back(Record& record) noexcept;
  void account(const Sleeper& sleeper);
  void reattach(Sleeper& sleeper, Error& failure) noexcept;
  void keep_asleep(Sleeper& sleeper, Error& failure, std::string&& why) noexcept;
  void forget_overwritten() noexcept;

  Allocator& allocator_;
  const char* operation_;
  const SleepRequest& request_;
  DeadRanges dead_;
  Report& report_;
  std::vector<Sleeper> sleepers_;
  std::vector<std::size_t> discarded_;                    // of sleepers_
  std::vector<RecordPointer> forgotten_;                  // asleep already; their backups go
  std::map<int, std::uint64_t> released_;                 // by device
  std::vector<std::shared_ptr<backup::Backup>> dropped_;  // has room for those of forgotten_
  std::vector<std::unique_ptr<backup::ArenaOrder>> orders_;
  DeviceTransfers transfers_;  // of what is copied
};

}  // namespace cumempool::pool
