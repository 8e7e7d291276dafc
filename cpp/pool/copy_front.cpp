// How far the copies of one device have come, and how long those of each tag took.
#include "pool/copy_front.hpp"

namespace cumempool::pool {

void CopyFront::push(std::size_t item, const Record& record) {
  Entry entry{item, &record, std::nullopt};
  if (queue_.enqueued() != seen_) {
    entry.mark = queue_.mark();
    seen_ = queue_.enqueued();
  }
  entries_.push_back(entry);
}

void CopyFront::push_staged(std::size_t item, const Record& record, double seconds) {
  poll();
  last_staged_ = &record;
  seen_ = queue_.enqueued();
  add_staged(seconds);
  entries_.push_back({item, &record, std::nullopt});
}

void CopyFront::add_staged(double seconds) {
  if (last_staged_ == nullptr) return;
  report_.row(*last_staged_).copy_seconds += seconds;
  if (finished_ == entries_.size()) since_ = Clock::now();
}

void CopyFront::finish(Entry& entry) {
  if (entry.mark) {
    queue_.end_mark(*entry.mark);
    entry.mark.reset();
    const Clock::time_point now = Clock::now();
    report_.row(*entry.record).copy_seconds += std::chrono::duration<double>(now - since_).count();
    since_ = now;
  }
  progress_.done += entry.record->bytes;
  ++finished_;
}

void CopyFront::poll() {
  while (finished_ < entries_.size()) {
    Entry& entry = entries_[finished_];
    if (entry.mark && !queue_.done(*entry.mark)) return;
    finish(entry);
  }
}

std::size_t CopyFront::pop() {
  Entry& entry = entries_.front();
  if (finished_ == 0) {
    if (entry.mark) queue_.wait(*entry.mark);
    finish(entry);
  }
  const std::size_t item = entry.item;
  entries_.pop_front();
  --finished_;
  return item;
}

}  // namespace cumempool::pool
