// Addresses that are held, each with what must be named along with it: the bytes of a mapping, the
// device of an allocation. libcuda unmaps several ranges at once and even none, and frees what
// others have allocated; the contract takes exactly one pair (C6), so that a mistake shows at once.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "cumempool/driver.h"

namespace cumempool::driver {

class ExactPairs {
 public:
  // Says false, without effect, where there is no memory to remember one more.
  bool add(cumempool_address address, std::uint64_t with) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      pairs_.insert_or_assign(pairs_.end(), address, with);  // addresses ascend, mostly
      return true;
    } catch (const std::bad_alloc&) {
      return false;
    }
  }

  // Forgets the pair if `give_back` succeeds, and keeps it otherwise. Fails with INVALID_VALUE,
  // without the call, where exactly this pair is not held. No lock is held during the call.
  template <typename GiveBack>
  cumempool_result remove(cumempool_address address, std::uint64_t with, GiveBack give_back) {
    std::map<cumempool_address, std::uint64_t>::node_type pair;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = pairs_.find(address);
      if (found == pairs_.end() || found->second != with) {
        return CUMEMPOOL_RESULT_INVALID_VALUE;
      }
      pair = pairs_.extract(found);
    }
    const cumempool_result result = give_back();
    if (result != CUMEMPOOL_RESULT_SUCCESS) {
      const std::lock_guard<std::mutex> lock(mutex_);
      pairs_.insert(std::move(pair));
    }
    return result;
  }

 private:
  std::mutex mutex_;
  std::map<cumempool_address, std::uint64_t> pairs_;
};

}  // namespace cumempool::driver
