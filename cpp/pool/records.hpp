// Allocations as the pool sees them: the tags that they belong to, what is known of each, the set
// of an allocator, and the registry of the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "backup/backup.hpp"
#include "cumempool/cumempool.h"
#include "vmm/allocation.hpp"

namespace cumempool::pool {

// ---- tags ---------------------------------------------------------------------------------------

// Where backups go.
struct BackupChoice {
  cumempool_backup_tier tier = CUMEMPOOL_BACKUP_PINNED;
  std::string directory;  // of the file
  int peer = 0;           // the other device
};

inline bool operator==(const BackupChoice& left, const BackupChoice& right) {
  return left.tier == right.tier && left.directory == right.directory && left.peer == right.peer;
}

// Throws Error (CUMEMPOOL_INVALID_ARGUMENT) for a tier outside its enum, or a file without a
// directory.
BackupChoice backup_choice(const cumempool_backup_policy& policy);

// What memory of a tag is made of, and who else may use it.
struct MemoryChoice {
  cumempool_backing backing = CUMEMPOOL_BACKING_VMM;
  bool all_peers = false;  // every device that can
  bool no_peers = false;   // none
  std::vector<int> peers;  // these devices, beside the one that the memory is on
  bool rdma = true;        // where the device grants it

  // Nobody has chosen: memory goes to the devices that the process uses.
  bool follows_use() const noexcept {
    return backing == CUMEMPOOL_BACKING_VMM && !all_peers && !no_peers && peers.empty();
  }
};

inline bool operator==(const MemoryChoice& left, const MemoryChoice& right) {
  return left.backing == right.backing && left.all_peers == right.all_peers &&
         left.no_peers == right.no_peers && left.peers == right.peers && left.rdma == right.rdma;
}

// Throws Error (CUMEMPOOL_INVALID_ARGUMENT) for a backing outside its enum, for peers that are both
// listed and not, and for ordinary memory with peers or without RDMA.
MemoryChoice memory_choice(const cumempool_memory_policy& policy);

struct TagPolicy {
  cumempool_on_sleep on_sleep = CUMEMPOOL_ON_SLEEP_UNSET;
  cumempool_on_wake on_wake = CUMEMPOOL_ON_WAKE_UNSET;
};

struct Tag {
  const std::string& name;                    // lives as long as the process
  TagPolicy policy;                           // guarded by the table's lock
  BackupChoice backup;                        // the same
  MemoryChoice memory;                        // the same
  std::map<std::uint64_t, std::string> pins;  // the same: who forbids that the memory goes
  // Guarded by the lock of the RecordSet.
  std::uint64_t scopes = 0;          // that are open: while there is one, the tag cannot sleep
  std::uint64_t scopes_changed = 0;  // the moment when one last began or ended
};

// The tags of one allocator. Thread-safe; a tag lives as long as the table, at the same address.
class TagTable {
 public:
  // Makes a tag known, or changes what `policy` sets. Throws Error (CUMEMPOOL_INVALID_ARGUMENT) for
  // a name that is empty, over 255 bytes or not UTF-8, and for policies outside their enums.
  void declare(const std::string& name, TagPolicy policy);

  // Throws Error (CUMEMPOOL_UNKNOWN_TAG) that lists the known ones.
  Tag& find(const std::string& name) const;

  TagPolicy policy(const Tag& tag) const;
  BackupChoice backup(const Tag& tag) const;
  void set_backup(Tag& tag, const BackupChoice& choice);
  MemoryChoice memory(const Tag& tag) const;
  bool follows_use(const Tag& tag) const;
  bool is_made_of(const Tag& tag, const MemoryChoice& choice) const;
  void set_memory(Tag& tag, const MemoryChoice& choice);

  // Until the pin is taken off again, no memory of the tag may go.
  std::uint64_t pin(Tag& tag, const std::string& holder);
  // Whether there was such a pin.
  bool unpin(std::uint64_t pin);
  // Who has pinned a tag: "nixl, 'decode worker'"; "" where nobody has.
  std::string holders(const Tag& tag) const;
  std::size_t pin_count(const Tag& tag) const;

  std::vector<const Tag*> all() const;

