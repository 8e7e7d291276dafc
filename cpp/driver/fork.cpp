// Whether this process is the forked child of one that had opened a driver.
#include "driver/fork.hpp"

#include <pthread.h>

#include <atomic>
#include <mutex>

namespace cumempool::driver {
namespace {

std::atomic<bool> forked{false};

}  // namespace

void watch_forks() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { forked = true; }); });
}

bool in_forked_child() noexcept { return forked; }

}  // namespace cumempool::driver
