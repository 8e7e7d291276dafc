// Intervals of free room: always the same as a bitmap of them, and giving back takes no memory.
#include "backup/interval_set.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <random>
#include <vector>

#include "allocation_failure.hpp"

namespace cumempool::tests {
namespace {

using backup::Extent;
using backup::IntervalSet;

TEST(IntervalSetTest, TakesTheLowestIntervalThatIsLargeEnough) {
  IntervalSet set;
  set.add(100, 10);
  set.add(200, 30);
  set.add(300, 30);
  EXPECT_EQ(set.take_first_fit(20), 200U);
  EXPECT_EQ(set.take_first_fit(10), 100U);
  EXPECT_EQ(set.take_first_fit(10), 220U);
  EXPECT_EQ(set.take_first_fit(31), std::nullopt);
  EXPECT_EQ(set.total(), 30U);
}

TEST(IntervalSetTest, TakesFromTheFrontOfTheLastInterval) {
  IntervalSet set;
  EXPECT_EQ(set.take_last(5).bytes, 0U);
  set.add(0, 10);
  set.add(20, 10);
  const auto part = set.take_last(4);
  EXPECT_EQ(part.offset, 20U);
  EXPECT_EQ(part.bytes, 4U);
  const auto rest = set.take_last(100);
  EXPECT_EQ(rest.offset, 24U);
  EXPECT_EQ(rest.bytes, 6U);
  EXPECT_EQ(set.take_last(100).offset, 0U);
}

TEST(IntervalSetTest, CutsARangeOutOfTheMiddleAndTakesItBack) {
  IntervalSet set;
  set.add(0, 100);
  set.take_exact(40, 20);
  EXPECT_TRUE(set.contains(0, 40));
  EXPECT_TRUE(set.contains(60, 40));
  EXPECT_FALSE(set.contains(39, 2));
  EXPECT_FALSE(set.contains(50, 1));
  EXPECT_EQ(set.take_first_fit(41), std::nullopt);
  set.give_back(40, 20);
  EXPECT_EQ(set.take_first_fit(100), 0U) << "intervals that touch are one";
}

TEST(IntervalSetTest, ARangeThatWasCutOutMayBeAddedAgainInParts) {
  IntervalSet set;
  set.add(0, 100);
  set.take_exact(0, 100);
  set.add(40, 20);
  set.add(0, 40);
  EXPECT_EQ(set.total(), 60U);
  EXPECT_EQ(set.take_first_fit(60), 0U);
  set.add(60, 40);
  EXPECT_EQ(set.total(), 40U);
}

TEST(IntervalSetTest, GivingBackNeighboursTogetherTakesNoMemory) {
  IntervalSet set;
  set.add(0, 100);
  for (std::size_t i = 0; i < 10; ++i) EXPECT_EQ(set.take_first_fit(10), i * 10);
  const std::uint64_t before = allocations();
  set.give_back(20, 30);
  set.give_back(0, 10);
  set.give_back(80, 20);
  EXPECT_EQ(allocations(), before);
  EXPECT_TRUE(set.contains(20, 30));
  EXPECT_EQ(set.total(), 60U);
}

TEST(IntervalSetTest, APartNeedsAReservedNodeAndNoMemory) {
  IntervalSet set;
  set.add(0, 100);
  ASSERT_EQ(set.take_first_fit(100), 0U);
  set.reserve_nodes(4);
  const std::uint64_t before = allocations();
  for (const std::size_t part : {40U, 80U, 0U, 60U, 20U}) set.give_back(part, 20);  // in any order
  EXPECT_EQ(allocations(), before);
  EXPECT_TRUE(set.contains(0, 100));
}

// ---- against a bitmap ---------------------------------------------------------------------------

// The simplest thing that does the same.
class Model {
 public:
  explicit Model(std::size_t cells) : free_(cells) {}

