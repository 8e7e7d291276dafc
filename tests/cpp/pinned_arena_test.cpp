// Pinned host memory for backups: spans, reuse, the limit, and registrations that fail.
#include "backup/pinned_arena.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "backup/pinned_block.hpp"
#include "driver/fault_driver.hpp"
#include "host_fixture.hpp"

namespace cumempool::tests {
namespace {

using backup::HostSpan;
using backup::PinnedArena;
using driver::Driver;
using driver::FaultDriver;

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::size_t kPage = 4096;

// Inside the context of device 0, as the arena's callers are.
class PinnedArenaTest : public ::testing::Test {
 protected:
  void TearDown() override {
    faults.fail_nothing();
    arena.trim(0);
  }

  std::vector<HostSpan> take(PinnedArena& from, std::size_t bytes) const {
    std::vector<HostSpan> spans;
    for (std::size_t left = bytes; left > 0; left -= spans.back().bytes) {
      spans.push_back(from.acquire(0, left));
    }
    return spans;
  }
  static void give(PinnedArena& to, const std::vector<HostSpan>& spans) {
    for (const HostSpan& span : spans) to.release(span);
  }

  Host host;
  FaultDriver faults{host.table()};
  driver::RetainedContext context{Driver(host.table()), 0};
  driver::ContextScope scope{Driver(host.table()), 0};
  PinnedArena arena{Driver(faults.table()), 0};
};

TEST_F(PinnedArenaTest, SpansLieInOneRegistrationAndAddUp) {
  const auto spans = take(arena, 70 * kMiB);
  EXPECT_EQ(spans.size(), 3U) << "32 + 32 + 6 MiB";
  for (const HostSpan& span : spans) {
    EXPECT_LE(span.offset + span.bytes, span.block->bytes());
  }
  EXPECT_EQ(arena.used_bytes(), 70 * kMiB);
  EXPECT_EQ(host.counters().registered_bytes, arena.held_bytes());
  give(arena, spans);
  EXPECT_EQ(arena.used_bytes(), 0U);
  EXPECT_EQ(arena.held_bytes(), 70 * kMiB) << "kept for the next sleep";
}

TEST_F(PinnedArenaTest, ABlockIsNotMuchLargerThanWhatIsExpected) {
  give(arena, take(arena, 1));
  EXPECT_EQ(arena.held_bytes(), 64U << 10);
  give(arena, take(arena, 3 * kMiB + 1));
  EXPECT_LE(arena.held_bytes(), 4 * kMiB + (64U << 10));
}

TEST_F(PinnedArenaTest, ReleasedSpansAreJoinedAndReused) {
  auto first = take(arena, 40 * kPage);
  arena.release(first.front());
  const auto a = arena.acquire(0, 10 * kPage);
  const auto b = arena.acquire(0, 10 * kPage);
  const auto c = arena.acquire(0, 10 * kPage);
  EXPECT_NE(a.data(), b.data());
  EXPECT_NE(b.data(), c.data());
  for (const HostSpan& span : {c, a, b}) arena.release(span);
  const auto whole = take(arena, 40 * kPage);
  EXPECT_EQ(whole.size(), 1U) << "what was split is one piece again";
  EXPECT_EQ(host.counters().registrations, 1U);
  give(arena, whole);
}

TEST_F(PinnedArenaTest, AnOrderIsDeliveredThenCancelled) {
  arena.order(70 * kMiB);
  EXPECT_EQ(arena.held_bytes(), 70 * kMiB) << "on order counts as held: the limit covers it";
  EXPECT_EQ(host.counters().registered_bytes, 0U);
  const auto spans = take(arena, 33 * kMiB);
  EXPECT_EQ(host.counters().registered_bytes, 64 * kMiB);
  arena.cancel_order();
  EXPECT_EQ(arena.held_bytes(), 64 * kMiB) << "what was not delivered is given back";
  EXPECT_EQ(arena.used_bytes(), 33 * kMiB);
  give(arena, spans);
}

TEST_F(PinnedArenaTest, AnOrderCountsWhatIsFreeAlready) {
  give(arena, take(arena, 32 * kMiB));
  const backup::ArenaOrder order(arena, 40 * kMiB);
  EXPECT_EQ(arena.held_bytes(), 40 * kMiB);
}

TEST_F(PinnedArenaTest, PinOrderPinsAllOfIt) {
  arena.order(40 * kMiB);
  arena.pin_order(0);
  arena.cancel_order();
  EXPECT_EQ(host.counters().registered_bytes, 40 * kMiB);
  EXPECT_EQ(arena.used_bytes(), 0U);
  give(arena, take(arena, 40 * kMiB));
  EXPECT_EQ(arena.held_bytes(), 40 * kMiB) << "nothing more was needed";
}

TEST_F(PinnedArenaTest, R13_AFailedPinOfAnOrderKeepsTheNumbersExact) {
  arena.order(70 * kMiB);
  faults.fail_nth("host_register", 2, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  EXPECT_THROW(arena.pin_order(0), Error);
  arena.cancel_order();
  EXPECT_EQ(arena.held_bytes(), 32 * kMiB);
  EXPECT_EQ(host.counters().registered_bytes, 32 * kMiB);
}

TEST_F(PinnedArenaTest, TrimReturnsOnlyBlocksThatHoldNothing) {
  const auto kept = take(arena, 64 << 10);
  const auto given_back = take(arena, 64 << 10);
  ASSERT_NE(kept.front().block, given_back.front().block);
  give(arena, given_back);
  EXPECT_EQ(arena.trim(0), 64U << 10);
  EXPECT_EQ(arena.held_bytes(), 64U << 10);
  kept.front().data()[0] = std::byte{1};
  give(arena, kept);
  EXPECT_EQ(arena.trim(0), 64U << 10);
  EXPECT_EQ(arena.trim(0), 0U);
  EXPECT_EQ(host.counters().registered_bytes, 0U);
}

TEST_F(PinnedArenaTest, R13_FailedRegistrationHoldsNothing) {
  faults.fail_nth("host_register", 1, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  try {
    take(arena, kMiB);
    FAIL() << "the registration fails";
  } catch (const Error& error) {
    EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
    EXPECT_EQ(error.result, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
    EXPECT_NE(error.advice.find("ulimit -l"), std::string::npos);
  }
  EXPECT_EQ(arena.held_bytes(), 0U);
  give(arena, take(arena, kMiB));
}

TEST_F(PinnedArenaTest, R13_ABlockThatCannotBeUnregisteredStaysInUse) {
  give(arena, take(arena, kMiB));
  faults.fail_nth("host_unregister", 1, CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(arena.trim(0), 0U);
  EXPECT_EQ(arena.held_bytes(), kMiB);
  give(arena, take(arena, kMiB));
  EXPECT_EQ(host.counters().registrations, 1U) << "and is handed out again";
  EXPECT_EQ(arena.trim(0), kMiB);
}

TEST_F(PinnedArenaTest, TheLimitHoldsAndSaysSo) {
  PinnedArena limited(Driver(faults.table()), kMiB);
  try {
    take(limited, kMiB + 1);
    FAIL() << "over the limit";
  } catch (const Error& error) {
    EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
    EXPECT_NE(error.message().find("1.00 MiB"), std::string::npos) << error.message();
  }
  EXPECT_EQ(limited.held_bytes(), 0U) << "refused before anything was pinned";
  limited.trim(0);
}

TEST_F(PinnedArenaTest, WhatFitsTheLimitIsGranted) {
  for (const std::size_t bytes : {4 * kPage, 3 * kMiB, 33 * kMiB + kPage}) {
    PinnedArena limited(Driver(faults.table()), bytes);
    give(limited, take(limited, bytes));
    EXPECT_LE(limited.held_bytes(), bytes);
    limited.trim(0);
  }
}

TEST_F(PinnedArenaTest, WhatIsHeldAlreadyIsUsedBeforeTheLimitIsAsked) {
  PinnedArena limited(Driver(faults.table()), kMiB);
  for (int round = 0; round < 3; ++round) {
    give(limited, take(limited, kMiB / 2));
    give(limited, take(limited, kMiB));
  }
  EXPECT_EQ(limited.held_bytes(), kMiB);
  limited.trim(0);
}

}  // namespace
}  // namespace cumempool::tests
