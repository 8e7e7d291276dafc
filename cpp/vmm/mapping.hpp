// Owns the mapping of physical memory at a reserved address, with access for its device.
#pragma once

#include <cstddef>
#include <vector>

#include "driver/driver.hpp"
#include "vmm/ledger.hpp"
#include "vmm/physical_memory.hpp"
#include "vmm/reservation.hpp"

namespace cumempool::vmm {

class Mapping {
 public:
  // Maps all of `memory` over all of `range`. Throws Error; then nothing is mapped.
  Mapping(driver::Driver driver, Ledger& ledger, const Reservation& range,
          const PhysicalMemory& memory);
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  Mapping& operator=(Mapping&&) = delete;

  bool held() const noexcept { return held_; }
  bool accessible() const noexcept { return accessible_; }

  // Lets the devices use the range. Throws Error; then access is as before.
  void give_access(const std::vector<int>& devices,
                   cumempool_access access = CUMEMPOOL_ACCESS_READ_WRITE);

  // Unmaps. The caller has made sure that no work in flight uses the range (R5). On failure it
  // stays mapped and the call may be repeated.
  cumempool_result release() noexcept;

 private:
  driver::Driver driver_;
  Ledger* ledger_;
  cumempool_address address_;
  std::size_t bytes_;
  bool held_ = true;
  bool accessible_ = false;
};

}  // namespace cumempool::vmm
