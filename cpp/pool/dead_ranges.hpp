// Which bytes of the allocations need no backup.
#pragma once

#include <vector>

#include "backup/image.hpp"
#include "cumempool/cumempool.h"
#include "pool/record.hpp"

namespace cumempool::pool {

// Disjoint ranges in order, looked up by address.
class DeadRanges {
 public:
  // In any order, overlapping or not.
  explicit DeadRanges(std::vector<cumempool_extent> ranges);

  // What is left of a record, in order; it begins and ends at multiples of 512 bytes.
  std::vector<backup::Extent> live_extents(const Record& record) const;

 private:
  struct Range {
    cumempool_address begin;
    cumempool_address end;
  };
  std::vector<Range> ranges_;
};

// Bytes of all extents together.
std::size_t total_bytes(const std::vector<backup::Extent>& extents);

}  // namespace cumempool::pool
