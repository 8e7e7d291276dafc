// Host memory that was registered with the host driver for copies. Not thread-safe; the driver
// locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

#include "cumempool/driver.h"

namespace cumempool::driver {

class HostRegistrations {
 public:
  // The pages must be there, and none of them registered.
  cumempool_result add(const void* pointer, std::size_t bytes);
  // Bytes of the registration that begins at `pointer`; 0 = none does.
  std::size_t bytes_at(const void* pointer) const;
  void remove(const void* pointer);
  // Whether one single registration holds the range.
  bool holds(const void* pointer, std::size_t bytes) const;

  std::size_t count() const noexcept { return ranges_.size(); }
  std::uint64_t bytes() const;

 private:
  std::map<std::uintptr_t, std::size_t> ranges_;
};

}  // namespace cumempool::driver
