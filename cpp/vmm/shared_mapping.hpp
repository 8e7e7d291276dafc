// Physical memory of another process, mapped here: imported, addressed, and given back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "driver/driver.hpp"

namespace cumempool::vmm {

struct SharedParts;

// Not thread-safe. The memory lives as long as this mapping, whatever becomes of its owner. What
// cannot be given back at its end, or where opening fails, is kept as it is, since work may still
// use it (R5), and tried again whenever memory of the same driver is opened or closed.
class SharedMapping {
 public:
  // `exported` is what export_handle wrote there: an int (POSIX fd, stays the caller's) or a fabric
  // handle, of `bytes` in all. `device` is the one that will use it here. Throws Error.
  SharedMapping(driver::Driver driver, int device, std::uint32_t handle_type, const void* exported,
                std::size_t bytes, cumempool_access access);
  // Like close().
  ~SharedMapping();
  SharedMapping(const SharedMapping&) = delete;
  SharedMapping& operator=(const SharedMapping&) = delete;

  cumempool_address address() const noexcept;

  // Waits for work in flight on the device, and gives everything back. Throws Error; may be
  // repeated.
  void close();

  // Tries what is kept of a driver once more, and never again: the driver goes.
  static void forget_leftovers(const cumempool_driver& table) noexcept;

 private:
  std::unique_ptr<SharedParts> parts_;
};

}  // namespace cumempool::vmm
