// Hands the physical memory of an allocation to other processes.
#pragma once

#include <cstdint>

#include "pool/allocator.hpp"

namespace cumempool::pool {

// Writes the exported handle of the awake allocation that holds `address`, and tells which that is.
// Throws Error: CUMEMPOOL_NOT_OWNED, CUMEMPOOL_INVALID_ARGUMENT where it sleeps,
// CUMEMPOOL_UNSUPPORTED for ordinary memory and for handle types that the memory was not made for.
cumempool_allocation_info export_memory(Allocator& allocator, cumempool_address address,
                                        std::uint32_t handle_type, void* exported);

}  // namespace cumempool::pool
