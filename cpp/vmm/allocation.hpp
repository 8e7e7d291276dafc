// One address range with its backing: the state machine that every transition drives.
//
//   reserved --map()--> mapped --unmap()--> detached --release_physical()--> reserved
//
// `detached` is unmapped with the physical memory (and so its contents) still held; map() from
// there needs no memory and cannot run out of it, which is what makes a sleep reversible (R4).
// A backing that cannot sleep knows one state, `mapped`, for life.
#pragma once

#include <cstddef>
#include <vector>

#include "driver/driver.hpp"
#include "vmm/backing.hpp"

namespace cumempool::vmm {

class Allocation {
 public:
  // Virtual memory. Reserves addresses; `access` are the devices that will use them. Throws Error;
  // then nothing is held.
  Allocation(driver::Driver driver, MemoryStats& stats,
             const cumempool_memory_properties& properties, std::size_t bytes,
             std::vector<int> access);
  // The same for the device of the properties alone.
  Allocation(driver::Driver driver, MemoryStats& stats,
             const cumempool_memory_properties& properties, std::size_t bytes);
  // Memory of cudaMalloc, which is there at once.
  Allocation(driver::Driver driver, MemoryStats& stats, int device, std::size_t bytes);

  cumempool_address address() const noexcept { return address_; }
  std::size_t bytes() const noexcept { return bytes_; }
  bool mapped() const noexcept {
    return std::visit([](const auto& backing) { return backing.mapped(); }, backing_);
  }
  bool holds_physical() const noexcept {
    return std::visit([](const auto& backing) { return backing.holds_physical(); }, backing_);
  }
  // The devices that may use it, its own first; only for those who may map and unmap it.
  const std::vector<int>& access() const noexcept { return access_; }

  // What it is made of, and what that can do: give memory back while the address stays, be
  // exported, let more devices in later. Whether a teardown waits for work in flight.
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

  // What its memory is made with at each wake; null where the driver chooses.
  const cumempool_memory_properties* properties() const noexcept {
    return std::visit([](const auto& backing) { return backing.properties(); }, backing_);
  }
  // What the driver exports; only while it holds physical memory, and can be exported.
  cumempool_physical handle() const noexcept {
    return std::visit([](const auto& backing) { return backing.handle(); }, backing_);
  }

  // Whether map() takes device memory.
  bool needs_physical() const noexcept {
    return std::visit([](const auto& backing) { return backing.needs_physical(); }, backing_);
  }

  // Makes the range usable. Throws Error; then it is as before. No effect where it is mapped. See
  // VmmBacking::map() for what is leaked.
  void map();

  // Lets more devices use the range, until it is detached. No effect for those who may already, and
  // where it is not mapped, or refused: nobody was promised that they could.
  void extend(const std::vector<int>& devices) noexcept;

  // Detaches the range from its memory, which stays held. Throws Error; then it is as before.
  void unmap();

  // Gives the memory of a detached range back. On failure it stays held, with its contents.
  cumempool_result release_physical() noexcept;

  // Unmaps and releases all memory, leaked handles included; the addresses stay. Throws Error for
  // what the driver refuses, which is leaked.
  void vacate();

  // Everything back, in reverse order. Stops at the first failure; then what is left is leaked, and
  // it may be repeated.
  cumempool_result teardown() noexcept;

  // Counts the memory that is held, if any, as leaked: it cannot be given back.
  void leak() noexcept {
    if (holds_physical()) std::visit([](auto& backing) { backing.leak(); }, backing_);
  }

 private:
  driver::Driver driver_;
  std::size_t bytes_;
  std::vector<int> access_;
  std::size_t chosen_ = access_.size();  // of them; the others were let in since
  Backing backing_;
  cumempool_address address_;
};

}  // namespace cumempool::vmm
