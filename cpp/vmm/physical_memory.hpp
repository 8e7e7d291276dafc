// Owns one handle to physical device memory.
#pragma once

#include <cstddef>

#include "driver/driver.hpp"
#include "vmm/ledger.hpp"

namespace cumempool::vmm {

class PhysicalMemory {
 public:
  // Throws Error; status CUMEMPOOL_OUT_OF_MEMORY where the device has no room.
  PhysicalMemory(driver::Driver driver, Ledger& ledger,
                 const cumempool_memory_properties& properties, std::size_t bytes);
  // Takes over a handle that was imported.
  PhysicalMemory(driver::Driver driver, Ledger& ledger, std::size_t bytes,
                 cumempool_physical imported);
  ~PhysicalMemory();
  PhysicalMemory(PhysicalMemory&& other) noexcept;
  PhysicalMemory(const PhysicalMemory&) = delete;
  PhysicalMemory& operator=(const PhysicalMemory&) = delete;
  PhysicalMemory& operator=(PhysicalMemory&&) = delete;

  cumempool_physical handle() const noexcept { return handle_; }
  std::size_t bytes() const noexcept { return bytes_; }
  bool held() const noexcept { return held_; }

  // Gives the memory back. On failure it stays held and the call may be repeated.
  cumempool_result release() noexcept;

 private:
  driver::Driver driver_;
  Ledger* ledger_;
  std::size_t bytes_;
  cumempool_physical handle_;
  bool held_ = true;
};

}  // namespace cumempool::vmm