 private:
  mutable std::mutex mutex_;
  std::map<std::string, std::unique_ptr<Tag>> tags_;
  std::uint64_t next_pin_ = 1;
};

// ---- records ------------------------------------------------------------------------------------

class Allocator;

enum class State {
  kAwake,
  kBackedUp,   // asleep, with an image
  kDiscarded,  // asleep, without contents
  kDetached,   // asleep, with its contents in device memory that is still held: the way back of a
               // failed sleep could not map it, and there is no image of it
};

// Where the contents of an allocation are. An image is there while it is backed up, and may be
// while it is awake: then it is retained, and its digests tell what has changed since. Changes take
// no memory; an image that is no use any more comes out of them, to be dropped outside of any lock.
class Contents {
 public:
  using ImagePointer = std::shared_ptr<backup::Backup>;

  State state() const noexcept { return state_; }
  bool asleep() const noexcept { return state_ != State::kAwake; }
  // The backup, or the retained one; null where there is none.
  const ImagePointer& image() const noexcept { return image_; }
  // Where that is.
  const BackupChoice& choice() const noexcept { return choice_; }

  void back_up(ImagePointer& image, BackupChoice& choice) noexcept {
    state_ = State::kBackedUp;
    image_.swap(image);
    std::swap(choice_, choice);
  }
  ImagePointer discard() noexcept { return change(State::kDiscarded); }
  ImagePointer detach() noexcept { return change(State::kDetached); }
  // What it keeps, comparable or not, is the caller's to decide: see drop_retained().
  void wake() noexcept { state_ = State::kAwake; }
  // Null while asleep: a backup is never dropped like that.
  ImagePointer drop_retained() noexcept { return asleep() ? nullptr : std::move(image_); }

 private:
  ImagePointer change(State state) noexcept {
    state_ = state;
    return std::move(image_);
  }

  State state_ = State::kAwake;
  ImagePointer image_;
  BackupChoice choice_;
};

// `memory` belongs to the operation that claimed the record, or retired it; everything below the
// line is guarded by the lock of the RecordSet.
struct Record {
  Record(std::shared_ptr<Allocator> owner_of, const Tag& under, int on_device,
         std::size_t bytes_requested, vmm::Allocation&& made, bool is_preserved)
      : owner(std::move(owner_of)),
        tag(&under),
        device(on_device),
        requested_bytes(bytes_requested),
        address(made.address()),
        bytes(made.bytes()),
        memory(std::move(made)),
        preserved(is_preserved) {}

  const std::shared_ptr<Allocator> owner;
  const Tag* const tag;
  const int device;
  const std::size_t requested_bytes;
  const cumempool_address address;
  const std::size_t bytes;
  vmm::Allocation memory;
  // ---------------------------------------------------------------------------------------------
  std::uint64_t sequence = 0;
  std::uint64_t generation = 1;
  bool preserved;  // its contents are kept where those of its tag are discarded
  Contents contents;
  const char* claimed_by = nullptr;  // the operation under way that works on it
  bool freed = false;                // by the program; its teardown waits for that operation

  std::list<std::shared_ptr<Record>>::iterator place;  // in the set
  // Once it was taken out of the set, for the Reaper: the next of the list that it is in, and
  // whether its memory was given back, or leaked.
  std::shared_ptr<Record> next;
  bool reaped = false;
};

// ---- the set of an allocator --------------------------------------------------------------------

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

  // Claims the records that `wanted` picks for an operation, in order of allocation. `admit` comes
  // first, under the same lock; where it throws, nothing is claimed.
  std::vector<RecordPointer> claim(const char* operation,
                                   const std::function<bool(const Record&)>& wanted,
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
      record->claimed_by = nullptr;
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

// ---- the registry of the process ----------------------------------------------------------------

// Thread-safe, one per process; torch frees by pointer alone, from any thread, at any time.
class Registry {
 public:
  static Registry& instance();

  void add(const RecordPointer& record);
  // Removes and returns the record that starts exactly at `address`, or null.
  RecordPointer take(cumempool_address address);
  // The record that holds `address`, anywhere inside it, or null.
  RecordPointer find(cumempool_address address) const;

 private:
  mutable std::mutex mutex_;
  std::map<cumempool_address, RecordPointer> records_;
};

}  // namespace cumempool::pool
