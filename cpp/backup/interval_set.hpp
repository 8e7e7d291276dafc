// The free intervals of a linear space of offsets. Giving a range back needs no memory.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <vector>

namespace cumempool::backup {

// A contiguous range of offsets.
struct Extent {
  std::size_t offset = 0;
  std::size_t bytes = 0;
};

inline bool operator==(const Extent& left, const Extent& right) {
  return left.offset == right.offset && left.bytes == right.bytes;
}

// Free intervals are disjoint and never adjacent. Each taken range keeps a map node until it comes
// back, so giving it back, alone or together with its neighbours, needs no memory. A range that
// comes back in parts needs more nodes: see reserve_nodes(). Functions that throw (std::bad_alloc)
// change nothing. Not thread-safe.
class IntervalSet {
 public:
  // Adds a free range. It is new, or take_exact() has cut it out before.
  void add(std::size_t offset, std::size_t bytes);

  // Takes `bytes` from the lowest interval that is large enough; returns their offset.
  std::optional<std::size_t> take_first_fit(std::size_t bytes);
  // Takes up to `bytes` from the front of the highest interval; 0 bytes if nothing is free.
  Extent take_last(std::size_t bytes);
  // Takes this range, all of which is free.
  void take_exact(std::size_t offset, std::size_t bytes);

  // Whether all of the range is free.
  bool contains(std::size_t offset, std::size_t bytes) const noexcept;

  // Gives back taken bytes: one range, several adjacent ones, or parts of them. Each end that is
  // not an end of a taken range consumes up to one reserved node.
  void give_back(std::size_t offset, std::size_t bytes) noexcept;

  // Makes `count` more nodes for ranges that will come back in parts: n parts, in any order, need
  // n - 1.
  void reserve_nodes(std::size_t count);

  std::size_t total() const noexcept { return total_; }

 private:
  using Map = std::map<std::size_t, std::size_t>;  // offset -> bytes
  using Node = Map::node_type;

  void take_from(Map::iterator interval, std::size_t offset, std::size_t bytes);
  Node untake(std::size_t offset, std::size_t bytes) noexcept;
  Node spare() noexcept;
  static void put(Map& map, Node node, std::size_t offset, std::size_t bytes) noexcept;

  Map free_;
  Map taken_;
  std::vector<Node> spares_;
  std::size_t total_ = 0;
};

}  // namespace cumempool::backup
