// The backing of an allocation: an address for life, and the memory behind it. `Allocation` works
// on any class with these members:
//
//   kKind, kCanSleep, kCanExport, kCanExtend, kFreeWaits     its kind and its capabilities
//   address(), properties(), handle(), mapped(), holds_physical()
//   needs_physical(), map(), give_access(), unmap(), release_physical(), release_set_aside(),
//   teardown(), leak()
//
// A backing leaks what the driver refuses to take back: it counts it, keeps it, and tries once more
// in teardown() (ADR 35).
//
// A backing knows neither who may use the memory nor why it comes and goes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <forward_list>
#include <variant>
#include <vector>

#include "cumempool/cumempool.h"
#include "driver/driver.hpp"

namespace cumempool::vmm {

// Counts the bytes that backings hold from the driver: created minus released, and so on (R13).
// Only backings write here, after each driver call that succeeds.
struct MemoryStats {
  std::atomic<std::uint64_t> reserved_bytes{0};
  std::atomic<std::uint64_t> physical_bytes{0};
  std::atomic<std::uint64_t> peak_physical_bytes{0};  // the most since reset_peaks()
  std::atomic<std::uint64_t> mapped_bytes{0};
  // Backings, and handles set aside, that the driver refused to take back.
  std::atomic<std::uint64_t> leaked_bytes{0};

  void add_physical(std::uint64_t bytes) noexcept { raise_peak(physical_bytes += bytes); }
  // Memory that another thread takes during the call counts.
  void reset_peaks() noexcept {
    peak_physical_bytes = physical_bytes.load();
    raise_peak(physical_bytes);
  }

 private:
  void raise_peak(std::uint64_t now) noexcept {
    std::uint64_t peak = peak_physical_bytes.load(std::memory_order_relaxed);
    while (now > peak && !peak_physical_bytes.compare_exchange_weak(peak, now)) {
    }
  }
};

// Virtual memory: reserved addresses with physical memory that comes and goes in steps. One number
// says how far the steps got, so that the way back undoes exactly the ones that succeeded.
class VmmBacking {
 public:
  static constexpr cumempool_backing kKind = CUMEMPOOL_BACKING_VMM;
  static constexpr bool kCanSleep = true;    // gives its memory back and keeps its address
  static constexpr bool kCanExport = true;   // has a handle that other processes can import
  static constexpr bool kCanExtend = true;   // gives more devices access later
  static constexpr bool kFreeWaits = false;  // teardown() waits for work on the device

  // Reserves addresses. Throws Error, and then holds nothing.
  VmmBacking(driver::Driver driver, MemoryStats& stats,
             const cumempool_memory_properties& properties, std::size_t bytes);
  ~VmmBacking();
  VmmBacking(VmmBacking&& other) noexcept;
  VmmBacking(const VmmBacking&) = delete;
  VmmBacking& operator=(const VmmBacking&) = delete;
  VmmBacking& operator=(VmmBacking&&) = delete;

  cumempool_address address() const noexcept { return address_; }
  // The properties of the memory that map() creates.
  const cumempool_memory_properties* properties() const noexcept { return &properties_; }
  // The handle to export. Valid only while holds_physical().
  cumempool_physical handle() const noexcept { return handle_; }
  // Whether devices can use the range: mapped, with access.
  bool mapped() const noexcept { return held_ == Held::kAccess; }
  bool holds_physical() const noexcept { return held_ >= Held::kPhysical; }
  // Whether map() takes device memory, because it has no handle to use.
  bool needs_physical() const noexcept {
    return held_ < Held::kPhysical || (leaked_ && held_ == Held::kPhysical);
  }

