// The live records of one allocator, and the claims of the transition under way on them.
#include "pool/record_set.hpp"

#include "driver/error.hpp"

namespace cumempool::pool {

void RecordSet::add(const RecordPointer& record) {
  const std::lock_guard lock(mutex_);
  if (sealed_) throw Error(CUMEMPOOL_CLOSED, "the allocator is closed");
  record->sequence = next_sequence_;
  records_.emplace(next_sequence_, record);
  ++next_sequence_;
}

bool RecordSet::retire(const RecordPointer& record) {
  const std::lock_guard lock(mutex_);
  if (record->claimed) {
    record->doomed = true;
    return false;
  }
  records_.erase(record->sequence);
  return true;
}

std::vector<RecordPointer> RecordSet::claim(const std::function<bool(const Record&)>& wanted) {
  const std::lock_guard lock(mutex_);
  std::vector<RecordPointer> claimed;
  for (const auto& [sequence, record] : records_) {
    if (wanted(*record)) claimed.push_back(record);
  }
  for (const RecordPointer& record : claimed) record->claimed = true;
  return claimed;
}

std::vector<RecordPointer> RecordSet::unclaim(const std::vector<RecordPointer>& claimed) {
  const std::lock_guard lock(mutex_);
  std::vector<RecordPointer> doomed;
  for (const RecordPointer& record : claimed) {
    record->claimed = false;
    if (record->doomed) {
      records_.erase(record->sequence);
      doomed.push_back(record);
    }
  }
  return doomed;
}

void RecordSet::for_each(const std::function<void(Record&)>& visit) {
  const std::lock_guard lock(mutex_);
  for (const auto& entry : records_) visit(*entry.second);
}

void RecordSet::update(const std::function<void()>& change) {
  const std::lock_guard lock(mutex_);
  change();
}

bool RecordSet::seal(bool only_if_empty) {
  const std::lock_guard lock(mutex_);
  if (only_if_empty && !records_.empty()) return false;
  sealed_ = true;
  return true;
}

}  // namespace cumempool::pool
