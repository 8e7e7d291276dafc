// A driver table with exceptions: each call either succeeds or throws Error with the call's name
// and result. The table itself stays reachable for the few places that must not throw.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cumempool/driver.h"
#include "driver/error.hpp"

namespace cumempool::driver {

// A view; the table outlives every object of the core that holds one.
class Driver {
 public:
  explicit Driver(const cumempool_driver& table) : table_(&table) {}

  const cumempool_driver& table() const noexcept { return *table_; }
  const char* name() const noexcept { return table_->name; }

  void init() const;
  int device_count() const;
  std::string device_name(int device) const;
  int device_attribute(int device, cumempool_device_attribute attribute) const;
  bool peer_access(int device, int peer) const;
  bool context_active(int device) const;
  void memory_info(int device, std::uint64_t& free_bytes, std::uint64_t& total_bytes) const;

  std::size_t granularity(const cumempool_memory_properties& properties) const;
  cumempool_address reserve(std::size_t bytes) const;
  cumempool_physical create(std::size_t bytes, const cumempool_memory_properties& properties) const;
  void map(cumempool_address address, std::size_t bytes, cumempool_physical physical) const;
  // Errors name the first device.
  void set_access(cumempool_address address, std::size_t bytes, const std::vector<int>& devices,
                  cumempool_access access = CUMEMPOOL_ACCESS_READ_WRITE) const;
  cumempool_address allocate(int device, std::size_t bytes) const;

  void host_register(int device, void* pointer, std::size_t bytes) const;
  // The same where copies do without as well (C9): false where the driver pins no host memory.
  bool pin(int device, void* pointer, std::size_t bytes) const;
  cumempool_stream stream_create(int device) const;
  void stream_synchronize(int device, cumempool_stream stream) const;
  bool stream_is_capturing(int device, cumempool_stream stream) const;
  cumempool_event event_create(int device) const;
  void event_record(int device, cumempool_event event, cumempool_stream stream) const;
  void event_synchronize(int device, cumempool_event event) const;
  bool event_query(int device, cumempool_event event) const;  // whether it is done
  void stream_wait_event(int device, cumempool_stream stream, cumempool_event event) const;
  void copy_to_host(int device, void* destination, cumempool_address source, std::size_t bytes,
                    cumempool_stream stream) const;
  void copy_to_device(int device, cumempool_address destination, const void* source,
                      std::size_t bytes, cumempool_stream stream) const;
  void copy_on_device(int device, cumempool_address destination, cumempool_address source,
                      std::size_t bytes, cumempool_stream stream) const;
  void fill(int device, cumempool_address destination, std::uint8_t byte, std::size_t bytes,
            cumempool_stream stream) const;
  void digest(int device, std::uint64_t seed, const cumempool_extent* extents, std::size_t count,
              cumempool_digest* digests, cumempool_stream stream) const;
  // Errors name the device where there is only one.
  void fence(const std::vector<int>& devices) const;

 private:
  const cumempool_driver* table_;
};

// Throws the Error for a failed driver call; returns for success. `call` is the entry of the table
// ("create"); messages name the CUDA function behind it where the driver is `cuda`.
void check(const cumempool_driver& table, const char* call, cumempool_result result,
           int device = -1, std::uint64_t bytes = 0);

// Holds a device's primary context for as long as it lives.
class RetainedContext {
 public:
  RetainedContext(Driver driver, int device);
  ~RetainedContext();
  RetainedContext(const RetainedContext&) = delete;
  RetainedContext& operator=(const RetainedContext&) = delete;

 private:
  Driver driver_;
  int device_;
};

// Makes a retained context current for the calling thread, and puts back what was there before.
class ContextScope {
 public:
  ContextScope(Driver driver, int device);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  Driver driver_;
  cumempool_context_token token_{};
};

}  // namespace cumempool::driver
