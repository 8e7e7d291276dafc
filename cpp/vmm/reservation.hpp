// Owns one range of reserved virtual addresses.
#pragma once

#include <cstddef>

#include "driver/driver.hpp"
#include "vmm/ledger.hpp"

namespace cumempool::vmm {

class Reservation {
 public:
  // Throws Error where the driver refuses. `bytes` is a multiple of the granularity.
  Reservation(driver::Driver driver, Ledger& ledger, std::size_t bytes);
  ~Reservation();
  Reservation(Reservation&& other) noexcept;
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;
  Reservation& operator=(Reservation&&) = delete;

  cumempool_address address() const noexcept { return address_; }
  std::size_t bytes() const noexcept { return bytes_; }
  bool held() const noexcept { return address_ != 0; }

  // Gives the range back. On failure it stays held and the call may be repeated.
  cumempool_result release() noexcept;

 private:
  driver::Driver driver_;
  Ledger* ledger_;
  std::size_t bytes_;
  cumempool_address address_;
};

}  // namespace cumempool::vmm
