// The calling thread's last failure, as cumempool_last_error() shows it.
#pragma once

#include "cumempool/status.h"
#include "driver/error.hpp"

namespace cumempool::abi {

// Remembers `error` and returns its status.
cumempool_status set_last_error(const Error& error) noexcept;

const cumempool_error* last_error() noexcept;

}  // namespace cumempool::abi
