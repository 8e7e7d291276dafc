// The live records of one allocator, and the claims of the transition under way on them.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "pool/record.hpp"

namespace cumempool::pool {

using RecordPointer = std::shared_ptr<Record>;

// Thread-safe. Its lock is only ever held for bookkeeping, never across a driver call.
class RecordSet {
 public:
  // Throws Error (CUMEMPOOL_CLOSED) after seal().
  void add(const RecordPointer& record);

  // Takes the record out for teardown by the caller: true. Where a transition has claimed it, it is
  // only marked, comes back from unclaim(), and the answer is false.
  bool retire(const RecordPointer& record);

  // Claims the records that `wanted` picks, in order of allocation.
  std::vector<RecordPointer> claim(const std::function<bool(const Record&)>& wanted);

  // Ends the claims. Returns those freed meanwhile, taken out, for teardown by the caller.
  std::vector<RecordPointer> unclaim(const std::vector<RecordPointer>& claimed);

  // Runs `visit` on every record, in order of allocation, under the lock: no driver calls in there.
  void for_each(const std::function<void(Record&)>& visit);

  // Runs `change` under the lock.
  void update(const std::function<void()>& change);

  // No records can be added from now on. With `only_if_empty`, false and no effect where one lives.
  bool seal(bool only_if_empty);

 private:
  std::mutex mutex_;
  std::map<std::uint64_t, RecordPointer> records_;  // by sequence
  std::uint64_t next_sequence_ = 1;
  bool sealed_ = false;
};

}  // namespace cumempool::pool