  // Takes over imported memory, which map() then uses. The backing must hold none.
  void adopt(cumempool_physical imported) noexcept;
  // Makes the addresses usable by the devices. No effect if they are mapped. Sets a leaked handle
  // aside and creates a new one. Uses a leaked mapping again, because nothing else can be mapped at
  // its addresses. Throws Error (CUMEMPOOL_OUT_OF_MEMORY if the device has no room) after undoing
  // its own steps; leaks what the driver does not let it undo.
  void map(const std::vector<int>& devices, cumempool_access access = CUMEMPOOL_ACCESS_READ_WRITE);
  // Gives more devices access to a mapped range. Throws Error, and then access is as before.
  void give_access(const std::vector<int>& devices);
  // The steps back, in this order; each starts where the one before ended. A step that fails
  // changes nothing and may be repeated. The caller makes sure that no work in flight uses the
  // memory (R5).
  cumempool_result unmap() noexcept;
  cumempool_result release_physical() noexcept;
  cumempool_result release_set_aside() noexcept;
  cumempool_result release_addresses() noexcept;
  // Takes all steps back. Stops at the first failure and leaks the rest; may be repeated.
  cumempool_result teardown() noexcept;

  // Counts the memory that it holds as leaked.
  void leak() noexcept;
  // Leaves what it holds to the driver for good: the destructor gives nothing back.
  void abandon() noexcept { held_ = Held::kNothing; }

 private:
  enum class Held { kNothing, kAddresses, kPhysical, kMapping, kAccess };

  void set_aside();
  void recover() noexcept;

  driver::Driver driver_;
  MemoryStats* stats_;
  cumempool_memory_properties properties_;
  std::size_t bytes_;
  cumempool_address address_;
  cumempool_physical handle_ = 0;
  Held held_ = Held::kAddresses;
  bool leaked_ = false;                              // the members above hold leaked memory
  std::forward_list<cumempool_physical> set_aside_;  // leaked handles that were replaced
};

// Memory of cudaMalloc: mapped from the start, and given back as a whole.
class CudaMallocBacking {
 public:
  static constexpr cumempool_backing kKind = CUMEMPOOL_BACKING_CUDA_MALLOC;
  static constexpr bool kCanSleep = false;  // an address without memory goes to others
  static constexpr bool kCanExport = false;
  static constexpr bool kCanExtend = false;
  static constexpr bool kFreeWaits = true;

  // Allocates. Throws Error, and then holds nothing.
  CudaMallocBacking(driver::Driver driver, MemoryStats& stats, int device, std::size_t bytes);
  ~CudaMallocBacking();
  CudaMallocBacking(CudaMallocBacking&& other) noexcept;
  CudaMallocBacking(const CudaMallocBacking&) = delete;
  CudaMallocBacking& operator=(const CudaMallocBacking&) = delete;
  CudaMallocBacking& operator=(CudaMallocBacking&&) = delete;

  cumempool_address address() const noexcept { return address_; }
  const cumempool_memory_properties* properties() const noexcept { return nullptr; }
  cumempool_physical handle() const noexcept { return 0; }
  bool mapped() const noexcept { return held_; }
  bool holds_physical() const noexcept { return held_; }
  bool needs_physical() const noexcept { return false; }

  // The range is mapped for life: these do nothing, and unmap() is not supported.
  void map(const std::vector<int>& /*devices*/) const noexcept {}
  void give_access(const std::vector<int>& /*devices*/) const noexcept {}
  cumempool_result unmap() const noexcept { return CUMEMPOOL_RESULT_NOT_SUPPORTED; }
  cumempool_result release_physical() const noexcept { return CUMEMPOOL_RESULT_SUCCESS; }
  cumempool_result release_set_aside() const noexcept { return CUMEMPOOL_RESULT_SUCCESS; }
  // Waits for work in flight and frees. Leaks the memory on failure; may be repeated.
  cumempool_result teardown() noexcept;
  void leak() noexcept;

 private:
  void recover() noexcept;

  driver::Driver driver_;
  MemoryStats* stats_;
  int device_;
  std::size_t bytes_;
  cumempool_address address_;
  bool held_ = true;
  bool leaked_ = false;
};

// A variant holds the backing in place: malloc needs no second allocation and no virtual call.
using Backing = std::variant<VmmBacking, CudaMallocBacking>;

}  // namespace cumempool::vmm
