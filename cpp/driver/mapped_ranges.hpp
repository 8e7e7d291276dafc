// The ranges that were mapped and not unmapped yet. libcuda takes an unmap of several ranges at
// once and even of none; the contract takes exactly one (C6), so that a mistake shows at once.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "cumempool/driver.h"

namespace cumempool::driver {

class MappedRanges {
 public:
  // Says false, without effect, where there is no memory to remember one more.
  bool add(cumempool_address address, std::size_t bytes) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      ranges_[address] = bytes;
      return true;
    } catch (const std::bad_alloc&) {
      return false;
    }
  }

  // Forgets the range if `unmap` succeeds, and keeps it otherwise. Fails with INVALID_VALUE,
  // without the call, where exactly this range is not mapped.
  template <typename Unmap>
  cumempool_result remove(cumempool_address address, std::size_t bytes, Unmap unmap) {
    std::map<cumempool_address, std::size_t>::node_type range;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = ranges_.find(address);
      if (found == ranges_.end() || found->second != bytes) {
        return CUMEMPOOL_RESULT_INVALID_VALUE;
      }
      range = ranges_.extract(found);
    }
    const cumempool_result result = unmap();
    if (result != CUMEMPOOL_RESULT_SUCCESS) {
      const std::lock_guard<std::mutex> lock(mutex_);
      ranges_.insert(std::move(range));
    }
    return result;
  }

 private:
  std::mutex mutex_;
  std::map<cumempool_address, std::size_t> ranges_;
};

}  // namespace cumempool::driver