  std::size_t cells() const { return free_.size(); }
  std::size_t total() const {
    return static_cast<std::size_t>(std::count(free_.begin(), free_.end(), true));
  }
  bool all(std::size_t offset, std::size_t bytes, bool free) const {
    const auto first = free_.begin() + static_cast<std::ptrdiff_t>(offset);
    return std::all_of(first, first + static_cast<std::ptrdiff_t>(bytes),
                       [free](bool cell) { return cell == free; });
  }
  void set(std::size_t offset, std::size_t bytes, bool free) {
    for (std::size_t i = offset; i < offset + bytes; ++i) free_[i] = free;
  }
  std::optional<std::size_t> first_fit(std::size_t bytes) const {
    for (std::size_t i = 0; i + bytes <= free_.size(); ++i) {
      if (all(i, bytes, true)) return i;
    }
    return std::nullopt;
  }
  Extent last(std::size_t bytes) const {
    std::size_t end = free_.size();
    while (end > 0 && !free_[end - 1]) --end;
    std::size_t start = end;
    while (start > 0 && free_[start - 1]) --start;
    return {start, std::min(bytes, end - start)};
  }

 private:
  std::vector<bool> free_;
};

class RandomOperations {
 public:
  explicit RandomOperations(unsigned seed) : random_(seed) {}

  void step() {
    const std::size_t offset = below(model_.cells());
    const std::size_t bytes = 1 + below(std::min<std::size_t>(12, model_.cells() - offset));
    switch (below(6)) {
      case 0:
        take_first_fit(bytes);
        break;
      case 1:
        take_last(bytes);
        break;
      case 2:
        take_exact(offset, bytes);
        break;
      default:
        put(offset, bytes);
    }
    EXPECT_EQ(set_.total(), model_.total());
    EXPECT_EQ(set_.contains(offset, bytes), model_.all(offset, bytes, true));
  }

 private:
  std::size_t below(std::size_t bound) { return random_() % bound; }

  void take_first_fit(std::size_t bytes) {
    const auto expected = model_.first_fit(bytes);
    ASSERT_EQ(set_.take_first_fit(bytes), expected);
    if (expected) model_.set(*expected, bytes, false);
  }
  void take_last(std::size_t bytes) {
    const auto expected = model_.last(bytes);
    const auto taken = set_.take_last(bytes);
    ASSERT_EQ(taken.bytes, expected.bytes);
    if (taken.bytes == 0) return;
    ASSERT_EQ(taken.offset, expected.offset);
    model_.set(taken.offset, taken.bytes, false);
  }
  void take_exact(std::size_t offset, std::size_t bytes) {
    if (!model_.all(offset, bytes, true)) return;
    set_.take_exact(offset, bytes);
    model_.set(offset, bytes, false);
  }
  // Back, or there for the first time: a range may begin and end inside of what was taken.
  void put(std::size_t offset, std::size_t bytes) {
    if (!model_.all(offset, bytes, false)) return;
    if (below(2) == 0) {
      set_.add(offset, bytes);
    } else {
      set_.reserve_nodes(2);
      const std::uint64_t before = allocations();
      set_.give_back(offset, bytes);
      EXPECT_EQ(allocations(), before);
    }
    model_.set(offset, bytes, true);
  }

  std::mt19937 random_;
  IntervalSet set_;
  Model model_{96};
};

TEST(IntervalSetTest, IsAlwaysTheSameAsABitmap) {
  for (unsigned seed = 0; seed < 50; ++seed) {
    RandomOperations operations(seed);
    for (int i = 0; i < 1000; ++i) {
      operations.step();
      if (::testing::Test::HasFailure()) FAIL() << "seed " << seed << ", step " << i;
    }
  }
}

// What is taken as a whole comes back without memory, in whatever order and company.
TEST(IntervalSetTest, EveryTakeKeepsTheMemoryThatGivingBackNeeds) {
  constexpr std::size_t cells = 512;
  std::mt19937 random(7);
  for (int round = 0; round < 100; ++round) {
    IntervalSet set;
    set.add(0, cells);
    std::vector<Extent> taken;
    while (set.total() != 0) {
      const std::size_t bytes = 1 + random() % 9;
      const auto at = set.take_first_fit(bytes);
      taken.push_back(at ? Extent{*at, bytes} : set.take_last(bytes));
    }
    std::shuffle(taken.begin(), taken.end(), random);
    const std::uint64_t before = allocations();
    for (const auto& interval : taken) set.give_back(interval.offset, interval.bytes);
    EXPECT_EQ(allocations(), before);
    EXPECT_TRUE(set.contains(0, cells));
  }
}

}  // namespace
}  // namespace cumempool::tests
