// Owns one handle to physical device memory.
#include "vmm/physical_memory.hpp"

#include <utility>

namespace cumempool::vmm {

PhysicalMemory::PhysicalMemory(driver::Driver driver, Ledger& ledger,
                               const cumempool_memory_properties& properties, std::size_t bytes)
    : driver_(driver), ledger_(&ledger), bytes_(bytes), handle_(driver.create(bytes, &properties)) {
  ledger_->physical_bytes += bytes_;
}

PhysicalMemory::PhysicalMemory(driver::Driver driver, Ledger& ledger, std::size_t bytes,
                               cumempool_physical imported)
    : driver_(driver), ledger_(&ledger), bytes_(bytes), handle_(imported) {
  ledger_->physical_bytes += bytes_;
}

PhysicalMemory::PhysicalMemory(PhysicalMemory&& other) noexcept
    : driver_(other.driver_),
      ledger_(other.ledger_),
      bytes_(other.bytes_),
      handle_(other.handle_),
      held_(std::exchange(other.held_, false)) {}

PhysicalMemory::~PhysicalMemory() { release(); }

cumempool_result PhysicalMemory::release() noexcept {
  if (!held_) return CUMEMPOOL_RESULT_SUCCESS;
  const auto& table = driver_.table();
  const cumempool_result result = table.release(table.self, handle_);
  if (result == CUMEMPOOL_RESULT_SUCCESS) {
    ledger_->physical_bytes -= bytes_;
    held_ = false;
  }
  return result;
}

}  // namespace cumempool::vmm
