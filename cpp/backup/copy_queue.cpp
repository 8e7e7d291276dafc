// A device's private stream: copies and fills in order.
#include "backup/copy_queue.hpp"

namespace cumempool::backup {

CopyQueue::CopyQueue(driver::Driver driver, int device)
    : driver_(driver), device_(device), stream_(driver.stream_create(device)) {}

CopyQueue::~CopyQueue() {
  const auto& table = driver_.table();
  table.stream_destroy(table.self, device_, stream_);
}

void CopyQueue::to_host(std::byte* destination, cumempool_address source, std::size_t bytes) {
  driver_.copy_to_host(device_, destination, source, bytes, stream_);
}

void CopyQueue::to_device(cumempool_address destination, const std::byte* source,
                          std::size_t bytes) {
  driver_.copy_to_device(device_, destination, source, bytes, stream_);
}

void CopyQueue::fill_zero(cumempool_address destination, std::size_t bytes) {
  driver_.fill(device_, destination, 0, bytes, stream_);
}

void CopyQueue::drain() { driver_.stream_synchronize(device_, stream_); }

}  // namespace cumempool::backup
