// Physical memory of another process, mapped here: imported, addressed, and given back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "driver/driver.hpp"
#include "vmm/ledger.hpp"
#include "vmm/mapping.hpp"
#include "vmm/physical_memory.hpp"
#include "vmm/reservation.hpp"

namespace cumempool::vmm {

// Not thread-safe. The memory lives as long as this mapping, whatever becomes of its owner.
class SharedMapping {
 public:
  // `exported` is what export_handle wrote there: an int (POSIX fd, stays the caller's) or a fabric
  // handle, of `bytes` in all. `device` is the one that will use it here. Throws Error; then
  // nothing is held.
  SharedMapping(driver::Driver driver, int device, std::uint32_t handle_type, const void* exported,
                std::size_t bytes, cumempool_access access);
  // Like close(), and what fails stays held.
  ~SharedMapping();
  SharedMapping(const SharedMapping&) = delete;
  SharedMapping& operator=(const SharedMapping&) = delete;

  cumempool_address address() const noexcept { return range_.address(); }
  std::size_t bytes() const noexcept { return range_.bytes(); }

  // Waits for work in flight on the device, and gives everything back. Throws Error; may be
  // repeated.
  void close();

 private:
  driver::Driver driver_;
  int device_;
  Ledger ledger_;
  driver::RetainedContext context_;
  // Order matters: destroyed last to first.
  Reservation range_;
  std::optional<PhysicalMemory> physical_;
  std::optional<Mapping> mapping_;
};

}  // namespace cumempool::vmm
