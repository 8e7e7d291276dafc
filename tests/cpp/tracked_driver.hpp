// A driver that passes every call on to another one and knows what is held of it, so that leaks
// show on drivers that do not count. Each device has a budget, so that memory runs out on any.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <utility>

#include "cumempool/driver.h"
#include "driver/host_driver.hpp"

namespace cumempool::tests {

// One at a time in a process: entries get the inner driver's `self`, and find this by a static.
class TrackedDriver {
 public:
  // `inner` outlives this object, and this object everything that uses table().
  TrackedDriver(const cumempool_driver& inner, std::uint64_t bytes_per_device)
      : inner_(inner), budget_(bytes_per_device), table_(inner) {
    if (live_ != nullptr) throw std::runtime_error("a driver is tracked already");
    live_ = this;
    table_.memory_info = &memory_info;
    table_.context_retain = &context_retain;
    table_.context_release = &context_release;
    table_.reserve = &reserve;
    table_.unreserve = &unreserve;
    table_.create = &create;
    table_.release = &release;
    table_.map = &map;
    table_.unmap = &unmap;
    table_.import_handle = &import_handle;
    table_.allocate = &allocate;
    table_.deallocate = &deallocate;
    table_.host_register = &host_register;
    table_.host_unregister = &host_unregister;
    table_.stream_create = &stream_create;
    table_.stream_destroy = &stream_destroy;
    table_.event_create = &event_create;
    table_.event_destroy = &event_destroy;
  }
  ~TrackedDriver() {
    const driver::HostDriverCounters left = counters();
    EXPECT_EQ(left.reserved_bytes, 0U);
    EXPECT_EQ(left.handles + left.mapped_bytes + left.allocations, 0U);
    EXPECT_EQ(left.charged_bytes, 0U);
    EXPECT_EQ(left.registered_bytes, 0U);
    EXPECT_EQ(left.streams + left.events + left.retained_contexts, 0U);
    live_ = nullptr;
  }
  TrackedDriver(const TrackedDriver&) = delete;
  TrackedDriver(TrackedDriver&&) = delete;
  TrackedDriver& operator=(const TrackedDriver&) = delete;
  TrackedDriver& operator=(TrackedDriver&&) = delete;

  const cumempool_driver& table() const noexcept { return table_; }

  driver::HostDriverCounters counters() const {
    driver::HostDriverCounters counted;
    const std::lock_guard lock(mutex_);
    counted.reservations = reservations_.size();
    for (const auto& [address, bytes] : reservations_) counted.reserved_bytes += bytes;
    counted.handles = handles_.size();
    counted.mappings = mappings_.size();
    for (const auto& [address, mapping] : mappings_) counted.mapped_bytes += mapping.first;
    counted.allocations = allocations_.size();
    for (const auto& [device, bytes] : charged()) counted.charged_bytes += bytes;
    counted.registrations = registrations_.size();
    for (const auto& [pointer, bytes] : registrations_) counted.registered_bytes += bytes;
    counted.streams = streams_;
    counted.events = events_;
    counted.retained_contexts = contexts_;
    return counted;
  }

 private:
  // Goes back to the device with its last handle or mapping.
  struct Memory {
    int device;
    std::uint64_t bytes;
  };
  using MemoryPointer = std::shared_ptr<const Memory>;

  static TrackedDriver& live() { return *live_; }
  static bool good(cumempool_result result) { return result == CUMEMPOOL_RESULT_SUCCESS; }

  // By device. With the lock held.
  std::map<int, std::uint64_t> charged() const {
    std::set<const Memory*> all;
    for (const auto& [physical, memory] : handles_) all.insert(memory.get());
    for (const auto& [address, mapping] : mappings_) all.insert(mapping.second.get());
    std::map<int, std::uint64_t> bytes;
    for (const Memory* memory : all) bytes[memory->device] += memory->bytes;
    for (const auto& [address, memory] : allocations_) bytes[memory.device] += memory.bytes;
    return bytes;
  }
  bool has_room(int device, std::uint64_t bytes) const {
    return charged()[device] + bytes <= budget_;
  }

  static cumempool_result memory_info(void* /*self*/, int device, std::uint64_t* free_bytes,
                                      std::uint64_t* total_bytes) {
    TrackedDriver& here = live();
    const auto result = here.inner_.memory_info(here.inner_.self, device, free_bytes, total_bytes);
    const std::lock_guard lock(here.mutex_);
    *total_bytes = here.budget_;
    *free_bytes = here.budget_ - here.charged()[device];
    return result;
  }
  static cumempool_result context_retain(void* self, int device) {
    return counted(live().contexts_, 1, live().inner_.context_retain(self, device));
  }
  static cumempool_result context_release(void* self, int device) {
    return counted(live().contexts_, -1, live().inner_.context_release(self, device));
  }
  static cumempool_result stream_create(void* self, int device, cumempool_stream* stream) {
    return counted(live().streams_, 1, live().inner_.stream_create(self, device, stream));
  }
  static cumempool_result stream_destroy(void* self, int device, cumempool_stream stream) {
    return counted(live().streams_, -1, live().inner_.stream_destroy(self, device, stream));
  }
  static cumempool_result event_create(void* self, int device, cumempool_event* event) {
    return counted(live().events_, 1, live().inner_.event_create(self, device, event));
  }
  static cumempool_result event_destroy(void* self, int device, cumempool_event event) {
    return counted(live().events_, -1, live().inner_.event_destroy(self, device, event));
  }
  static cumempool_result counted(std::atomic<std::uint64_t>& count, int change,
                                  cumempool_result result) {
    if (good(result)) count += static_cast<std::uint64_t>(change);
    return result;
  }

