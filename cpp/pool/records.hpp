// Tags, the records of allocations, the record set of an allocator, and the registry of the
// process.
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

// The storage that backups go to.
struct BackupChoice {
  cumempool_backup_tier tier = CUMEMPOOL_BACKUP_PINNED;
  std::string directory;  // of the file
  int peer = 0;           // the other device
};

inline bool operator==(const BackupChoice& left, const BackupChoice& right) {
  return left.tier == right.tier && left.directory == right.directory && left.peer == right.peer;
}

// Converts a policy. Throws Error (CUMEMPOOL_INVALID_ARGUMENT) for a tier outside its enum, or a
// file without a directory.
BackupChoice backup_choice(const cumempool_backup_policy& policy);

// The backing of a tag's memory, and the devices that may use it.
struct MemoryChoice {
  cumempool_backing backing = CUMEMPOOL_BACKING_VMM;
  bool all_peers = false;  // give access to every device that can have it
  bool no_peers = false;   // give access to none
  std::vector<int> peers;  // give access to these, beside the device of the memory
  bool rdma = true;        // if the device grants it

  // Whether access follows the devices that the process uses, since no peers were chosen.
  bool follows_use() const noexcept {
    return backing == CUMEMPOOL_BACKING_VMM && !all_peers && !no_peers && peers.empty();
  }
};

inline bool operator==(const MemoryChoice& left, const MemoryChoice& right) {
  return left.backing == right.backing && left.all_peers == right.all_peers &&
         left.no_peers == right.no_peers && left.peers == right.peers && left.rdma == right.rdma;
}

// Converts a policy. Throws Error (CUMEMPOOL_INVALID_ARGUMENT) for a backing outside its enum, for
// peers that are both listed and excluded, and for memory of cudaMalloc with peers or without RDMA.
MemoryChoice memory_choice(const cumempool_memory_policy& policy);

struct Tag {
  const std::string& name;  // lives as long as the process
  // Guarded by the lock of the table.
  cumempool_on_sleep on_sleep = CUMEMPOOL_ON_SLEEP_UNSET;
  cumempool_on_wake on_wake = CUMEMPOOL_ON_WAKE_UNSET;
  BackupChoice backup{};
  MemoryChoice memory{};
  std::map<std::uint64_t, std::string> pins{};  // holders that forbid sleep, by pin
  // Guarded by the lock of the RecordSet.
  std::uint64_t scopes = 0;          // open scopes, which forbid sleep
  std::uint64_t scopes_changed = 0;  // the moment of the last begin or end of one
};

// The tags of one allocator. Thread-safe; a tag lives as long as the table, at the same address.
class TagTable {
 public:
  // Makes a tag known, or changes its policies, but for values that are UNSET. Throws Error
  // (CUMEMPOOL_INVALID_ARGUMENT) for a name that is empty, over 255 bytes or not UTF-8, and for
  // policies outside their enums.
  void declare(const std::string& name, cumempool_on_sleep on_sleep, cumempool_on_wake on_wake);

  // Throws Error (CUMEMPOOL_UNKNOWN_TAG), which lists the known tags.
  Tag& find(const std::string& name) const;

  cumempool_on_sleep on_sleep(const Tag& tag) const;
  cumempool_on_wake on_wake(const Tag& tag) const;
  BackupChoice backup(const Tag& tag) const;
  void set_backup(Tag& tag, const BackupChoice& choice);
  MemoryChoice memory(const Tag& tag) const;
  bool follows_use(const Tag& tag) const;
  bool is_made_of(const Tag& tag, const MemoryChoice& choice) const;
  void set_memory(Tag& tag, const MemoryChoice& choice);

  // Pins a tag: none of its memory may sleep until the pin is released.
  std::uint64_t pin(Tag& tag, const std::string& holder);
  // Releases a pin; false if there is no such pin.
  bool unpin(std::uint64_t pin);
  // The holders of a tag's pins: "nixl, 'decode worker'"; "" if there are none.
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
  kBackedUp,   // asleep, with a backup
  kDiscarded,  // asleep, without contents
  kDetached,   // asleep, with its contents in a handle that is still held: the way back of a failed
               // sleep could not map it, and there is no backup of it
};

// The location of an allocation's contents. An asleep one has a backup if its contents were copied.
// An awake one may retain its backup, whose digests tell what has changed since. Changes of state
// take no memory. They return the backup that is not needed any more, so that the caller can
// destroy it outside any lock.
class Contents {
 public:
  using BackupPointer = std::shared_ptr<backup::Backup>;

