// Owns device memory of the ordinary kind (cudaMalloc), which stays where it is until it is freed.
#pragma once

#include <cstddef>

#include "driver/driver.hpp"
#include "vmm/ledger.hpp"

namespace cumempool::vmm {

class OrdinaryMemory {
 public:
  // Throws Error; then nothing is held.
  OrdinaryMemory(driver::Driver driver, Ledger& ledger, int device, std::size_t bytes);
  ~OrdinaryMemory();
  OrdinaryMemory(OrdinaryMemory&& other) noexcept;
  OrdinaryMemory(const OrdinaryMemory&) = delete;
  OrdinaryMemory& operator=(const OrdinaryMemory&) = delete;
  OrdinaryMemory& operator=(OrdinaryMemory&&) = delete;

  cumempool_address address() const noexcept { return address_; }
  bool held() const noexcept { return held_; }

  // On failure it stays held; may be repeated.
  cumempool_result release() noexcept;

 private:
  driver::Driver driver_;
  Ledger* ledger_;
  int device_;
  std::size_t bytes_;
  cumempool_address address_;
  bool held_ = true;
};

}  // namespace cumempool::vmm
