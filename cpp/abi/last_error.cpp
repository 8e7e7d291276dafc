// The calling thread's last failure, for cumempool_last_error().
#include "abi/last_error.hpp"

#include <cstddef>
#include <exception>
#include <string>
#include <utility>
#include <vector>

namespace cumempool::abi {
namespace {

// The C struct, and the texts that it points to.
struct LastError {
  Error error{CUMEMPOOL_OK, ""};
  std::string message;
  std::vector<const char*> secondary;
  cumempool_error view{};

  LastError() { refresh(); }

  void refresh() {
    message = error.status == CUMEMPOOL_OK ? "" : error.message();
    secondary.resize(error.secondary.size());
    point();
  }

  // Takes no memory.
  void point() noexcept {
    for (std::size_t i = 0; i < secondary.size(); ++i) secondary[i] = error.secondary[i].c_str();
    view = {error.status,
            message.c_str(),
            error.operation.c_str(),
            error.tag.c_str(),
            error.device,
            error.bytes,
            error.driver_call.c_str(),
            error.result,
            error.driver_call.empty() ? "" : result_name(error.result),
            error.free_bytes,
            error.total_bytes,
            error.advice.c_str(),
            secondary.data(),
            secondary.size()};
  }
};

LastError& slot() {
  static thread_local LastError last;
  return last;
}

}  // namespace

cumempool_status set_last_error(const char* operation, const Error& error) noexcept {
  try {
    LastError made;
    made.error = error;
    if (made.error.operation.empty()) made.error.operation = operation;
    made.refresh();
    LastError& last = slot();
    last = std::move(made);
    last.point();  // texts may have moved
    return error.status;
  } catch (const std::exception&) {
    return set_last_error(error.status, "no host memory was left to describe the failure");
  }
}

cumempool_status set_last_error(cumempool_status status, const char* text) noexcept {
  cumempool_error& view = slot().view;
  view = {};
  view.status = status;
  view.message = text;
  view.device = -1;
  view.operation = view.tag = view.driver_call = view.result_name = view.advice = "";
  return status;
}

const cumempool_error* last_error() noexcept { return &slot().view; }

}  // namespace cumempool::abi
