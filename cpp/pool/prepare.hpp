// Pins host memory ahead of a sleep, so that the sleep itself only copies.
#pragma once

#include <cstdint>
#include <set>

#include "pool/allocator.hpp"
#include "pool/sleep.hpp"

namespace cumempool::pool {

// Pins what `request` would need for its backups beyond what is free; returns the bytes pinned. A
// transition that starts meanwhile waits. Throws Error: what the sleep would be refused with, where
// holders of the tags in `yielding` will have taken their pins off; CUMEMPOOL_OUT_OF_HOST_MEMORY,
// and what was pinned until then stays.
std::uint64_t prepare(Allocator& allocator, const SleepRequest& request,
                      const std::set<const Tag*>& yielding = {});

}  // namespace cumempool::pool
