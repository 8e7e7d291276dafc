// Owns the mapping of physical memory at a reserved address, with access for its device.
#include "vmm/mapping.hpp"

#include <utility>

namespace cumempool::vmm {

Mapping::Mapping(driver::Driver driver, Ledger& ledger, const Reservation& range,
                 const PhysicalMemory& memory)
    : driver_(driver), ledger_(&ledger), address_(range.address()), bytes_(range.bytes()) {
  driver_.map(address_, bytes_, memory.handle());
  ledger_->mapped_bytes += bytes_;
}

Mapping::Mapping(Mapping&& other) noexcept
    : driver_(other.driver_),
      ledger_(other.ledger_),
      address_(other.address_),
      bytes_(other.bytes_),
      held_(std::exchange(other.held_, false)),
      accessible_(std::exchange(other.accessible_, false)) {}

Mapping::~Mapping() { release(); }

void Mapping::give_access(const std::vector<int>& devices, cumempool_access access) {
  driver_.set_access(address_, bytes_, devices, access);
  accessible_ = true;
}

cumempool_result Mapping::release() noexcept {
  if (!held_) return CUMEMPOOL_RESULT_SUCCESS;
  const auto& table = driver_.table();
  const cumempool_result result = table.unmap(table.self, address_, bytes_);
  if (result == CUMEMPOOL_RESULT_SUCCESS) {
    ledger_->mapped_bytes -= bytes_;
    held_ = accessible_ = false;
  }
  return result;
}

}  // namespace cumempool::vmm
