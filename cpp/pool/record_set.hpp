// The live records of one allocator, the scopes that hand out more of them, and the claims of the
// transition under way on them.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "pool/record.hpp"

namespace cumempool::pool {

using RecordPointer = std::shared_ptr<Record>;

// Thread-safe. Its lock is only ever held for bookkeeping, never across a driver call.
class RecordSet {
 public:
  // Unless `still` says no, which is asked under the lock: then false, and no effect. Throws Error
  // (CUMEMPOOL_CLOSED) after seal().
  bool add(const RecordPointer& record, const std::function<bool()>& still);

  // Marks the record as freed, after which readers leave it alone, and takes it out for teardown by
  // the caller: true. Where a transition has claimed it, it comes back from unclaim(), and the
  // answer is false.
  bool retire(const RecordPointer& record);

  // Claims the records that `wanted` picks, in order of allocation. `admit` comes first, under the
  // same lock; where it throws, nothing is claimed.
  std::vector<RecordPointer> claim(const std::function<bool(const Record&)>& wanted,
                                   const std::function<void()>& admit = nullptr);

  // A slot begins, or ceases, to hand out memory of a tag. What it hands out later than a claim is
  // not claimed.
  void begin_scope(Tag& tag) noexcept;
  void end_scope(Tag& tag) noexcept;

  // Grows with every allocation, and with every scope that begins or ends.
  std::uint64_t moment() const noexcept;

  // Ends the claims. Hands those freed meanwhile, taken out, to `tear_down`.
  template <typename TearDown>
  void unclaim(const std::vector<RecordPointer>& claimed, TearDown tear_down) noexcept {
    const std::lock_guard lock(mutex_);
    for (const RecordPointer& record : claimed) {
      record->claimed = false;
      if (!record->freed) continue;
      records_.erase(record->place);
      tear_down(record);
    }
  }

  // Runs `visit` on every record, in order of allocation, then `last`, all under the lock: no
  // driver calls in there. No record that was visited has been torn down when `last` runs.
  void for_each(const std::function<void(Record&)>& visit,
                const std::function<void()>& last = nullptr);

  // Runs `change` under the lock. Takes no memory: transitions end by it.
  template <typename Change>
  void update(const Change& change) {
    const std::lock_guard lock(mutex_);
    change();
  }

  // The same, unless `hinders` picks any record; returns how many bytes of records it picks.
  std::uint64_t update_unless(const std::function<bool(const Record&)>& hinders,
                              const std::function<void()>& change);

  // No records can be added from now on. With `only_if_empty`, false and no effect where one lives.
  bool seal(bool only_if_empty);

 private:
  mutable std::mutex mutex_;
  std::list<RecordPointer> records_;  // in order of allocation
  std::uint64_t next_sequence_ = 1;   // the moment
  bool sealed_ = false;
};

}  // namespace cumempool::pool
