// Primary contexts of the host driver: how often each is retained, and which one is current in each
// thread. Not thread-safe; the driver locks.
#pragma once

#include <cstdint>
#include <vector>

#include "cumempool/driver.h"

namespace cumempool::driver {

class HostContexts {
 public:
  explicit HostContexts(int device_count);

  // Held through the table, which knows no other contexts, or by others.
  bool held(int device) const { return retains_[index(device)] != 0; }
  bool active(int device) const { return held(device) || others_[index(device)] != 0; }
  void retain(int device) { ++retains_[index(device)]; }
  // The context must be held; returns whether it is gone.
  bool release(int device) {
    --retains_[index(device)];
    return !active(device);
  }
  // What others of the process do, with no table in between.
  void retain_for_others(int device) { ++others_[index(device)]; }
  bool release_for_others(int device) {
    --others_[index(device)];
    return !active(device);
  }

  cumempool_result enter(int device, cumempool_context_token& token);
  cumempool_result leave(const cumempool_context_token& token);
  // Whether the calling thread is inside context_enter of the device, and its context exists.
  bool current(int device) const;

  std::uint64_t retained() const;  // through the table
  std::uint64_t entered() const noexcept { return entered_; }

 private:
  static std::size_t index(int device) { return static_cast<std::size_t>(device); }

  const std::uint64_t serial_;  // tells the drivers of a process apart in the threads' stacks
  std::vector<std::uint64_t> retains_;
  std::vector<std::uint64_t> others_;
  std::uint64_t entered_ = 0;
};

}  // namespace cumempool::driver
