// A private stream of a device, and the buffer that digests are computed into.
#include "backup/copy_queue.hpp"

#include <algorithm>
#include <exception>

#include "backup/host_pages.hpp"

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

void CopyQueue::on_device(cumempool_address destination, cumempool_address source,
                          std::size_t bytes) {
  driver_.copy_on_device(device_, destination, source, bytes, stream_);
  ++enqueued_;
}

void CopyQueue::fill_zero(cumempool_address destination, std::size_t bytes) {
  driver_.fill(device_, destination, std::uint8_t{0}, bytes, stream_);
  ++enqueued_;
}

void CopyQueue::digest(std::uint64_t seed, const cumempool_extent* extents, std::size_t count,
                       cumempool_digest* digests) {
  driver_.digest(device_, seed, extents, count, digests, stream_);
  ++enqueued_;
}

void CopyQueue::drain() {
  driver_.stream_synchronize(device_, stream_);
  free_marks_.clear();
  for (std::size_t mark = 0; mark < events_.size(); ++mark) free_marks_.push_back(mark);
}

std::size_t CopyQueue::mark() {
  if (free_marks_.empty()) {
    // Capacity for every mark, so that ending one cannot fail.
    const std::size_t room = events_.size() + 1;
    if (free_marks_.capacity() < room) free_marks_.reserve(2 * room);
    if (events_.capacity() < room) events_.reserve(2 * room);
    events_.push_back(driver_.event_create(device_));
    free_marks_.push_back(events_.size() - 1);
  }
  const std::size_t taken = free_marks_.back();
  driver_.event_record(device_, events_[taken], stream_);
  free_marks_.pop_back();
  return taken;
}

void CopyQueue::wait(std::size_t mark) { driver_.event_synchronize(device_, events_[mark]); }

bool CopyQueue::done(std::size_t mark) { return driver_.event_query(device_, events_[mark]); }

void CopyQueue::end_mark(std::size_t mark) noexcept { free_marks_.push_back(mark); }

void CopyQueue::follow(const CopyQueue& other, std::size_t mark) {
  driver_.stream_wait_event(device_, stream_, other.events_[mark]);
}

void CopyQueue::record(cumempool_event event) { driver_.event_record(device_, event, stream_); }

DigestBuffer::DigestBuffer(driver::Driver driver, int device)
    : driver_(driver), queue_(driver, device) {}

DigestBuffer::~DigestBuffer() { release(); }

void DigestBuffer::begin(std::size_t count) {
  added_ = started_ = 0;
  marks_.clear();
  if (count <= room_) return;
  if (data_ != nullptr && release() == 0) {
    throw Error(CUMEMPOOL_DRIVER_ERROR,
                "memory for digests could not be unpinned to make it larger");
  }
  constexpr std::size_t kEach = sizeof(cumempool_extent) + sizeof(cumempool_digest);
  const std::size_t wanted = (count * kEach + kHugePage - 1) / kHugePage * kHugePage;
  std::size_t got = 0;
  std::byte* data = reserve_pages(wanted, wanted, got);
  try {
    commit_pages(data, wanted, -1);
    driver_.host_register(queue_.device(), data, wanted);
  } catch (const std::exception&) {
    unreserve_pages(data, wanted);
    throw;
  }
  data_ = data;
  held_bytes_ = wanted;
  room_ = wanted / kEach;
  extents_ = reinterpret_cast<cumempool_extent*>(data_);
  digests_ = reinterpret_cast<cumempool_digest*>(extents_ + room_);
}

void DigestBuffer::add(cumempool_address address, std::size_t bytes) {
  extents_[added_++] = {address, bytes};
}

void DigestBuffer::start(std::uint64_t seed, std::size_t count) {
  queue_.digest(seed, extents_ + started_, count, digests_ + started_);
  const std::size_t mark = queue_.mark();
  started_ += count;
  marks_.emplace(started_, mark);
}

bool DigestBuffer::wait(std::size_t end) {
  const auto launch = marks_.lower_bound(end);
  if (launch == marks_.end()) return false;
  queue_.wait(launch->second);
  return true;
}

std::uint64_t DigestBuffer::release() noexcept {
  if (data_ == nullptr) return 0;
  const auto& table = driver_.table();
  // If the driver refuses, the memory stays mapped: the driver may still write to it.
  if (table.host_unregister(table.self, queue_.device(), data_) != CUMEMPOOL_RESULT_SUCCESS) {
    return 0;
  }
  unreserve_pages(data_, held_bytes_);
  const std::size_t bytes = held_bytes_.exchange(0);
  data_ = nullptr;
  room_ = 0;
  return bytes;
}

}  // namespace cumempool::backup
