// Host memory for backups: neighbouring blocks, orders, exact numbers, the limit, reuse, and
// registrations that fail.
#include "backup/host_arena.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backup/host_limits.hpp"
#include "backup/host_pages.hpp"
#include "fault_driver.hpp"
#include "host_fixture.hpp"

namespace cumempool::tests {
namespace {

using backup::ArenaOrder;
using backup::HostArena;
using backup::HostBudget;
using backup::HostSpan;
using driver::Driver;
using driver::FaultDriver;

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::size_t kPage = 4096;
constexpr std::size_t kBlock = 64 * kMiB;

// Inside the context of device 0, as the arena's callers are.
class HostArenaTest : public ::testing::Test {
 protected:
  void TearDown() override {
    faults.fail_nothing();
    arena.trim(0);
  }

  static std::vector<HostSpan> take(HostArena& from, std::size_t bytes) {
    std::vector<HostSpan> spans;
    for (std::size_t left = bytes; left > 0; left -= spans.back().bytes) {
      spans.push_back(from.acquire(0, left));
    }
    return spans;
  }
  static void give(HostArena& to, const std::vector<HostSpan>& spans) {
    for (const HostSpan& span : spans) to.release(span);
  }
  std::unique_ptr<HostArena> another(HostBudget& of,
                                     cumempool_backup_tier tier = CUMEMPOOL_BACKUP_PINNED) {
    return std::make_unique<HostArena>(Driver(faults.table()), tier, -1, of);
  }
  static Error error_of(const std::function<void()>& call) {
    try {
      call();
    } catch (const Error& error) {
      return error;
    }
    return {CUMEMPOOL_OK, "nothing was thrown"};
  }

