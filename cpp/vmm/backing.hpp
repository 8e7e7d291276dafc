// What an allocation is made of: an address for life, and the memory behind it. The classes are
// alike in what they can be asked and told, so that `Allocation` works on any of them:
//
//   kKind, kCanSleep, kCanExport, kCanExtend, kFreeWaits     what it is, and what it can do
//   address(), properties(), handle(), mapped(), holds_physical()
//   needs_physical(), map(), give_access(), unmap(), release_physical(), release_set_aside(),
//   teardown(), leak()
//
// What the driver refuses to take back is leaked: counted, kept, and tried once more when all of
// the allocation is to go (ADR 35).
//
// None of them knows who may use the memory, or why it comes and goes.
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

// Bytes that backings hold from the driver: created minus released, and so on (R13). A backing
// counts its own successful driver calls; nobody else writes here.
struct MemoryStats {
  std::atomic<std::uint64_t> reserved_bytes{0};
  std::atomic<std::uint64_t> physical_bytes{0};
  std::atomic<std::uint64_t> peak_physical_bytes{0};  // the most of them since reset_peaks()
  std::atomic<std::uint64_t> mapped_bytes{0};
  // Of backings, and of handles set aside, that the driver refused to take back.
  std::atomic<std::uint64_t> leaked_bytes{0};

  void add_physical(std::uint64_t bytes) noexcept { raise_peak(physical_bytes += bytes); }
  // What is taken meanwhile counts.
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

// Virtual memory: reserved addresses, to which physical memory comes and from which it goes, in
// steps. How far it got is one number, so that the way back undoes exactly what was done.
class VmmBacking {
 public:
  static constexpr cumempool_backing kKind = CUMEMPOOL_BACKING_VMM;
  static constexpr bool kCanSleep = true;    // its memory can go while its address stays
  static constexpr bool kCanExport = true;   // it has a handle, which other processes can import
  static constexpr bool kCanExtend = true;   // more devices can be let in later
  static constexpr bool kFreeWaits = false;  // teardown() waits for work in flight on the device

  // Reserves addresses. Throws Error; then nothing is held.
  VmmBacking(driver::Driver driver, MemoryStats& stats,
             const cumempool_memory_properties& properties, std::size_t bytes);
  ~VmmBacking();
  VmmBacking(VmmBacking&& other) noexcept;
  VmmBacking(const VmmBacking&) = delete;
  VmmBacking& operator=(const VmmBacking&) = delete;
  VmmBacking& operator=(VmmBacking&&) = delete;

  cumempool_address address() const noexcept { return address_; }
  // What its memory is made with each time.
  const cumempool_memory_properties* properties() const noexcept { return &properties_; }
  // What the driver exports; only while physical memory is held.
  cumempool_physical handle() const noexcept { return handle_; }
  // Mapped without access is not usable, and so not mapped.
  bool mapped() const noexcept { return held_ == Held::kAccess; }
  bool holds_physical() const noexcept { return held_ >= Held::kPhysical; }
  // Whether map() takes device memory: no handle is held that it may use.
  bool needs_physical() const noexcept {
    return held_ < Held::kPhysical || (leaked_ && held_ == Held::kPhysical);
  }

  // Takes memory that was imported over, as long as none is held: map() makes none then.
  void adopt(cumempool_physical imported) noexcept;
  // Makes the addresses usable by the devices. Throws Error; status CUMEMPOOL_OUT_OF_MEMORY where
  // the device has no room. Undoes its own steps then; what cannot be undone is leaked. No effect
  // where it is mapped. A leaked handle is set aside, and a new one made. A leaked mapping is used
  // again, because nothing else can be mapped at its addresses.
  void map(const std::vector<int>& devices, cumempool_access access = CUMEMPOOL_ACCESS_READ_WRITE);
  // Lets more devices in, while it is mapped. Throws Error; then access is as before.
  void give_access(const std::vector<int>& devices);
  // The steps back, each from where the one before has led to. On failure all stays held, and the
  // call may be repeated. The caller has made sure that no work in flight uses the memory (R5).
  cumempool_result unmap() noexcept;
  cumempool_result release_physical() noexcept;
  cumempool_result release_set_aside() noexcept;
  cumempool_result release_addresses() noexcept;
  // All of them. Stops at the first failure; then what is left is leaked, and it may be repeated.
  cumempool_result teardown() noexcept;

  // Counts what is held as leaked.
  void leak() noexcept;

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
  bool leaked_ = false;                              // what the members above hold
  std::forward_list<cumempool_physical> set_aside_;  // leaked handles that were replaced
};

// Memory of cudaMalloc: it is there and mapped from the start, and goes as a whole.
class CudaMallocBacking {
 public:
  static constexpr cumempool_backing kKind = CUMEMPOOL_BACKING_CUDA_MALLOC;
  static constexpr bool kCanSleep = false;  // without the memory, others get the address
  static constexpr bool kCanExport = false;
  static constexpr bool kCanExtend = false;
  static constexpr bool kFreeWaits = true;

  // Throws Error; then nothing is held.
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

  // There is nothing to do, and for unmap() no way.
  void map(const std::vector<int>& /*devices*/) const noexcept {}
  void give_access(const std::vector<int>& /*devices*/) const noexcept {}
  cumempool_result unmap() const noexcept { return CUMEMPOOL_RESULT_NOT_SUPPORTED; }
  cumempool_result release_physical() const noexcept { return CUMEMPOOL_RESULT_SUCCESS; }
  cumempool_result release_set_aside() const noexcept { return CUMEMPOOL_RESULT_SUCCESS; }
  // On failure it is leaked; may be repeated.
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

// A closed set, held in place: malloc makes no second allocation for it, and no virtual call.
using Backing = std::variant<VmmBacking, CudaMallocBacking>;

}  // namespace cumempool::vmm
