// The calling thread's last failure, for cumempool_last_error().
#pragma once

#include "cumempool/status.h"
#include "driver/error.hpp"

namespace cumempool::abi {

// Remembers `error` and returns its status. Fills in `operation` if the error names none. Without
// memory for its texts, keeps the status, with a text that says so.
cumempool_status set_last_error(const char* operation, const Error& error) noexcept;
// The same for a failure with a constant text. Takes no memory.
cumempool_status set_last_error(cumempool_status status, const char* text) noexcept;

const cumempool_error* last_error() noexcept;

}  // namespace cumempool::abi
