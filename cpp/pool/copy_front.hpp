// How far the copies of one device have come, and how long those of each tag took.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>

#include "backup/copy_queue.hpp"
#include "pool/allocator.hpp"
#include "pool/report.hpp"

namespace cumempool::pool {

// Takes allocations in the order of their copies. Every call inside a ContextScope of the queue's
// device, but for construction.
class CopyFront {
 public:
  CopyFront(backup::CopyQueue& queue, Report& report, Progress& progress)
      : queue_(queue),
        report_(report),
        progress_(progress),
        seen_(queue.enqueued()),
        since_(Clock::now()) {}

  // The first copy is about to begin: time counts from here.
  void begin() { since_ = Clock::now(); }
  // The copies of `item`, an allocation that `record` is, are in the queue: all that was enqueued
  // since the last call.
  void push(std::size_t item, const Record& record);
  // The same for copies that threads took part in, and that took `seconds`.
  void push_staged(std::size_t item, const Record& record, double seconds);
  // Adds time to what push_staged() took last.
  void add_staged(double seconds);
  // Enters the times of what has finished meanwhile.
  void poll();
  bool empty() const noexcept { return entries_.empty(); }
  std::size_t oldest() const { return entries_.front().item; }
  // Waits for the oldest, takes it out, and returns its item. Throws Error; then it is still there.
  std::size_t pop();

 private:
  struct Entry {
    std::size_t item = 0;
    const Record* record = nullptr;
    std::optional<std::size_t> mark;  // none: done
  };

  void finish(Entry& entry);

  backup::CopyQueue& queue_;
  Report& report_;
  Progress& progress_;
  std::deque<Entry> entries_;
  const Record* last_staged_ = nullptr;
  std::size_t finished_ = 0;  // entries at the front whose time is entered
  std::uint64_t seen_;        // commands of the queue at the last push
  Clock::time_point since_;   // when the last one finished, or the first began
};

}  // namespace cumempool::pool
