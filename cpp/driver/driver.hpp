// Calls the entries of a driver table, and throws Error with the name and result of a call that
// fails. Code that must not throw calls the table itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cumempool/driver.h"
#include "driver/error.hpp"

namespace cumempool::driver {

// Throws the Error of a failed driver call; returns for success. `call` is the entry of the table
// ("create"). If the driver is `cuda`, messages name the CUDA function behind the entry.
void check(const cumempool_driver& table, const char* call, cumempool_result result,
           int device = -1, std::uint64_t bytes = 0);
// Throws the Error of a call that has failed.
[[noreturn]] void fail(const cumempool_driver& table, const char* call, cumempool_result result,
                       int device, std::uint64_t bytes);

// A view of a driver table, which outlives every object of the core that holds a view.
class Driver {
 public:
  explicit Driver(const cumempool_driver& table) : table_(&table) {}

  const cumempool_driver& table() const noexcept { return *table_; }
  const char* name() const noexcept { return table_->name; }

  // One method per entry of the table. It takes the arguments of the entry after `self`, and throws
  // Error if the entry fails. Without the last argument, it returns the value that the entry writes
  // there:
  //
  //   const cumempool_physical handle = driver.create(bytes, &properties);
#define CUMEMPOOL_ENTRY(entry, function, size)                    \
  template <typename... Args>                                     \
  auto entry(Args... args) const {                                \
    return call<size>(#entry, &cumempool_driver::entry, args...); \
  }
#include "driver/entries.inc"

  // Overloads for C++ types.
  std::string device_name(int device) const;
  void set_access(
      cumempool_address address, std::size_t bytes, const std::vector<int>& devices,
      cumempool_access access = CUMEMPOOL_ACCESS_READ_WRITE) const;  // errors name the first device
  // Errors name the device if there is only one.
  void fence(const std::vector<int>& devices) const;
  // Pins host memory (host_register). Returns false if the driver pins none; copies work without
  // (C9).
  bool pin(int device, void* pointer, std::size_t bytes) const;
  // Whether the work recorded in the event is done.
  bool event_query(int device, cumempool_event event) const;

 private:
  static constexpr int NONE = -1;  // an entry without an argument that is a size

  template <int Size, typename... Params, typename... Args>
  auto call(const char* entry, cumempool_result (*cumempool_driver::*member)(void*, Params...),
            Args... args) const {
    if constexpr (sizeof...(Args) == sizeof...(Params)) {
      made<Size, Params...>(entry, (table_->*member)(table_->self, args...), args...);
    } else {
      static_assert(sizeof...(Args) + 1 == sizeof...(Params), "too few arguments, or too many");
      std::remove_pointer_t<std::tuple_element_t<sizeof...(Args), std::tuple<Params...>>> output{};
      call<Size>(entry, member, args..., &output);
      return output;
    }
  }

  template <int Size, typename... Params>
  void made(const char* entry, cumempool_result result, Params... arguments) const {
    if (result == CUMEMPOOL_RESULT_SUCCESS) return;
    std::uint64_t bytes = 0;
    if constexpr (Size != NONE) bytes = std::get<Size>(std::tie(arguments...));
    fail(*table_, entry, result, device_among(arguments...), bytes);
  }

  // Returns the device of a call: its first int, or the device of its memory properties.
  static int device_among() noexcept { return -1; }
  template <typename First, typename... Rest>
  static int device_among(const First& first, const Rest&... rest) noexcept {
    if constexpr (std::is_same_v<First, int>) {
      return first;
    } else if constexpr (std::is_same_v<First, const cumempool_memory_properties*>) {
      return first->device;
    } else {
      return device_among(rest...);
    }
  }

  const cumempool_driver* table_;
};

// Holds a device's primary context while it lives.
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

// Makes a retained context current for the calling thread, and restores the previous one.
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

// Marks children that are forked from now on. Drivers do not survive a fork, so such a child must
// make no driver call (R14). Called once a driver has been opened.
void watch_forks();

// Whether this process was forked after a driver was opened.
bool in_forked_child() noexcept;

}  // namespace cumempool::driver
