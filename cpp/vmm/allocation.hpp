// One address range with its memory: the state machine that every transition drives.
//
//   reserved --map()--> mapped --unmap()--> detached --release_physical()--> reserved
//
// `detached` is unmapped with the physical memory (and so its contents) still held; map() from
// there needs no memory and cannot run out of it, which is what makes a sleep reversible (R4).
// Ordinary memory knows one state, `mapped`, for life.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "driver/driver.hpp"
#include "vmm/ledger.hpp"
#include "vmm/mapping.hpp"
#include "vmm/ordinary_memory.hpp"
#include "vmm/physical_memory.hpp"
#include "vmm/reservation.hpp"

namespace cumempool::vmm {

class Allocation {
 public:
  // Reserves addresses; `access` are the devices that will use them. Throws Error; then nothing is
  // held.
  Allocation(driver::Driver driver, Ledger& ledger, const cumempool_memory_properties& properties,
             std::size_t bytes, std::vector<int> access);
  // The same for the device of the properties alone.
  Allocation(driver::Driver driver, Ledger& ledger, const cumempool_memory_properties& properties,
             std::size_t bytes);
  // Ordinary memory.
  Allocation(driver::Driver driver, OrdinaryMemory&& memory, int device, std::size_t bytes);

  cumempool_address address() const noexcept {
    return ordinary_ ? ordinary_->address() : range_->address();
  }
  std::size_t bytes() const noexcept { return bytes_; }
  bool mapped() const noexcept {
    if (ordinary_) return ordinary_->held();
    return mapping_ && mapping_->held() && mapping_->accessible();
  }
  bool holds_physical() const noexcept {
    return ordinary_ ? ordinary_->held() : physical_ && physical_->held();
  }
  bool is_ordinary() const noexcept { return ordinary_.has_value(); }
  // The devices that may use it; only for those who may map and unmap it.
  const std::vector<int>& access() const noexcept { return access_; }
  // What its memory is made with at each wake; of ordinary memory only the device.
  const cumempool_memory_properties& properties() const noexcept { return properties_; }
  // What the driver exports; only while it holds physical memory, which is not ordinary.
  cumempool_physical handle() const noexcept { return physical_->handle(); }

  // Makes the range usable. Throws Error; then it is as before. No effect where it is mapped.
  void map();

  // Lets more devices use the range, until it is detached. No effect for those who may already, and
  // where it is not mapped, or refused: nobody was promised that they could.
  void extend(const std::vector<int>& devices) noexcept;

  // Detaches the range from its memory, which stays held. Throws Error; then it is as before.
  void unmap();

  // Gives the memory of a detached range back. On failure it stays held; may be repeated.
  cumempool_result release_physical() noexcept;

  // Everything back, in reverse order. Stops at the first failure, with what is left still held,
  // and may be repeated.
  cumempool_result teardown() noexcept;

 private:
  cumempool_result release_mapping() noexcept;

  driver::Driver driver_;
  Ledger* ledger_ = nullptr;
  cumempool_memory_properties properties_{};
  std::size_t bytes_;
  std::vector<int> access_;
  std::size_t chosen_ = access_.size();  // of them; the others were let in since
  // Order matters: destroyed last to first.
  std::optional<OrdinaryMemory> ordinary_;
  std::optional<Reservation> range_;
  std::optional<PhysicalMemory> physical_;
  std::optional<Mapping> mapping_;
};

}  // namespace cumempool::vmm
