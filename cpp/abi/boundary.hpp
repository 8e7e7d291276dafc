// The boundary that no exception crosses: turns exceptions of the core into a status and the
// thread's last error, and refuses every call in a forked child.
#pragma once

#include <exception>
#include <new>
#include <string>
#include <utility>

#include "abi/last_error.hpp"
#include "driver/driver.hpp"

namespace cumempool::abi {

inline Error forked_error() {
  Error error(CUMEMPOOL_FORKED, "called in a child forked after the driver was opened");
  error.advice = "start processes with the spawn or forkserver method";
  return error;
}

template <typename Body>
cumempool_status guarded(const char* operation, Body&& body) noexcept {
  // The handlers must not need memory: there may be none left.
  try {
    try {
      if (driver::in_forked_child()) throw forked_error();
      std::forward<Body>(body)();
      return CUMEMPOOL_OK;
    } catch (const Error& error) {
      return set_last_error(operation, error);
    } catch (const std::bad_alloc&) {
      return set_last_error(CUMEMPOOL_OUT_OF_HOST_MEMORY, "out of host memory");
    } catch (const std::exception& error) {
      const std::string problem = std::string("unexpected failure: ") + error.what();
      return set_last_error(operation, Error(CUMEMPOOL_INTERNAL, problem));
    }
  } catch (const std::exception&) {
    return set_last_error(CUMEMPOOL_INTERNAL,
                          "unexpected failure, and no host memory to describe it");
  }
}

// Throws Error (CUMEMPOOL_INVALID_ARGUMENT) unless `condition`.
inline void require(bool condition, const char* problem) {
  if (!condition) throw Error(CUMEMPOOL_INVALID_ARGUMENT, problem);
}

}  // namespace cumempool::abi