  // The lock is held across calls of which others could get the same number back meanwhile.
  static cumempool_result reserve(void* self, std::size_t bytes, cumempool_address* address) {
    TrackedDriver& here = live();
    const std::lock_guard lock(here.mutex_);
    const auto result = here.inner_.reserve(self, bytes, address);
    if (good(result)) here.reservations_[*address] = bytes;
    return result;
  }
  static cumempool_result unreserve(void* self, cumempool_address address, std::size_t bytes) {
    TrackedDriver& here = live();
    const std::lock_guard lock(here.mutex_);
    const auto result = here.inner_.unreserve(self, address, bytes);
    if (good(result)) here.reservations_.erase(address);
    return result;
  }
  static cumempool_result create(void* self, std::size_t bytes,
                                 const cumempool_memory_properties* properties,
                                 cumempool_physical* physical) {
    TrackedDriver& here = live();
    const std::lock_guard lock(here.mutex_);
    if (!here.has_room(properties->device, bytes)) return CUMEMPOOL_RESULT_OUT_OF_MEMORY;
    const auto result = here.inner_.create(self, bytes, properties, physical);
    if (good(result)) here.hold(*physical, {properties->device, bytes});
    return result;
  }
  // The memory is counted where it was made.
  static cumempool_result import_handle(void* self, const void* exported, std::uint32_t handle_type,
                                        cumempool_physical* physical) {
    TrackedDriver& here = live();
    const std::lock_guard lock(here.mutex_);
    const auto result = here.inner_.import_handle(self, exported, handle_type, physical);
    if (good(result)) here.hold(*physical, {-1, 0});
    return result;
  }
  void hold(cumempool_physical physical, Memory memory) {
    handles_.emplace(physical, std::make_shared<const Memory>(memory));
  }
  static cumempool_result release(void* self, cumempool_physical physical) {
    TrackedDriver& here = live();
    const std::lock_guard lock(here.mutex_);
    const auto result = here.inner_.release(self, physical);
    if (good(result)) here.handles_.erase(here.handles_.find(physical));
    return result;
  }
  static cumempool_result map(void* self, cumempool_address address, std::size_t bytes,
                              cumempool_physical physical) {
    TrackedDriver& here = live();
    const std::lock_guard lock(here.mutex_);
    const auto result = here.inner_.map(self, address, bytes, physical);
    if (good(result)) here.mappings_[address] = {bytes, here.handles_.find(physical)->second};
    return result;
  }
  static cumempool_result unmap(void* self, cumempool_address address, std::size_t bytes) {
    TrackedDriver& here = live();
    const std::lock_guard lock(here.mutex_);
    const auto result = here.inner_.unmap(self, address, bytes);
    if (good(result)) here.mappings_.erase(address);
    return result;
  }
  static cumempool_result allocate(void* self, int device, std::size_t bytes,
                                   cumempool_address* address) {
    TrackedDriver& here = live();
    const std::lock_guard lock(here.mutex_);
    if (!here.has_room(device, bytes)) return CUMEMPOOL_RESULT_OUT_OF_MEMORY;
    const auto result = here.inner_.allocate(self, device, bytes, address);
    if (good(result)) here.allocations_[*address] = {device, bytes};
    return result;
  }
  static cumempool_result deallocate(void* self, int device, cumempool_address address) {
    TrackedDriver& here = live();
    const std::lock_guard lock(here.mutex_);
    const auto result = here.inner_.deallocate(self, device, address);
    if (good(result)) here.allocations_.erase(address);
    return result;
  }

  // Slow, and made by several threads at a time: without the lock, for callers keep the pages.
  static cumempool_result host_register(void* self, int device, void* pointer, std::size_t bytes) {
    TrackedDriver& here = live();
    const auto result = here.inner_.host_register(self, device, pointer, bytes);
    const std::lock_guard lock(here.mutex_);
    if (good(result)) here.registrations_[pointer] = bytes;
    return result;
  }
  static cumempool_result host_unregister(void* self, int device, void* pointer) {
    TrackedDriver& here = live();
    const auto result = here.inner_.host_unregister(self, device, pointer);
    const std::lock_guard lock(here.mutex_);
    if (good(result)) here.registrations_.erase(pointer);
    return result;
  }

  inline static TrackedDriver* live_ = nullptr;

  const cumempool_driver& inner_;
  const std::uint64_t budget_;
  cumempool_driver table_;
  std::atomic<std::uint64_t> contexts_{0};
  std::atomic<std::uint64_t> streams_{0};
  std::atomic<std::uint64_t> events_{0};
  mutable std::mutex mutex_;  // guards everything below
  std::map<cumempool_address, std::uint64_t> reservations_;
  std::multimap<cumempool_physical, MemoryPointer> handles_;  // an import may get a known number
  std::map<cumempool_address, std::pair<std::uint64_t, MemoryPointer>> mappings_;
  std::map<cumempool_address, Memory> allocations_;
  std::map<void*, std::uint64_t> registrations_;
};

}  // namespace cumempool::tests
