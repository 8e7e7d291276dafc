// A name under which allocations are slept, woken and counted, with its policy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cumempool/cumempool.h"

namespace cumempool::pool {

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

}  // namespace cumempool::pool
