// The plan for the backups of a transition: which bytes need one, where each goes, and whether
// there is room.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <vector>

#include "backup/backup.hpp"
#include "cumempool/cumempool.h"
#include "pool/allocator.hpp"
#include "pool/records.hpp"

namespace cumempool::pool {

// ---- which bytes --------------------------------------------------------------------------------

// Ranges that torch has cached as free, whose contents need no backup.
class DeadRanges {
 public:
  // Takes ranges in any order, overlapping or not. `as_of` is the moment before the list was made;
  // 0 if the list is known to hold.
  explicit DeadRanges(std::vector<cumempool_extent> ranges, std::uint64_t as_of = 0);

  // Counts all memory of a tag as live if a scope may have handed it out since the list was made.
  // Runs under the lock of the records.
  void look_at(const Tag& tag);

  // Returns the live extents of a record, in order, at multiples of 512 bytes. A record that is
  // younger than the list is all live: the ranges were there before it, at the same addresses.
  std::vector<backup::Extent> live_extents(const Record& record) const;

 private:
  std::vector<cumempool_extent> ranges_;  // disjoint, in order
  std::uint64_t as_of_;
  std::set<const Tag*> handed_out_;
};

// Returns the sum of the bytes.
std::size_t total_bytes(const std::vector<backup::Extent>& extents);

// ---- where --------------------------------------------------------------------------------------

// Throws Error (CUMEMPOOL_UNSUPPORTED) if `device` cannot reach the chosen peer.
void check_reach(Allocator& allocator, const BackupChoice& choice, int device);

// Throws Error if the chosen peer does not exist (CUMEMPOOL_INVALID_ARGUMENT), or if no device can
// reach it (CUMEMPOOL_UNSUPPORTED).
void check_peer(Allocator& allocator, const BackupChoice& choice);

// Makes a new backup of the `live` extents of a record. Files and peers reserve room at once, host
// memory when it is saved. Throws Error (CUMEMPOOL_BACKUP_FAILED, CUMEMPOOL_OUT_OF_MEMORY,
// CUMEMPOOL_UNSUPPORTED).
std::shared_ptr<backup::Backup> make_backup(Allocator& allocator, const Record& record,
                                            const BackupChoice& choice,
                                            std::vector<backup::Extent> live);

// Whether the retained backup of an awake record can hold its next backup, so that only changes are
// copied.
bool reusable(const Allocator& allocator, const Record& record, const BackupChoice& wanted,
              const std::vector<backup::Extent>& live);

// Returns the arena of a choice for a device; null for files and peers.
backup::HostArena* arena_of(Allocator& allocator, const BackupChoice& choice, int device);

// ---- whether there is room ----------------------------------------------------------------------

// The need of one new backup. plan_host_memory() may change the choice.
struct HostNeed {
  const Tag* tag;
  int device;
  std::size_t bytes;
  BackupChoice* choice;
};

// Checks that there is room for new backups: in the arenas, under the limit on pinned memory, and
// in the memory that the kernel leaves to the process. If there is too little, it first gives back
// empty blocks of other arenas, then drops retained backups if it may, and then sends backups to
// the overflow tier, in order. It reads no file if the arenas have all the room already. For the
// transition under way. Throws Error (CUMEMPOOL_OUT_OF_HOST_MEMORY) with the numbers.
void plan_host_memory(Allocator& allocator, const char* operation,
                      const std::vector<HostNeed>& needs, bool may_drop_retained);

// Whether to try a failed and undone transition once more with the overflow tier, because the
// driver would not pin host memory. If so, that tier takes all backups that do not fit into the
// memory pinned already, less the needs of the bounce buffers, until host memory is released.
bool sends_to_overflow(Allocator& allocator, const Error& failure) noexcept;

}  // namespace cumempool::pool
