// A name under which allocations are slept, woken and counted, with its policy.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cumempool/cumempool.h"

namespace cumempool::pool {

struct TagPolicy {
  cumempool_on_sleep on_sleep = CUMEMPOOL_ON_SLEEP_UNSET;
  cumempool_on_wake on_wake = CUMEMPOOL_ON_WAKE_UNSET;
};

struct Tag {
  std::string name;
  TagPolicy policy;  // guarded by the table's lock
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
  std::vector<const Tag*> all() const;

 private:
  mutable std::mutex mutex_;
  std::map<std::string, std::unique_ptr<Tag>> tags_;
};

}  // namespace cumempool::pool
