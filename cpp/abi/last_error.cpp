// The calling thread's last failure, as cumempool_last_error() shows it.
#include "abi/last_error.hpp"

#include <exception>
#include <string>
#include <vector>

namespace cumempool::abi {
namespace {

// The texts that the C struct points to.
struct LastError {
  Error error{CUMEMPOOL_OK, ""};
  std::string message;
  std::vector<const char*> secondary;
  cumempool_error view{};

  LastError() { refresh(); }

  void refresh() {
    message = error.status == CUMEMPOOL_OK ? "" : error.message();
    secondary.clear();
    for (const std::string& text : error.secondary) secondary.push_back(text.c_str());
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

cumempool_status set_last_error(const Error& error) noexcept {
  try {
    slot().error = error;
    slot().refresh();
  } catch (const std::exception&) {
    // No memory for the text; the status still reaches the caller.
    slot().view.status = error.status;
  }
  return error.status;
}

const cumempool_error* last_error() noexcept { return &slot().view; }

}  // namespace cumempool::abi