  Host host;
  FaultDriver faults{host.table()};
  driver::RetainedContext context{Driver(host.table()), 0};
  driver::ContextScope scope{Driver(host.table()), 0};
  HostBudget budget{0};
  HostArena arena{Driver(faults.table()), CUMEMPOOL_BACKUP_PINNED, -1, budget};
};

// ---- pages -------------------------------------------------------------------------------------

TEST(HostPages, AsManyAddressesAreReservedAsTheSystemHas) {
  std::size_t got = 0;
  std::byte* const first = backup::reserve_pages(std::size_t{1} << 60, kMiB, got);
  EXPECT_LT(got, std::size_t{1} << 60) << "more than any processor addresses";
  EXPECT_GE(got, kMiB);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(first) % backup::kHugePage, 0U);
  backup::commit_pages(first + got - kMiB, kMiB, -1);
  std::memset(first + got - kMiB, 1, kMiB);
  backup::unreserve_pages(first, got);
}

TEST(HostPages, WhatTheSystemRefusesIsOutOfHostMemory) {
  std::size_t got = 0;
  try {
    backup::reserve_pages(std::size_t{1} << 60, std::size_t{1} << 60, got);
    FAIL() << "an exabyte of addresses";
  } catch (const Error& error) {
    EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
    EXPECT_EQ(error.bytes, std::uint64_t{1} << 60);
    EXPECT_NE(error.message().find("1.00 EiB"), std::string::npos) << error.message();
  }
  EXPECT_EQ(got, 0U);
  std::byte* const first = backup::reserve_pages(kMiB, kMiB, got);
  EXPECT_THROW(backup::commit_pages(first + 1, kPage, -1), Error) << "not the start of a page";
  backup::unreserve_pages(first, got);
}

TEST(HostPages, ANodeIsAWishThatTheSystemMayRefuse) {
  for (const int node : {0, 900, 1 << 20}) {
    std::size_t got = 0;
    std::byte* const first = backup::reserve_pages(kMiB, kMiB, got);
    backup::commit_pages(first, kMiB, node);
    std::memset(first, 1, kMiB);
    EXPECT_EQ(first[kMiB - 1], std::byte{1}) << node;
    backup::unreserve_pages(first, got);
  }
}

// ---- addresses ---------------------------------------------------------------------------------

TEST_F(HostArenaTest, EightLargeDevicesHaveTheirAddressesInOneArena) {
  EXPECT_GE(HostArena::kAddressBytes, std::size_t{8} * 288'000'000'000U);
}

TEST_F(HostArenaTest, WhereAllAddressesAreInUseTheAdviceIsNoLimit) {
  HostArena small(Driver(faults.table()), CUMEMPOOL_BACKUP_PAGEABLE, -1, budget, 2 * kBlock);
  EXPECT_EQ(small.address_room(), 2 * kBlock);
  small.order(kPage);
  small.deliver(0);
  EXPECT_EQ(small.address_room(), kBlock);
  const Error error = error_of([&] { small.order(kPage + kBlock + kPage); });
  EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  EXPECT_NE(error.message().find("release_host_memory()"), std::string::npos) << error.message();
  EXPECT_EQ(error.message().find("ulimit"), std::string::npos) << error.message();
  EXPECT_EQ(small.held_bytes(), kPage) << "nothing is ordered";
  small.trim(0);
}

TEST_F(HostArenaTest, OnlySoManyBytesOfEmptyBlocksAreGivenBack) {
  arena.order(2 * kBlock + kPage);
  arena.deliver(0);
  EXPECT_EQ(arena.trim(0, kBlock - 1), kPage);
  EXPECT_EQ(arena.trim(0, kBlock), kBlock);
  EXPECT_EQ(arena.held_bytes(), kBlock);
  EXPECT_EQ(arena.missing(kBlock + 1), kPage);
}

// ---- blocks and spans --------------------------------------------------------------------------

TEST_F(HostArenaTest, BlocksLieSideBySideAndACopyMayUseOneAtATime) {
  arena.order(130 * kMiB);
  arena.deliver(0);
  const auto spans = take(arena, 130 * kMiB);
  ASSERT_EQ(spans.size(), 1U) << "three blocks, one range of addresses";
  EXPECT_EQ(host.counters().registrations, 3U);
  std::byte* const data = spans.front().data;
  EXPECT_EQ(arena.run(data, 130 * kMiB), kBlock);
  EXPECT_EQ(arena.run(data + 10 * kMiB, 130 * kMiB), kBlock - 10 * kMiB);
  EXPECT_EQ(arena.run(data + kBlock - 1, 100), 1U);
  EXPECT_EQ(arena.run(data + kBlock, 5 * kMiB), 5 * kMiB);
  EXPECT_EQ(arena.run(data + 2 * kBlock, 2 * kMiB), 2 * kMiB);
  std::memset(data, 1, 130 * kMiB);
  give(arena, spans);
}

TEST_F(HostArenaTest, ABlockMadeForASpanContinuesTheOneBefore) {
  const auto spans = take(arena, 70 * kMiB);
  ASSERT_EQ(spans.size(), 2U);
  EXPECT_EQ(spans[0].bytes, kBlock);
  EXPECT_EQ(spans[1].data, spans[0].data + kBlock);
  EXPECT_EQ(arena.used_bytes(), 70 * kMiB);
  EXPECT_EQ(host.counters().registered_bytes, arena.held_bytes());
  arena.release({spans[0].data, 70 * kMiB});  // both at once, for they lie side by side
  EXPECT_EQ(arena.used_bytes(), 0U);
  EXPECT_EQ(arena.held_bytes(), 70 * kMiB) << "kept for the next sleep";
  const HostSpan whole = arena.acquire(0, 70 * kMiB);
  EXPECT_EQ(whole.bytes, 70 * kMiB);
  arena.release(whole);
}

TEST_F(HostArenaTest, R13_NoMoreIsHeldThanWholePagesOfWhatIsUsed) {
  for (const std::size_t bytes : {std::size_t{1}, kPage, kPage + 1, 3 * kMiB + 5, 2 * kMiB + 1,
                                  kBlock - 1, kBlock + 1, 100 * kMiB + 123, 2 * kBlock}) {
    const ArenaOrder order(arena, bytes);
    const auto spans = take(arena, bytes);
    EXPECT_EQ(arena.used_bytes(), bytes);
    EXPECT_LT(arena.held_bytes(), bytes + kPage) << bytes;
    give(arena, spans);
    EXPECT_EQ(arena.trim(0), (bytes + kPage - 1) / kPage * kPage);
  }
}

TEST_F(HostArenaTest, AnArenaThatHoldsNothingHoldsNoAddresses) {
  // More of them than the address space would have room for.
  std::vector<std::unique_ptr<HostArena>> arenas;
  for (int i = 0; i < 200; ++i) {
    arenas.push_back(another(budget, CUMEMPOOL_BACKUP_PAGEABLE));
    const ArenaOrder order(*arenas.back(), kPage);
    give(*arenas.back(), take(*arenas.back(), kPage));
    ASSERT_EQ(arenas.back()->trim(0), kPage) << i;
  }
  HostArena& used_again = *arenas.front();
  const ArenaOrder order(used_again, kPage);
  const auto spans = take(used_again, kPage);
  std::memset(spans.front().data, 1, kPage);
  give(used_again, spans);
}

TEST_F(HostArenaTest, ReleasedSpansAreJoinedAndReused) {
  auto first = take(arena, 40 * kPage);
  arena.release(first.front());
  const auto a = arena.acquire(0, 10 * kPage);
  const auto b = arena.acquire(0, 10 * kPage);
  const auto c = arena.acquire(0, 10 * kPage);
  EXPECT_NE(a.data, b.data);
  EXPECT_NE(b.data, c.data);
  for (const HostSpan& span : {c, a, b}) arena.release(span);
  const auto whole = take(arena, 40 * kPage);
  EXPECT_EQ(whole.size(), 1U) << "what was split is one piece again";
  EXPECT_EQ(host.counters().registrations, 1U);
  give(arena, whole);
}

TEST_F(HostArenaTest, WhatIsFreeInPiecesIsUsedBeforeMoreIsPinned) {
  std::vector<HostSpan> spans;
  arena.order(8 * 64 * kPage);
  for (int i = 0; i < 8; ++i) spans.push_back(arena.acquire(0, 64 * kPage));
  for (std::size_t i = 0; i < 8; i += 2) arena.release(spans[i]);
  const auto pieces = take(arena, 4 * 64 * kPage);
  EXPECT_EQ(pieces.size(), 4U);
  EXPECT_EQ(host.counters().registrations, 1U);
  give(arena, pieces);
  for (std::size_t i = 1; i < 8; i += 2) arena.release(spans[i]);
  EXPECT_EQ(arena.used_bytes(), 0U);
}

TEST_F(HostArenaTest, AWholeSpanCrossesBlocksButNoGaps) {
  const HostSpan small = arena.acquire(0, kPage);
  const HostSpan whole = arena.acquire_whole(0, 130 * kMiB);
  EXPECT_EQ(whole.bytes, 130 * kMiB);
  EXPECT_EQ(arena.used_bytes(), 130 * kMiB + kPage);
  std::memset(whole.data, 3, whole.bytes);
  EXPECT_EQ(host.counters().registered_bytes, arena.held_bytes());
  arena.release(whole);
  const HostSpan again = arena.acquire_whole(0, 130 * kMiB);
  EXPECT_EQ(again.data, whole.data) << "it was free in one piece";
  arena.release(again);
  arena.release(small);
}

TEST_F(HostArenaTest, R13_AWholeSpanThatFailsHalfwayHoldsNothingInUse) {
  faults.fail_nth("host_register", 2, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  const Error error = error_of([&] { arena.acquire_whole(0, 130 * kMiB); });
  EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  EXPECT_EQ(arena.used_bytes(), 0U);
  EXPECT_EQ(arena.held_bytes(), kBlock) << "what was pinned until then is free room";
  EXPECT_EQ(host.counters().registered_bytes, kBlock);
  const HostSpan whole = arena.acquire_whole(0, 130 * kMiB);
  EXPECT_EQ(whole.bytes, 130 * kMiB);
  arena.release(whole);
}

TEST_F(HostArenaTest, PageableMemoryIsNotRegistered) {
  const auto pageable = another(budget, CUMEMPOOL_BACKUP_PAGEABLE);
  const ArenaOrder order(*pageable, 70 * kMiB);
  const auto spans = take(*pageable, 70 * kMiB);
  std::memset(spans.front().data, 1, spans.front().bytes);
  EXPECT_EQ(host.counters().registrations, 0U);
  EXPECT_EQ(pageable->held_bytes(), 70 * kMiB);
  give(*pageable, spans);
  EXPECT_EQ(pageable->trim(0), 70 * kMiB);
}

// ---- orders ------------------------------------------------------------------------------------

TEST_F(HostArenaTest, AnOrderIsDeliveredThenCancelled) {
  arena.order(130 * kMiB);
  EXPECT_EQ(arena.held_bytes(), 130 * kMiB) << "on order counts as held: the limit covers it";
  EXPECT_EQ(host.counters().registered_bytes, 0U);
  const auto spans = take(arena, 70 * kMiB);
  EXPECT_EQ(host.counters().registered_bytes, 2 * kBlock);
  arena.cancel_order();
  EXPECT_EQ(arena.held_bytes(), 2 * kBlock) << "what was not delivered is given back";
  EXPECT_EQ(budget.claimed(), 2 * kBlock);
  EXPECT_EQ(arena.used_bytes(), 70 * kMiB);
  arena.cancel_order();
  give(arena, spans);
}

TEST_F(HostArenaTest, AnOrderCountsWhatIsFreeAlready) {
  give(arena, take(arena, 32 * kMiB));
  {
    const ArenaOrder order(arena, 40 * kMiB);
    EXPECT_EQ(arena.held_bytes(), 40 * kMiB);
  }
  EXPECT_EQ(arena.held_bytes(), 32 * kMiB) << "an order ends with its object";
  const ArenaOrder nothing(arena, 32 * kMiB);
  EXPECT_EQ(arena.held_bytes(), 32 * kMiB);
}

TEST_F(HostArenaTest, ASecondOrderTakesThePlaceOfTheFirst) {
  arena.order(70 * kMiB);
  arena.order(kMiB);
  EXPECT_EQ(arena.held_bytes(), kMiB);
  arena.deliver(0);
  EXPECT_EQ(host.counters().registered_bytes, kMiB);
}

TEST_F(HostArenaTest, DeliverPinsAllOfTheOrder) {
  arena.order(40 * kMiB);
  arena.deliver(0);
  arena.cancel_order();
  EXPECT_EQ(host.counters().registered_bytes, 40 * kMiB);
  EXPECT_EQ(arena.used_bytes(), 0U);
  give(arena, take(arena, 40 * kMiB));
  EXPECT_EQ(arena.held_bytes(), 40 * kMiB) << "nothing more was needed";
}

TEST_F(HostArenaTest, R13_AFailedPinOfAnyBlockKeepsTheNumbersExact) {
  for (std::uint64_t block = 1; block <= 3; ++block) {
    arena.order(130 * kMiB);
    faults.fail_nth("host_register", block, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
    const Error error = error_of([&] { arena.deliver(0); });
    EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
    EXPECT_NE(error.advice.find("ulimit -l"), std::string::npos);
    arena.cancel_order();
    EXPECT_EQ(arena.held_bytes(), (block - 1) * kBlock);
    EXPECT_EQ(host.counters().registered_bytes, (block - 1) * kBlock);
    EXPECT_EQ(budget.claimed(), (block - 1) * kBlock);
    give(arena, take(arena, 130 * kMiB));
    EXPECT_EQ(arena.trim(0), 130 * kMiB) << "the hole was left, nothing else";
  }
}

TEST_F(HostArenaTest, AnOrderGoesOnBehindABlockThatCouldNotBePinned) {
  arena.order(130 * kMiB);
  faults.fail_nth("host_register", 1, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  EXPECT_EQ(error_of([&] { arena.acquire(0, kMiB); }).status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  const auto spans = take(arena, 130 * kMiB);
  EXPECT_EQ(arena.used_bytes(), 130 * kMiB);
  give(arena, spans);
  arena.cancel_order();
  EXPECT_EQ(host.counters().registered_bytes, arena.held_bytes());
}

// ---- the limit ---------------------------------------------------------------------------------

TEST_F(HostArenaTest, TheLimitHoldsAndSaysSo) {
  HostBudget tight(kMiB);
  const auto limited = another(tight);
  for (const bool ordered : {false, true}) {
    const Error error = error_of([&] {
      if (ordered) {
        limited->order(kMiB + 1);
      } else {
        take(*limited, kMiB + 1);
      }
    });
    EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
    EXPECT_NE(error.message().find("the limit is 1.00 MiB"), std::string::npos) << error.message();
    EXPECT_NE(error.message().find("host_backup_limit"), std::string::npos) << error.message();
    EXPECT_EQ(limited->held_bytes(), 0U) << "refused before anything was pinned";
  }
}

TEST_F(HostArenaTest, WhatFitsTheLimitIsGranted) {
  for (const std::size_t bytes : {4 * kPage, 3 * kMiB, 65 * kMiB + kPage}) {
    HostBudget exact(bytes);
    const auto limited = another(exact);
    give(*limited, take(*limited, bytes));
    EXPECT_LE(limited->held_bytes(), bytes);
    limited->trim(0);
  }
}

TEST_F(HostArenaTest, WhatIsHeldAlreadyIsUsedBeforeTheLimitIsAsked) {
  HostBudget tight(kMiB);
  const auto limited = another(tight);
  for (int round = 0; round < 3; ++round) {
    give(*limited, take(*limited, kMiB / 2));
    give(*limited, take(*limited, kMiB));
  }
  EXPECT_EQ(limited->held_bytes(), kMiB);
  limited->trim(0);
}

TEST_F(HostArenaTest, TwoArenasShareOneLimit) {
  HostBudget shared(3 * kMiB);
  const auto first = another(shared);
  const auto second = another(shared);
  give(*first, take(*first, 2 * kMiB));
  EXPECT_EQ(shared.room(), kMiB);
  const Error error = error_of([&] { second->order(2 * kMiB); });
  EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  EXPECT_NE(error.message().find("2.00 MiB are held"), std::string::npos) << error.message();
  give(*second, take(*second, kMiB));
  EXPECT_EQ(shared.room(), 0U);
  EXPECT_EQ(first->trim(0), 2 * kMiB);
  give(*second, take(*second, 3 * kMiB));
  EXPECT_EQ(shared.claimed(), 3 * kMiB);
  second->trim(0);
  EXPECT_EQ(shared.claimed(), 0U);
}

// ---- registrations -----------------------------------------------------------------------------

// Three blocks, of which the last is short.
class JoinedBlocks : public HostArenaTest {
 protected:
  static constexpr std::size_t kAll = 130 * kMiB;

  void SetUp() override {
    arena.order(kAll);
    arena.deliver(0);
    take_all();
    ASSERT_EQ(host.counters().registrations, 3U);
  }
  void TearDown() override {
    faults.fail_nothing();
    arena.release({data, kAll});
    EXPECT_EQ(arena.trim(0), kAll);
    EXPECT_EQ(host.counters().registered_bytes, 0U);
  }

  // Block by block, so that they can come back one by one.
  void take_all() {
    data = arena.acquire(0, kBlock).data;
    ASSERT_EQ(arena.acquire(0, kBlock).data, data + kBlock);
    ASSERT_EQ(arena.acquire(0, kAll - 2 * kBlock).data, data + 2 * kBlock);
  }
  // Over the border of the first two blocks.
  void join() { arena.join(0, data + 63 * kMiB, 2 * kMiB); }

  std::byte* data = nullptr;
};

TEST_F(JoinedBlocks, AreOneRegistrationWithAllTheirNeighbours) {
  arena.join(0, data + kMiB, 3 * kMiB);
  EXPECT_EQ(host.counters().registrations, 3U) << "inside one block";
  join();
  EXPECT_EQ(host.counters().registrations, 1U);
  EXPECT_EQ(host.counters().registered_bytes, kAll);
  const std::uint64_t calls = faults.calls("host_register");
  arena.join(0, data, kAll);
  EXPECT_EQ(faults.calls("host_register"), calls) << "nothing to be done";
}

TEST_F(JoinedBlocks, LaterBlocksAreJoinedWithThem) {
  join();
  const auto more = take(arena, kBlock);  // in a slot of its own, behind the short block
  EXPECT_EQ(host.counters().registrations, 2U);
  arena.join(0, more.front().data, kBlock);
  EXPECT_EQ(host.counters().registrations, 2U) << "a gap lies between them";
  give(arena, more);
  EXPECT_EQ(arena.trim(0), kBlock);
}

TEST_F(JoinedBlocks, R13_TrimReturnsThoseThatHoldNothingAndKeepsTheOthersPinned) {
  join();
  arena.release({data + kBlock, kBlock});
  EXPECT_EQ(arena.trim(0), kBlock);
  EXPECT_EQ(host.counters().registrations, 2U);
  EXPECT_EQ(host.counters().registered_bytes, kAll - kBlock);
  data[0] = data[kAll - 1] = std::byte{1};
  const auto again = take(arena, kBlock);
  EXPECT_EQ(arena.held_bytes(), kAll);
  give(arena, again);
  arena.trim(0);
  arena.release({data, kBlock});
  arena.release({data + 2 * kBlock, kAll - 2 * kBlock});
  EXPECT_EQ(arena.trim(0), kAll - kBlock);
  take_all();  // for TearDown
}

TEST_F(JoinedBlocks, AFailedJoinLeavesEveryBlockPinnedAsItWas) {
  for (const char* entry : {"host_register", "host_unregister"}) {
    for (std::uint64_t n = 1; n <= (entry[5] == 'r' ? 1U : 3U); ++n) {
      faults.fail_nth(entry, n, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
      const Error error = error_of([&] { join(); });
      EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_HOST_MEMORY) << entry << n;
      EXPECT_EQ(host.counters().registrations, 3U) << entry << n;
      EXPECT_EQ(host.counters().registered_bytes, kAll) << entry << n;
      faults.fail_nothing();
    }
  }
  join();
  EXPECT_EQ(host.counters().registrations, 1U);
}

TEST_F(JoinedBlocks, WhatCouldNotBePinnedAgainIsPinnedBeforeTheNextCopy) {
  faults.fail_nth("host_register", 1, CUMEMPOOL_RESULT_OUT_OF_MEMORY,
                  FaultDriver::Repeat::kFromThenOn);
  EXPECT_EQ(error_of([&] { join(); }).status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  EXPECT_EQ(host.counters().registered_bytes, 0U);
  EXPECT_EQ(error_of([&] { arena.pin_lost(0); }).status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  faults.fail_nothing();
  arena.pin_lost(0);
  EXPECT_EQ(host.counters().registered_bytes, kAll);
  join();
  EXPECT_EQ(host.counters().registrations, 1U);
}

TEST_F(JoinedBlocks, WhatTrimCouldNotPinAgainIsPinnedBeforeTheNextCopy) {
  join();
  arena.release({data + kBlock, kBlock});
  faults.fail_nth("host_register", 1, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  EXPECT_EQ(arena.trim(0), kBlock);
  EXPECT_EQ(host.counters().registered_bytes, kAll - 2 * kBlock);
  arena.pin_lost(0);
  EXPECT_EQ(host.counters().registered_bytes, kAll - kBlock);
  arena.release({data, kBlock});
  arena.release({data + 2 * kBlock, kAll - 2 * kBlock});
  EXPECT_EQ(arena.trim(0), kAll - kBlock);
  take_all();  // for TearDown
}

TEST_F(JoinedBlocks, R13_JoinedBlocksThatCannotBeUnregisteredStayInUse) {
  join();
  arena.release({data, kAll});
  faults.fail_nth("host_unregister", 1, CUMEMPOOL_RESULT_INVALID_VALUE,
                  FaultDriver::Repeat::kFromThenOn);
  EXPECT_EQ(arena.trim(0), 0U);
  faults.fail_nothing();
  EXPECT_EQ(host.counters().registered_bytes, kAll);
  take_all();  // handed out again
}

// ---- giving back -------------------------------------------------------------------------------

TEST_F(HostArenaTest, TrimReturnsOnlyBlocksThatHoldNothing) {
  const auto kept = take(arena, 64 << 10);
  const auto given_back = take(arena, 64 << 10);
  give(arena, given_back);
  EXPECT_EQ(arena.trim(0), 64U << 10);
  EXPECT_EQ(arena.held_bytes(), 64U << 10);
  kept.front().data[0] = std::byte{1};
  give(arena, kept);
  EXPECT_EQ(arena.trim(0), 64U << 10);
  EXPECT_EQ(arena.trim(0), 0U);
  EXPECT_EQ(host.counters().registered_bytes, 0U);
}

TEST_F(HostArenaTest, TrimLeavesHolesBetweenBlocksInUse) {
  std::vector<HostSpan> spans;
  arena.order(3 * kBlock);
  for (int i = 0; i < 3; ++i) spans.push_back(arena.acquire_whole(0, kBlock));
  EXPECT_EQ(host.counters().registrations, 0U + 3U);
  arena.cancel_order();
  arena.release(spans[1]);
  EXPECT_EQ(arena.trim(0), kBlock);
  EXPECT_EQ(host.counters().registered_bytes, 2 * kBlock);
  const auto more = take(arena, 2 * kBlock);
  for (const HostSpan& span : more) std::memset(span.data, 1, span.bytes);
  std::memset(spans[0].data, 2, kBlock);
  std::memset(spans[2].data, 2, kBlock);
  give(arena, more);
  arena.release(spans[0]);
  arena.release(spans[2]);
  EXPECT_EQ(arena.trim(0), 4 * kBlock);
  EXPECT_EQ(budget.claimed(), 0U);
}

TEST_F(HostArenaTest, TheSameAddressesAreUsedAgainAfterATrim) {
  const auto first = take(arena, 70 * kMiB);
  give(arena, first);
  EXPECT_EQ(arena.trim(0), 70 * kMiB);
  const auto again = take(arena, 70 * kMiB);
  EXPECT_EQ(again.front().data, first.front().data);
  std::memset(again.front().data, 1, again.front().bytes);
  give(arena, again);
}

TEST_F(HostArenaTest, R13_FailedRegistrationHoldsNothing) {
  faults.fail_nth("host_register", 1, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  const Error error = error_of([&] { take(arena, kMiB); });
  EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  EXPECT_EQ(error.result, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  EXPECT_NE(error.advice.find("ulimit -l"), std::string::npos);
  EXPECT_EQ(arena.held_bytes(), 0U);
  give(arena, take(arena, kMiB));
}

TEST_F(HostArenaTest, R13_ABlockThatCannotBeUnregisteredStaysInUse) {
  give(arena, take(arena, kMiB));
  faults.fail_nth("host_unregister", 1, CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(arena.trim(0), 0U);
  EXPECT_EQ(arena.held_bytes(), kMiB);
  give(arena, take(arena, kMiB));
  EXPECT_EQ(host.counters().registrations, 1U) << "and is handed out again";
  EXPECT_EQ(arena.trim(0), kMiB);
}

TEST_F(HostArenaTest, R5_TheEndLeavesMemoryMappedThatIsStillRegistered) {
  HostBudget own(0);
  auto ending = another(own);
  const auto spans = take(*ending, kMiB);
  give(*ending, spans);
  ending->order(10 * kMiB);  // goes as well
  ending.reset();
  EXPECT_EQ(own.claimed(), 0U);
  std::memset(spans.front().data, 1, kMiB);  // as a copy that still runs would
  const auto& table = host.table();
  EXPECT_EQ(table.host_unregister(table.self, 0, spans.front().data), CUMEMPOOL_RESULT_SUCCESS);
}

}  // namespace
}  // namespace cumempool::tests
