// Host memory that was registered with the host driver for copies.
#include "driver/host_registration.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <iterator>

namespace cumempool::driver {
namespace {

std::uintptr_t number(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

}  // namespace

cumempool_result HostRegistrations::add(const void* pointer, std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = number(pointer);
  if (begin == 0 || begin % page != 0 || bytes == 0 || bytes % page != 0 || begin + bytes < begin) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  const auto next = ranges_.lower_bound(begin);
  if ((next != ranges_.end() && next->first - begin < bytes) ||
      (next != ranges_.begin() && begin - std::prev(next)->first < std::prev(next)->second)) {
    return CUMEMPOOL_RESULT_HOST_MEMORY_ALREADY_REGISTERED;
  }
  // msync changes nothing here; it fails where a page is not mapped.
  if (msync(const_cast<void*>(pointer), bytes, MS_ASYNC) != 0) {  // NOLINT
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  ranges_.emplace(begin, bytes);
  return CUMEMPOOL_RESULT_SUCCESS;
}

std::size_t HostRegistrations::bytes_at(const void* pointer) const {
  const auto found = ranges_.find(number(pointer));
  return found == ranges_.end() ? 0 : found->second;
}

void HostRegistrations::remove(const void* pointer) { ranges_.erase(number(pointer)); }

bool HostRegistrations::holds(const void* pointer, std::size_t bytes) const {
  const std::uintptr_t begin = number(pointer);
  const auto next = ranges_.upper_bound(begin);
  if (next == ranges_.begin()) return false;
  const auto& [range, size] = *std::prev(next);
  return begin - range <= size && bytes <= size - (begin - range);
}

std::uint64_t HostRegistrations::bytes() const {
  std::uint64_t total = 0;
  for (const auto& range : ranges_) total += range.second;
  return total;
}

}  // namespace cumempool::driver
