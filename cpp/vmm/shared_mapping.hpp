// Physical memory of another process: imported, mapped here, and given back.
#pragma once

#include <cstddef>
#include <cstdint>

#include "driver/driver.hpp"
#include "vmm/backing.hpp"

namespace cumempool::vmm {

// Not thread-safe. The memory lives as long as this mapping, even if its owner ends before. What
// the driver refuses to take back is leaked (ADR 35), where opening fails as well.
class SharedMapping {
 public:
  // Imports `bytes` that export_handle wrote to `exported`: an int (POSIX fd, which stays the
  // caller's) or a fabric handle. Maps them for use by `device`. Throws Error.
  SharedMapping(driver::Driver driver, int device, std::uint32_t handle_type, const void* exported,
                std::size_t bytes, cumempool_access access);
  // Waits and gives everything back, as close() does. Leaves the memory mapped if the wait fails,
  // because work may still use it (R5).
  ~SharedMapping();
  SharedMapping(const SharedMapping&) = delete;
  SharedMapping& operator=(const SharedMapping&) = delete;

  cumempool_address address() const noexcept { return memory_.address(); }

  // Waits for work in flight on the device, then unmaps, releases and unreserves. Throws Error at
  // the first step that fails; another call goes on from there.
  void close();

 private:
  cumempool_result wait() const noexcept;

  driver::Driver driver_;
  int device_;
  std::size_t bytes_;
  MemoryStats stats_;
  driver::RetainedContext context_;
  VmmBacking memory_;
};

}  // namespace cumempool::vmm
