// One address range with its backing: the state machine that every transition drives.
//
//   reserved --map()--> mapped --unmap()--> detached --release_physical()--> reserved
//
// A detached range is unmapped and still holds its physical memory with the contents. map() from
// there takes no memory and cannot run out of it, so a sleep can be undone (R4). A backing that
// cannot sleep has one state, `mapped`, for life.
#pragma once

#include <cstddef>
#include <vector>

#include "driver/driver.hpp"
#include "vmm/backing.hpp"

namespace cumempool::vmm {

class Allocation {
 public:
  // Virtual memory. Reserves addresses, which the devices in `access` will use. Throws Error, and
  // then holds nothing.
  Allocation(driver::Driver driver, MemoryStats& stats,
             const cumempool_memory_properties& properties, std::size_t bytes,
             std::vector<int> access);
  // The same for the device of the properties alone.
  Allocation(driver::Driver driver, MemoryStats& stats,
             const cumempool_memory_properties& properties, std::size_t bytes);
  // Memory of cudaMalloc, mapped at once.
  Allocation(driver::Driver driver, MemoryStats& stats, int device, std::size_t bytes);

  cumempool_address address() const noexcept { return address_; }
  std::size_t bytes() const noexcept { return bytes_; }
  bool mapped() const noexcept {
    return std::visit([](const auto& backing) { return backing.mapped(); }, backing_);
  }
  bool holds_physical() const noexcept {
    return std::visit([](const auto& backing) { return backing.holds_physical(); }, backing_);
  }
  // The devices with access, its own first. Only the thread that may map and unmap reads this.
  const std::vector<int>& access() const noexcept { return access_; }

  // The kind of the backing, and its capabilities: give memory back and keep the address, export,
  // give more devices access later. free_waits: teardown() waits for work in flight.
  cumempool_backing kind() const noexcept {
    return std::visit([](const auto& backing) { return backing.kKind; }, backing_);
  }
  bool can_sleep() const noexcept {
    return std::visit([](const auto& backing) { return backing.kCanSleep; }, backing_);
  }
  bool can_export() const noexcept {
    return std::visit([](const auto& backing) { return backing.kCanExport; }, backing_);
  }
  bool can_extend() const noexcept {
    return std::visit([](const auto& backing) { return backing.kCanExtend; }, backing_);
  }
  bool free_waits() const noexcept {
    return std::visit([](const auto& backing) { return backing.kFreeWaits; }, backing_);
  }

  // The properties of the memory that a wake creates; null if the driver chooses them.
  const cumempool_memory_properties* properties() const noexcept {
    return std::visit([](const auto& backing) { return backing.properties(); }, backing_);
  }
  // The handle to export. Valid only while holds_physical() and can_export().
  cumempool_physical handle() const noexcept {
    return std::visit([](const auto& backing) { return backing.handle(); }, backing_);
  }

  // Whether map() takes device memory.
  bool needs_physical() const noexcept {
    return std::visit([](const auto& backing) { return backing.needs_physical(); }, backing_);
  }

  // Makes the range usable. No effect if it is mapped. Throws Error, and then the range is as
  // before; VmmBacking::map() says what it leaks.
  void map();

  // Gives more devices access to a mapped range, until it is detached. Skips devices that have
  // access. Ignores a refusal by the driver: no caller was promised this access.
  void extend(const std::vector<int>& devices) noexcept;

  // Detaches the range from its memory, which stays held. Throws Error, and then the range is as
  // before.
  void unmap();

  // Gives the memory of a detached range back. On failure it keeps the memory and its contents.
  cumempool_result release_physical() noexcept;

  // Unmaps and releases all memory, leaked handles included, and keeps the addresses. Leaks what
  // the driver refuses to take back, and throws Error for it.
  void vacate();

  // Gives everything back, in reverse order. Stops at the first failure and leaks the rest; may be
  // repeated.
  cumempool_result teardown() noexcept;

  // Counts the memory that it holds, if any, as leaked: the driver refuses to take it back.
  void leak() noexcept {
    if (holds_physical()) std::visit([](auto& backing) { backing.leak(); }, backing_);
  }

 private:
  driver::Driver driver_;
  std::size_t bytes_;
  std::vector<int> access_;
  std::size_t chosen_ = access_.size();  // the first ones; extend() added the others
  Backing backing_;
  cumempool_address address_;
};

}  // namespace cumempool::vmm
