// Owns one range of reserved virtual addresses.
#include "vmm/reservation.hpp"

#include <utility>

namespace cumempool::vmm {

Reservation::Reservation(driver::Driver driver, Ledger& ledger, std::size_t bytes)
    : driver_(driver), ledger_(&ledger), bytes_(bytes), address_(driver.reserve(bytes)) {
  ledger_->reserved_bytes += bytes_;
}

Reservation::Reservation(Reservation&& other) noexcept
    : driver_(other.driver_),
      ledger_(other.ledger_),
      bytes_(other.bytes_),
      address_(std::exchange(other.address_, 0)) {}

Reservation::~Reservation() { release(); }

cumempool_result Reservation::release() noexcept {
  if (!held()) return CUMEMPOOL_RESULT_SUCCESS;
  const auto& table = driver_.table();
  const cumempool_result result = table.unreserve(table.self, address_, bytes_);
  if (result == CUMEMPOOL_RESULT_SUCCESS) {
    ledger_->reserved_bytes -= bytes_;
    address_ = 0;
  }
  return result;
}

}  // namespace cumempool::vmm
