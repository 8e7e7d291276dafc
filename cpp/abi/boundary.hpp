// The boundary that no exception crosses: turns what the core throws into a status and the thread's
// last error, and refuses every call in a forked child.
#pragma once

#include <exception>
#include <new>
#include <string>
#include <utility>

#include "abi/last_error.hpp"
#include "driver/fork.hpp"

namespace cumempool::abi {

inline Error forked_error() {
  Error error(CUMEMPOOL_FORKED, "called in a child forked after the driver was opened");
  error.advice = "start processes with the spawn or forkserver method";
  return error;
}

template <typename Body>
cumempool_status guarded(const char* operation, Body&& body) noexcept {
  const auto fail = [operation](Error error) {
    if (error.operation.empty()) error.operation = operation;
    return set_last_error(error);
  };
  try {
    if (driver::in_forked_child()) return fail(forked_error());
    std::forward<Body>(body)();
    return CUMEMPOOL_OK;
  } catch (const Error& error) {
    return fail(error);
  } catch (const std::bad_alloc&) {
    return fail(Error(CUMEMPOOL_OUT_OF_HOST_MEMORY, "out of host memory"));
  } catch (const std::exception& error) {
    return fail(Error(CUMEMPOOL_INTERNAL, std::string("unexpected failure: ") + error.what()));
  }
}

// Throws Error (CUMEMPOOL_INVALID_ARGUMENT) unless `condition`.
inline void require(bool condition, const char* problem) {
  if (!condition) throw Error(CUMEMPOOL_INVALID_ARGUMENT, problem);
}

}  // namespace cumempool::abi
