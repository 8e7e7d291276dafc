// The simulated devices of one host driver: their contexts, memory and work behind one lock.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "cumempool/cumempool.h"
#include "cumempool/driver.h"
#include "driver/host_driver.hpp"
#include "driver/host_memory.hpp"
#include "driver/host_work.hpp"

namespace cumempool::driver {

// Primary contexts: how often each is retained, and the current one of each thread.
class HostContexts {
 public:
  explicit HostContexts(int device_count);

  // held: through the table, which knows no other contexts. active: that, or by other libraries.
  bool held(int device) const { return retains_[index(device)] != 0; }
  bool active(int device) const { return held(device) || others_[index(device)] != 0; }
  void retain(int device) { ++retains_[index(device)]; }
  // Returns whether the context is gone. It must be held.
  bool release(int device) {
    --retains_[index(device)];
    return !active(device);
  }
  // The same by other libraries of the process, past the table.
  void retain_for_others(int device) { ++others_[index(device)]; }
  bool release_for_others(int device) {
    --others_[index(device)];
    return !active(device);
  }

  cumempool_result enter(int device, cumempool_context_token& token);
  cumempool_result leave(const cumempool_context_token& token);
  // Whether the calling thread is inside context_enter of the device and its context exists.
  bool current(int device) const;

  std::uint64_t retained() const;  // through the table
  std::uint64_t entered() const noexcept { return entered_; }

 private:
  static std::size_t index(int device) { return static_cast<std::size_t>(device); }

  const std::uint64_t serial_;  // tells this driver from others in the stacks of the threads
  std::vector<std::uint64_t> retains_;
  std::vector<std::uint64_t> others_;
  std::uint64_t entered_ = 0;
};

// Ranges of host memory that are registered for copies.
class HostRegistrations {
 public:
  // Refuses pages that are not mapped or already registered.
  cumempool_result add(const void* pointer, std::size_t bytes);
  // Bytes of the registration that begins at `pointer`, or 0.
  std::size_t bytes_at(const void* pointer) const;
  void remove(const void* pointer);
  // Whether a single registration holds the range.
  bool holds(const void* pointer, std::size_t bytes) const;

  std::size_t count() const noexcept { return ranges_.size(); }
  std::uint64_t bytes() const;

 private:
  std::map<std::uintptr_t, std::size_t> ranges_;
};

// Implements the table behind one mutex. The classes above do not lock.
class HostDevices {
 public:
  explicit HostDevices(const cumempool_host_driver_options& options);

  cumempool_driver table{};  // filled by make_host_driver

  // The entries of the table.
  cumempool_result init();
  cumempool_result driver_version(int* version);
  cumempool_result device_count(int* count);
  cumempool_result device_name(int device, char* name, std::size_t bytes);
  cumempool_result device_attribute(int device, cumempool_device_attribute attribute, int* value);
  cumempool_result peer_access(int device, int peer, int* possible);
  cumempool_result memory_info(int device, std::uint64_t* free_bytes, std::uint64_t* total_bytes);
  cumempool_result context_active(int device, int* active);
  cumempool_result context_retain(int device);
  cumempool_result context_release(int device);
  cumempool_result context_enter(int device, cumempool_context_token* token);
  cumempool_result context_leave(const cumempool_context_token* token);
  cumempool_result create(std::size_t bytes, const cumempool_memory_properties* properties,
                          cumempool_physical* physical);
  cumempool_result allocate(int device, std::size_t bytes, cumempool_address* address);
  cumempool_result deallocate(int device, cumempool_address address);
  cumempool_result host_register(int device, void* pointer, std::size_t bytes);
  cumempool_result host_unregister(int device, void* pointer);
  cumempool_result stream_create(int device, cumempool_stream* stream);
  cumempool_result stream_destroy(int device, cumempool_stream stream);
  cumempool_result stream_synchronize(int device, cumempool_stream stream);
  cumempool_result stream_is_capturing(int device, cumempool_stream stream, int* capturing);
  cumempool_result event_create(int device, cumempool_event* event);
  cumempool_result event_destroy(int device, cumempool_event event);
  cumempool_result event_record(int device, cumempool_event event, cumempool_stream stream);
  cumempool_result event_synchronize(int device, cumempool_event event);
  cumempool_result event_query(int device, cumempool_event event);
  cumempool_result stream_wait_event(int device, cumempool_stream stream, cumempool_event event);
  cumempool_result copy_to_host(int device, void* destination, cumempool_address source,
                                std::size_t bytes, cumempool_stream stream);
  cumempool_result copy_to_device(int device, cumempool_address destination, const void* source,
                                  std::size_t bytes, cumempool_stream stream);
  cumempool_result copy_on_device(int device, cumempool_address destination,
                                  cumempool_address source, std::size_t bytes,
                                  cumempool_stream stream);
  cumempool_result fill(int device, cumempool_address destination, std::uint8_t byte,
                        std::size_t bytes, cumempool_stream stream);
  cumempool_result digest(int device, std::uint64_t seed, const cumempool_extent* extents,
                          std::size_t count, cumempool_digest* digests, cumempool_stream stream);
  cumempool_result fence(const int* devices, std::size_t count);

  // The entries that HostMemory implements.
  template <auto Method, typename... Args>
  cumempool_result in_memory(Args... args) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return initialised_ ? (memory_.*Method)(args...) : CUMEMPOOL_RESULT_NOT_INITIALIZED;
  }

  // For tests; see host_driver.hpp.
  HostDriverCounters counters();
  cumempool_result launch(int device, void (*function)(void*), void* argument);
  bool hold_context(int device, bool held);
  bool set_capturing(int device, cumempool_stream stream, bool capturing);
  void set_peer_access(bool possible);

 private:
  bool exists(int device) const noexcept { return device >= 0 && device < options_.device_count; }
  int fence_way() const noexcept {
    return options_.fence != 0 ? static_cast<int>(options_.fence)
                               : CUMEMPOOL_FENCE_HOST_REGISTRATION;
  }
  bool pins_host_memory() const noexcept {
    return fence_way() == CUMEMPOOL_FENCE_HOST_REGISTRATION;
  }
  HostWork& work(int device) { return *works_[static_cast<std::size_t>(device)]; }
  cumempool_result check_device(int device) const;
  cumempool_result check_context(int device);
  void lose_context(int device);
  cumempool_result submit(int device, HostCommand command, cumempool_stream stream);
  bool good_operands(int device, const HostCommand& command) const;
  bool good_digests(int device, const HostCommand& command) const;
  bool registered(const void* pointer, std::size_t bytes) const;
  std::optional<HostMark> mark_of(cumempool_event event) const;
  std::optional<std::pair<int, HostMark>> last_use(const void* pointer, std::size_t bytes) const;

  const cumempool_host_driver_options options_;
  std::mutex mutex_;             // guards all below; no thread holds it while bytes move (R7)
  std::condition_variable ran_;  // a command has run
  bool initialised_ = false;
  HostContexts contexts_;
  HostMemory memory_;
  HostRegistrations registrations_;
  std::vector<std::unique_ptr<HostWork>> works_;  // per device
  std::uint64_t next_object_ = 0x10000;           // stream or event
};

}  // namespace cumempool::driver
