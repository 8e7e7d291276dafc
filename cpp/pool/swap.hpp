// Puts some tags to sleep while others wake, with both directions of the link busy.
#pragma once

#include "pool/sleep.hpp"
#include "pool/wake.hpp"

namespace cumempool::pool {

// Takes no more device memory than what is free and what the sleep gives back. All or nothing
// (R4), but for what the sleep discards: where its memory had to be reused before the failure, it
// stays asleep, and the error says so. Throws Error.
Report swap(Allocator& allocator, const SleepRequest& sleep, const WakeRequest& wake);

}  // namespace cumempool::pool
