// Which bytes of the allocations need no backup.
#include "pool/dead_ranges.hpp"

#include <algorithm>
#include <cstddef>
#include <limits>

namespace cumempool::pool {

DeadRanges::DeadRanges(std::vector<cumempool_extent> ranges, std::uint64_t as_of) : as_of_(as_of) {
  constexpr cumempool_address kLast = std::numeric_limits<cumempool_address>::max();
  std::sort(ranges.begin(), ranges.end(),
            [](const auto& left, const auto& right) { return left.address < right.address; });
  for (const auto& [begin, bytes] : ranges) {
    const cumempool_address end = begin + std::min(bytes, kLast - begin);
    if (!ranges_.empty() && begin <= ranges_.back().end) {
      ranges_.back().end = std::max(ranges_.back().end, end);
    } else {
      ranges_.push_back({begin, end});
    }
  }
}

void DeadRanges::look_at(const Tag& tag) {
  if (as_of_ == 0 || (tag.scopes == 0 && tag.scopes_changed < as_of_)) return;
  handed_out_.insert(&tag);
}

// As torch rounds its blocks; digests and direct I/O need less.
constexpr cumempool_address kUnit = 512;

std::vector<backup::Extent> DeadRanges::live_extents(const Record& record) const {
  if (as_of_ != 0 && (record.sequence >= as_of_ || handed_out_.count(record.tag) != 0)) {
    return {{0, record.bytes}};
  }
  std::vector<backup::Extent> live;
  const cumempool_address end = record.address + record.bytes;
  cumempool_address at = record.address;
  auto dead = std::lower_bound(
      ranges_.begin(), ranges_.end(), record.address,
      [](const Range& range, cumempool_address value) { return range.begin < value; });
  if (dead != ranges_.begin()) --dead;  // may reach into the record from below
  for (; dead != ranges_.end() && dead->begin < end; ++dead) {
    const cumempool_address from = (std::max(dead->begin, at) + kUnit - 1) / kUnit * kUnit;
    const cumempool_address to = std::min(dead->end, end) / kUnit * kUnit;
    if (to <= from) continue;
    if (from > at) live.push_back({at - record.address, from - at});
    at = to;
  }
  if (at < end) live.push_back({at - record.address, end - at});
  return live;
}

std::size_t total_bytes(const std::vector<backup::Extent>& extents) {
  std::size_t bytes = 0;
  for (const backup::Extent& extent : extents) bytes += extent.bytes;
  return bytes;
}

}  // namespace cumempool::pool
