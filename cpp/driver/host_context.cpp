// Primary contexts of the host driver.
#include "driver/host_context.hpp"

#include <atomic>
#include <map>
#include <numeric>

namespace cumempool::driver {
namespace {

using Stack = std::vector<int>;  // devices; the last one is current

std::uint64_t next_serial() {
  static std::atomic<std::uint64_t> serial{0};
  return ++serial;
}

std::map<std::uint64_t, Stack>& stacks_of_thread() {
  thread_local std::map<std::uint64_t, Stack> stacks;
  return stacks;
}

}  // namespace

HostContexts::HostContexts(int device_count)
    : serial_(next_serial()),
      retains_(static_cast<std::size_t>(device_count), 0),
      others_(static_cast<std::size_t>(device_count), 0) {}

cumempool_result HostContexts::enter(int device, cumempool_context_token& token) {
  if (!held(device)) return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  Stack& stack = stacks_of_thread()[serial_];
  stack.push_back(device);
  ++entered_;
  token = {static_cast<std::uint64_t>(stack.size()), 0, device};
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostContexts::leave(const cumempool_context_token& token) {
  auto& stacks = stacks_of_thread();
  const auto found = stacks.find(serial_);
  if (found == stacks.end() || found->second.empty()) return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  Stack& stack = found->second;
  if (token.context != stack.size() || token.device != stack.back()) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  stack.pop_back();
  if (stack.empty()) stacks.erase(found);
  --entered_;
  return CUMEMPOOL_RESULT_SUCCESS;
}

bool HostContexts::current(int device) const {
  const auto& stacks = stacks_of_thread();
  const auto found = stacks.find(serial_);
  return found != stacks.end() && !found->second.empty() && found->second.back() == device &&
         held(device);
}

std::uint64_t HostContexts::retained() const {
  return std::accumulate(retains_.begin(), retains_.end(), std::uint64_t{0});
}

}  // namespace cumempool::driver
