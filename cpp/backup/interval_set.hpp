// The free intervals of a linear space of offsets, in the order of their offsets, with room
// kept for what comes back.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <vector>

namespace cumempool::backup {

// Free intervals are disjoint and never adjacent. Every range that is taken keeps a map node of
// its own until it comes back, so that giving it back, alone or together with its neighbours,
// needs no memory. A range that comes back in parts needs more nodes: see reserve_nodes().
// Functions that throw (std::bad_alloc) change nothing. Not thread-safe.
class IntervalSet {
 public:
  struct Interval {
    std::size_t offset = 0;
    std::size_t bytes = 0;
  };

  // Adds a free range: the space grows, or gets back what take_exact() had cut out of it.
  void add(std::size_t offset, std::size_t bytes);

  // The start of the lowest interval of at least `bytes`.
  std::optional<std::size_t> take_first_fit(std::size_t bytes);
  // Up to `bytes` from the front of the interval with the highest offset; 0 bytes where none is
  // free.
  Interval take_last(std::size_t bytes);
  // This range, all of which is free.
  void take_exact(std::size_t offset, std::size_t bytes);

  // Whether all of the range is free.
  bool contains(std::size_t offset, std::size_t bytes) const noexcept;

  // Gives back a range that was taken: one, several that lie side by side, or parts of them.
  // Each end of it that is not an end of what is taken consumes up to one reserved node.
  void give_back(std::size_t offset, std::size_t bytes) noexcept;

  // Makes `count` nodes more, for ranges that will come back in parts: n parts, in whatever
  // order, need n - 1.
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
