// The live records of one allocator, the scopes that hand out more of them, and the claims of the
// transition under way on them.
#include "pool/record_set.hpp"

#include "driver/error.hpp"

namespace cumempool::pool {

bool RecordSet::add(const RecordPointer& record, const std::function<bool()>& still) {
  const std::lock_guard lock(mutex_);
  if (sealed_) throw Error(CUMEMPOOL_CLOSED, "the allocator is closed");
  if (!still()) return false;
  record->place = records_.insert(records_.end(), record);
  record->sequence = next_sequence_++;
  return true;
}

bool RecordSet::retire(const RecordPointer& record) {
  const std::lock_guard lock(mutex_);
  record->freed = true;
  if (record->claimed) return false;
  records_.erase(record->place);
  return true;
}

std::vector<RecordPointer> RecordSet::claim(const std::function<bool(const Record&)>& wanted,
                                            const std::function<void()>& admit) {
  const std::lock_guard lock(mutex_);
  if (admit) admit();
  std::vector<RecordPointer> claimed;
  for (const RecordPointer& record : records_) {
    if (wanted(*record)) claimed.push_back(record);
  }
  for (const RecordPointer& record : claimed) record->claimed = true;
  return claimed;
}

void RecordSet::begin_scope(Tag& tag) noexcept {
  const std::lock_guard lock(mutex_);
  tag.scopes += 1;
  tag.scopes_changed = next_sequence_++;
}

void RecordSet::end_scope(Tag& tag) noexcept {
  const std::lock_guard lock(mutex_);
  tag.scopes -= 1;
  tag.scopes_changed = next_sequence_++;
}

std::uint64_t RecordSet::moment() const noexcept {
  const std::lock_guard lock(mutex_);
  return next_sequence_;
}

void RecordSet::for_each(const std::function<void(Record&)>& visit,
                         const std::function<void()>& last) {
  const std::lock_guard lock(mutex_);
  for (const RecordPointer& record : records_) visit(*record);
  if (last) last();
}

std::uint64_t RecordSet::update_unless(const std::function<bool(const Record&)>& hinders,
                                       const std::function<void()>& change) {
  const std::lock_guard lock(mutex_);
  std::uint64_t bytes = 0;
  for (const RecordPointer& record : records_) bytes += hinders(*record) ? record->bytes : 0;
  if (bytes == 0) change();
  return bytes;
}

bool RecordSet::seal(bool only_if_empty) {
  const std::lock_guard lock(mutex_);
  if (only_if_empty && !records_.empty()) return false;
  sealed_ = true;
  return true;
}

}  // namespace cumempool::pool
