// Pins host memory ahead of a sleep, so that the sleep itself only copies.
#pragma once

#include <cstdint>

#include "pool/allocator.hpp"
#include "pool/sleep.hpp"

namespace cumempool::pool {

// Pins what `request` would need for its backups beyond what is free; returns the bytes pinned. A
// transition that starts meanwhile waits. Throws Error (CUMEMPOOL_OUT_OF_HOST_MEMORY); what was
// pinned until then stays.
std::uint64_t prepare(Allocator& allocator, const SleepRequest& request);

}  // namespace cumempool::pool
