// A device's private stream: copies and fills in order, and marks that tell how far it has come.
#include "backup/copy_queue.hpp"

namespace cumempool::backup {

CopyQueue::CopyQueue(driver::Driver driver, int device)
    : driver_(driver), device_(device), stream_(driver.stream_create(device)) {}

CopyQueue::~CopyQueue() {
  const auto& table = driver_.table();
  for (const cumempool_event event : events_) table.event_destroy(table.self, device_, event);
  table.stream_destroy(table.self, device_, stream_);
}

void CopyQueue::to_host(std::byte* destination, cumempool_address source, std::size_t bytes) {
  driver_.copy_to_host(device_, destination, source, bytes, stream_);
  ++enqueued_;
}

void CopyQueue::to_device(cumempool_address destination, const std::byte* source,
                          std::size_t bytes) {
  driver_.copy_to_device(device_, destination, source, bytes, stream_);
  ++enqueued_;
}

void CopyQueue::fill_zero(cumempool_address destination, std::size_t bytes) {
  driver_.fill(device_, destination, 0, bytes, stream_);
  ++enqueued_;
}

void CopyQueue::drain() {
  driver_.stream_synchronize(device_, stream_);
  used_events_ = 0;
}

std::size_t CopyQueue::mark() {
  if (used_events_ == events_.size()) {
    events_.reserve(events_.size() + 1);
    events_.push_back(driver_.event_create(device_));
  }
  driver_.event_record(device_, events_[used_events_], stream_);
  return used_events_++;
}

void CopyQueue::wait(std::size_t mark) { driver_.event_synchronize(device_, events_[mark]); }

}  // namespace cumempool::backup
