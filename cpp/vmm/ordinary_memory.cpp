// Owns device memory of the ordinary kind (cudaMalloc), which stays where it is until it is freed.
#include "vmm/ordinary_memory.hpp"

#include <utility>

namespace cumempool::vmm {
namespace {

cumempool_address allocate(driver::Driver driver, int device, std::size_t bytes) {
  const driver::ContextScope scope(driver, device);
  return driver.allocate(device, bytes);
}

}  // namespace

OrdinaryMemory::OrdinaryMemory(driver::Driver driver, Ledger& ledger, int device, std::size_t bytes)
    : driver_(driver),
      ledger_(&ledger),
      device_(device),
      bytes_(bytes),
      address_(allocate(driver, device, bytes)) {
  ledger_->physical_bytes += bytes_;
  ledger_->mapped_bytes += bytes_;
}

OrdinaryMemory::OrdinaryMemory(OrdinaryMemory&& other) noexcept
    : driver_(other.driver_),
      ledger_(other.ledger_),
      device_(other.device_),
      bytes_(other.bytes_),
      address_(other.address_),
      held_(std::exchange(other.held_, false)) {}

OrdinaryMemory::~OrdinaryMemory() { release(); }

cumempool_result OrdinaryMemory::release() noexcept {
  if (!held_) return CUMEMPOOL_RESULT_SUCCESS;
  const auto& table = driver_.table();
  cumempool_context_token token{};
  cumempool_result result = table.context_enter(table.self, device_, &token);
  if (result != CUMEMPOOL_RESULT_SUCCESS) return result;
  result = table.deallocate(table.self, device_, address_);
  table.context_leave(table.self, &token);
  if (result == CUMEMPOOL_RESULT_SUCCESS) {
    ledger_->physical_bytes -= bytes_;
    ledger_->mapped_bytes -= bytes_;
    held_ = false;
  }
  return result;
}

}  // namespace cumempool::vmm
