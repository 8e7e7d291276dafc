// Plans the backups of a transition: which bytes need one, where each goes, and whether there is
// room.
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

// Disjoint ranges in order, looked up by address.
class DeadRanges {
 public:
  // In any order, overlapping or not; `as_of` is the moment before the list was made, or 0 where it
  // is known to hold.
  explicit DeadRanges(std::vector<cumempool_extent> ranges, std::uint64_t as_of = 0);

  // Has memory of a tag count as live where a scope may have handed it out since. Under the lock of
  // the records.
  void look_at(const Tag& tag);

  // What is left of a record, in order; it begins and ends at multiples of 512 bytes. All of one
  // that is younger than the list: what is dead was there before it, at the same address.
  std::vector<backup::Extent> live_extents(const Record& record) const;

 private:
  struct Range {
    cumempool_address begin;
    cumempool_address end;
  };
  std::vector<Range> ranges_;
  std::uint64_t as_of_;
  std::set<const Tag*> handed_out_;
};

// Bytes of all extents together.
std::size_t total_bytes(const std::vector<backup::Extent>& extents);

// ---- where --------------------------------------------------------------------------------------

// Throws Error (CUMEMPOOL_UNSUPPORTED) where `device` cannot reach the peer that is chosen.
void check_reach(Allocator& allocator, const BackupChoice& choice, int device);

// Throws Error where the peer that is chosen does not exist (CUMEMPOOL_INVALID_ARGUMENT), or no
// device can reach it (CUMEMPOOL_UNSUPPORTED).
void check_peer(Allocator& allocator, const BackupChoice& choice);

// A new image of `live` of a record. Files and peers give the room at once, host memory as it is
// saved. Throws Error (CUMEMPOOL_BACKUP_FAILED, CUMEMPOOL_OUT_OF_MEMORY, CUMEMPOOL_UNSUPPORTED).
std::shared_ptr<backup::Backup> make_image(Allocator& allocator, const Record& record,
                                           const BackupChoice& choice,
                                           std::vector<backup::Extent> live);

// Whether the image of a record that is awake can take its next backup as well, so that only what
// has changed is copied.
bool reusable(const Allocator& allocator, const Record& record, const BackupChoice& wanted,
              const std::vector<backup::Extent>& live);

// The arena that a choice leads to for a device; null for files and peers.
backup::HostArena* arena_of(Allocator& allocator, const BackupChoice& choice, int device);

// ---- whether there is room ----------------------------------------------------------------------

// A new backup, and where it is to go.
struct HostNeed {
  const Tag* tag;
  int device;
  std::size_t bytes;
  BackupChoice* choice;
};

enum class Retained { kMayGo, kStay };

// What is free in an arena, and what it can still take: addresses, its share of the limit on pinned
// memory, and what the kernel leaves to the process. Where that is too little, blocks of other
// arenas that hold nothing go, then retained backups if they may, and then backups go to the tier
// that takes the overflow, in order. Reads no file where all the room is there already. For the
// transition under way. Throws Error (CUMEMPOOL_OUT_OF_HOST_MEMORY) with the numbers.
void plan_host_memory(Allocator& allocator, const char* operation,
                      const std::vector<HostNeed>& needs, Retained retained);

// Whether a transition that failed, and was undone, can be tried once more with the tier that takes
// the overflow: the driver would not pin host memory for it. From now on that tier takes all that
// does not fit into what is pinned already, less what the buffers of its copies need, until host
// memory is released.
bool sends_to_overflow(Allocator& allocator, const Error& failure) noexcept;

}  // namespace cumempool::pool
