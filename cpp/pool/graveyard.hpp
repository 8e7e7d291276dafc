// Records whose memory the driver would not take back, or that wait for their teardown.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>

#include "pool/record_set.hpp"

namespace cumempool::pool {

// A list that is linked through the records, so that entering one takes no memory and cannot fail:
// this happens where memory has run out, and where nothing may throw.
class RecordList {
 public:
  RecordList() = default;
  ~RecordList() {
    while (pop() != nullptr) {
    }
  }
  RecordList(RecordList&& other) noexcept : first_(std::move(other.first_)) {}
  RecordList(const RecordList&) = delete;
  RecordList& operator=(const RecordList&) = delete;
  RecordList& operator=(RecordList&&) = delete;

  void push(RecordPointer record) noexcept {
    record->next = std::move(first_);
    first_ = std::move(record);
  }
  // Null where it is empty.
  RecordPointer pop() noexcept {
    if (first_ == nullptr) return nullptr;
    RecordPointer record = std::move(first_);
    first_ = std::move(record->next);
    return record;
  }
  void swap(RecordList& other) noexcept { first_.swap(other.first_); }

 private:
  RecordPointer first_;
};

// Thread-safe.
class Graveyard {
 public:
  void put(RecordPointer record) noexcept {
    const std::lock_guard lock(mutex_);
    bytes_ += record->bytes;
    ++count_;
    records_.push(std::move(record));
  }
  RecordList take_all() noexcept {
    RecordList taken;
    if (count_ == 0) return taken;
    const std::lock_guard lock(mutex_);
    taken.swap(records_);
    bytes_ = 0;
    count_ = 0;
    return taken;
  }
  std::uint64_t bytes() const noexcept { return bytes_; }

 private:
  std::mutex mutex_;
  RecordList records_;                   // guarded by mutex_
  std::atomic<std::uint64_t> bytes_{0};  // of them
  std::atomic<std::size_t> count_{0};
};

}  // namespace cumempool::pool
