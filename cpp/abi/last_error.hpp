// The calling thread's last failure, as cumempool_last_error() shows it.
#pragma once

#include "cumempool/status.h"
#include "driver/error.hpp"

namespace cumempool::abi {

// Remembers `error`, as one of `operation` where it does not say of which, and returns its status.
// Where there is no memory for its texts, the status stays and the text says so.
cumempool_status set_last_error(const char* operation, const Error& error) noexcept;
// The same for what has no text but a constant one. Takes no memory.
cumempool_status set_last_error(cumempool_status status, const char* text) noexcept;

const cumempool_error* last_error() noexcept;

}  // namespace cumempool::abi