  State state() const noexcept { return state_; }
  bool asleep() const noexcept { return state_ != State::kAwake; }
  // The backup, which may be a retained one; null if there is none.
  const BackupPointer& backup() const noexcept { return backup_; }
  // The storage of the backup.
  const BackupChoice& choice() const noexcept { return choice_; }

  void back_up(BackupPointer& backup, BackupChoice& choice) noexcept {
    state_ = State::kBackedUp;
    backup_.swap(backup);
    std::swap(choice_, choice);
  }
  BackupPointer discard() noexcept { return change(State::kDiscarded); }
  BackupPointer detach() noexcept { return change(State::kDetached); }
  // Keeps the backup; the caller may call drop_retained() afterwards.
  void wake() noexcept { state_ = State::kAwake; }
  // Returns null while asleep: the backup is needed.
  BackupPointer drop_retained() noexcept { return asleep() ? nullptr : std::move(backup_); }

 private:
  BackupPointer change(State state) noexcept {
    state_ = state;
    return std::move(backup_);
  }

  State state_ = State::kAwake;
  BackupPointer backup_;
  BackupChoice choice_;
};

// One allocation. `memory` belongs to the operation that has claimed or retired the record. The
// lock of the RecordSet guards everything below the line.
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
  bool preserved;  // keeps its contents when its tag is discarded
  Contents contents;
  const char* claimed_by = nullptr;  // the operation that works on it
  bool freed = false;                // by the program; the teardown waits for that operation

  std::list<std::shared_ptr<Record>>::iterator place;  // in the set
  // For the Reaper, after the record has left the set: the next record of its list, and whether its
  // memory was given back or leaked.
  std::shared_ptr<Record> next;
  bool reaped = false;
};

// ---- the set of an allocator --------------------------------------------------------------------

using RecordPointer = std::shared_ptr<Record>;

// Thread-safe. Holds its lock for bookkeeping only, never across a driver call.
class RecordSet {
 public:
  // Adds a record, unless `still`, called under the lock, returns false; then returns false. Throws
  // Error (CUMEMPOOL_CLOSED) after seal().
  bool add(const RecordPointer& record, const std::function<bool()>& still);

  // Marks the record as freed, so that readers ignore it. Removes it and returns true, and the
  // caller tears it down. If a transition has claimed it, returns false, and unclaim() hands it
  // out.
  bool retire(const RecordPointer& record);

  // Claims the records that `wanted` picks, in order of allocation. Calls `admit` first, under the
  // same lock; if it throws, nothing is claimed.
  std::vector<RecordPointer> claim(const char* operation,
                                   const std::function<bool(const Record&)>& wanted,
                                   const std::function<void()>& admit = nullptr);

  // A slot begins, or stops, to hand out memory of a tag. A claim does not include memory that is
  // handed out later.
  void begin_scope(Tag& tag) noexcept;
  void end_scope(Tag& tag) noexcept;

  // A counter that grows with every allocation and every begin or end of a scope.
  std::uint64_t moment() const noexcept;

  // Ends the claims. Removes the records that were freed meanwhile, and hands them to `tear_down`.
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

  // Calls `visit` on every record, in order of allocation, then `last`, all under the lock: neither
  // may call the driver. No visited record has been torn down when `last` runs.
  void for_each(const std::function<void(Record&)>& visit,
                const std::function<void()>& last = nullptr);

  // Runs `change` under the lock. Takes no memory: transitions end with it.
  template <typename Change>
  void update(const Change& change) {
    const std::lock_guard lock(mutex_);
    change();
  }

  // Runs `change`, unless `hinders` picks any record; returns the bytes of the records it picks.
  std::uint64_t update_unless(const std::function<bool(const Record&)>& hinders,
                              const std::function<void()>& change);

  // Refuses new records from now on. With `only_if_empty`, has no effect and returns false if there
  // is a record.
  bool seal(bool only_if_empty);

 private:
  mutable std::mutex mutex_;
  std::list<RecordPointer> records_;  // in order of allocation
  std::uint64_t next_sequence_ = 1;   // also the moment
  bool sealed_ = false;
};

// ---- the registry of the process ----------------------------------------------------------------

// Thread-safe; one per process, since torch frees by address alone, from any thread, at any time.
class Registry {
 public:
  static Registry& instance();

  void add(const RecordPointer& record);
  // Removes and returns the record that starts at `address`; null if there is none.
  RecordPointer take(cumempool_address address);
  // Returns the record that contains `address`; null if there is none.
  RecordPointer find(cumempool_address address) const;

 private:
  mutable std::mutex mutex_;
  std::map<cumempool_address, RecordPointer> records_;
};

}  // namespace cumempool::pool
