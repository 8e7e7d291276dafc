// Whether this process is the forked child of one that had opened a driver: drivers do not survive
// a fork, so nothing may be called there (R14).
#pragma once

namespace cumempool::driver {

// Called once a driver has been opened: children forked from now on are told apart.
void watch_forks();

bool in_forked_child() noexcept;

}  // namespace cumempool::driver
