// Allocations on their way to sleep: what of them is copied where, the copies, the memory's return
// to the device behind them, and the way back where something fails.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "pool/comparison.hpp"
#include "pool/dead_ranges.hpp"
#include "pool/lane.hpp"
#include "pool/sleep.hpp"

namespace cumempool::pool {

// Throws Error where memory that is awake cannot sleep: CUMEMPOOL_IN_USE where it is pinned, unless
// `pinned` is left out, CUMEMPOOL_UNSUPPORTED where it is ordinary.
enum class Pinned { kCounts, kIsLeftOut };
void refuse_to_sleep(Allocator& allocator, const char* operation, const Record& record,
                     Pinned pinned = Pinned::kCounts);

// The steps of one sleep or swap, in the order of the calls. Until finish() has returned, undo()
// takes all of it back.
class Departure {
 public:
  Departure(Allocator& allocator, const char* operation, const SleepRequest& request,
            Report& report);

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
  // none is left. What earlier failures have left with allocations that sleep already comes first;
  // allocations that are discarded come last, and only where `with_discarded`.
  bool release_next(int device, bool with_discarded);
  // Gives back the rest of what is copied, and detaches the rest of what is discarded.
  void finish();
  // Past the point of no return: changes the states, and gives back what is left. What the driver
  // will not take back stays with its allocation, is reported, and is used by the next wake.
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
  static bool spare(const Record& record);
  bool releasable(const Record& record) const;

  void choose_images();
  void plan_room();
  void make_room(std::map<backup::HostArena*, std::size_t>& needed);
  void copy(Lane& lane, std::size_t index, std::size_t& culprit);
  void recheck(Lane& lane, std::size_t index);
  void finish_copies(Lane& lane, std::size_t& culprit);
  void keep_digests();
  void verify(Lane& lane, std::size_t index);
  void detach(Sleeper& sleeper);
  void release(Sleeper& sleeper);
  void give_back(Record& record, cumempool_report_row& row) noexcept;
  void release_left_over(Record& record);
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
  std::vector<RecordPointer> unreleased_;                 // asleep already; their memory goes
  std::map<int, std::uint64_t> released_;                 // by device
  std::vector<std::shared_ptr<backup::Backup>> dropped_;  // has room for those of forgotten_
  std::vector<std::unique_ptr<backup::ArenaOrder>> orders_;
  Lanes lanes_;  // of what is copied
  Comparison comparison_;
};

}  // namespace cumempool::pool
