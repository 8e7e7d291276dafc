// A device's private stream: copies and fills in order.
#pragma once

#include <cstddef>

#include "driver/driver.hpp"

namespace cumempool::backup {

// One thread at a time. Every call, construction and destruction included, is made inside a
// ContextScope of the device. Destruction does not wait: drain() first.
class CopyQueue {
 public:
  CopyQueue(driver::Driver driver, int device);
  ~CopyQueue();
  CopyQueue(const CopyQueue&) = delete;
  CopyQueue& operator=(const CopyQueue&) = delete;

  int device() const noexcept { return device_; }

  // Enqueue; throw Error. Both sides stay valid until a later drain() has returned.
  void to_host(std::byte* destination, cumempool_address source, std::size_t bytes);
  void to_device(cumempool_address destination, const std::byte* source, std::size_t bytes);
  void fill_zero(cumempool_address destination, std::size_t bytes);

  // Waits until everything enqueued so far is done: throws Error for what failed in between.
  void drain();

 private:
  driver::Driver driver_;
  int device_;
  cumempool_stream stream_;
};

}  // namespace cumempool::backup
