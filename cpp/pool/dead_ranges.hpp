// Which bytes of the allocations need no backup.
#pragma once

#include <cstdint>
#include <set>
#include <vector>

#include "backup/backup.hpp"
#include "cumempool/cumempool.h"
#include "pool/record.hpp"

namespace cumempool::pool {

// Disjoint ranges in order, looked up by address.
class DeadRanges {
 public:
  // In any order, overlapping or not; `as_of` is the moment before the list was made, or 0 where it
  // is known to hold.
  explicit DeadRanges(std::vector<cumempool_extent> ranges, std::uint64_t as_of = 0);

  // Has memory of a tag count as live where a scope may have handed it out since. Under the lock of
  // the records.
  void look_at(const Tag& tag);

  // What is left of a record, in order; it begins and ends at multiples of 512 bytes. All of one
  // that is younger than the list: what is dead was there before it, at the same address.
  std::vector<backup::Extent> live_extents(const Record& record) const;

 private:
  struct Range {
    cumempool_address begin;
    cumempool_address end;
  };
  std::vector<Range> ranges_;
  std::uint64_t as_of_;
  std::set<const Tag*> handed_out_;
};

// Bytes of all extents together.
std::size_t total_bytes(const std::vector<backup::Extent>& extents);

}  // namespace cumempool::pool
