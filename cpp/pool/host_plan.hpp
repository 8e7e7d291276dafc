// Finds room in host memory for the backups of one transition, before any of it is touched.
#pragma once

#include <cstddef>
#include <vector>

#include "pool/allocator.hpp"

namespace cumempool::pool {

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
