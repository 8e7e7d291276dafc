// The free intervals of a linear space of offsets. Nodes move between the map of free intervals and
// the map of taken ranges; only a cut makes a new one.
#include "backup/interval_set.hpp"

#include <algorithm>
#include <cassert>
#include <iterator>
#include <utility>

namespace cumempool::backup {

void IntervalSet::add(std::size_t offset, std::size_t bytes) {
  // One node for the range, and one in case it comes from the middle of a cut-out range.
  const std::size_t before = spares_.size();
  reserve_nodes(2);
  give_back(offset, bytes);
  while (spares_.size() > before) spares_.pop_back();
}

std::optional<std::size_t> IntervalSet::take_first_fit(std::size_t bytes) {
  const auto fit = std::find_if(free_.begin(), free_.end(),
                                [bytes](const auto& interval) { return interval.second >= bytes; });
  if (fit == free_.end()) return std::nullopt;
  const std::size_t offset = fit->first;
  take_from(fit, offset, bytes);
  return offset;
}

Extent IntervalSet::take_last(std::size_t bytes) {
  if (free_.empty()) return {};
  const auto last = std::prev(free_.end());
  const Extent taken{last->first, std::min(bytes, last->second)};
  take_from(last, taken.offset, taken.bytes);
  return taken;
}

void IntervalSet::take_exact(std::size_t offset, std::size_t bytes) {
  assert(contains(offset, bytes));
  take_from(std::prev(free_.upper_bound(offset)), offset, bytes);
}

bool IntervalSet::contains(std::size_t offset, std::size_t bytes) const noexcept {
  const auto after = free_.upper_bound(offset);
  if (after == free_.begin()) return false;
  const auto& [start, room] = *std::prev(after);
  return offset - start <= room && room - (offset - start) >= bytes;
}

// Makes all nodes that the cut needs, then cuts.
void IntervalSet::take_from(Map::iterator interval, std::size_t offset, std::size_t bytes) {
  const auto [start, room] = *interval;
  const std::size_t before = offset - start;
  const std::size_t after = room - before - bytes;
  const std::size_t nodes = (before != 0 ? 1U : 0U) + (after != 0 ? 1U : 0U);
  reserve_nodes(nodes);
  total_ -= bytes;
  put(taken_, free_.extract(interval), offset, bytes);
  if (before != 0) put(free_, spare(), start, before);
  if (after != 0) put(free_, spare(), offset + bytes, after);
}

void IntervalSet::give_back(std::size_t offset, std::size_t bytes) noexcept {
  Node node = untake(offset, bytes);
  total_ += bytes;
  const auto next = free_.lower_bound(offset);
  assert(next == free_.end() || next->first >= offset + bytes);
  if (next != free_.end() && next->first == offset + bytes) {
    bytes += next->second;
    node = free_.extract(next);
  }
  const auto after = free_.lower_bound(offset);
  if (after != free_.begin()) {
    const auto previous = std::prev(after);
    assert(previous->first + previous->second <= offset);
    if (previous->first + previous->second == offset) {
      previous->second += bytes;
      return;
    }
  }
  put(free_, node.empty() ? spare() : std::move(node), offset, bytes);
}

// Removes the range from the taken ones; returns the node of a taken range that lay entirely
// inside, if there was one.
IntervalSet::Node IntervalSet::untake(std::size_t offset, std::size_t bytes) noexcept {
  const std::size_t end = offset + bytes;
  Node left_over;
  auto at = taken_.upper_bound(offset);
  if (at != taken_.begin()) --at;
  while (at != taken_.end() && at->first < end) {
    const std::size_t start = at->first;
    const std::size_t stop = start + at->second;
    const auto current = at++;
    if (stop <= offset) continue;
    if (start < offset) {
      current->second = offset - start;
    } else {
      left_over = taken_.extract(current);
    }
    if (stop > end) {
      put(taken_, left_over.empty() ? spare() : std::move(left_over), end, stop - end);
      left_over = Node();
    }
  }
  return left_over;
}

void IntervalSet::reserve_nodes(std::size_t count) {
  const std::size_t before = spares_.size();
  spares_.reserve(before + count);
  Map made;
  for (std::size_t i = 0; i < count; ++i) made.emplace(i, 0);
  while (!made.empty()) spares_.push_back(made.extract(made.begin()));
}

IntervalSet::Node IntervalSet::spare() noexcept {
  assert(!spares_.empty());
  Node node = std::move(spares_.back());
  spares_.pop_back();
  return node;
}

void IntervalSet::put(Map& map, Node node, std::size_t offset, std::size_t bytes) noexcept {
  node.key() = offset;
  node.mapped() = bytes;
  map.insert(std::move(node));
}

}  // namespace cumempool::backup
