// What sleep and wake promise when nothing fails: contents, addresses, policies, dead ranges,
// reports and statistics.
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "fault_driver.hpp"
#include "host_fixture.hpp"

namespace cumempool::tests {
namespace {

constexpr std::uint64_t kHighest = UINT64_MAX;

class SleepWake : public ::testing::Test {
 protected:
  Host host;
  Pool pool{host};
};

TEST_F(SleepWake, R2_BytesAndAddressesAreTheSameAfterSleepAndWake) {
  const auto small = pool.malloc("weights", 1);
  const auto large = pool.malloc("weights", 5 * kGranule + 3);
  const auto other = pool.malloc("weights", kGranule, 1);
  write_pattern(small, kGranule, 1);
  write_pattern(large, 6 * kGranule, 2);
  write_pattern(other, kGranule, 3);
  for (int cycle = 0; cycle < 3; ++cycle) {
    ASSERT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_OK);
    EXPECT_EQ(host.counters().charged_bytes, 0U);
    expect_exact_numbers(pool, host);
    ASSERT_EQ(pool.wake().status, CUMEMPOOL_OK);
    EXPECT_TRUE(holds_pattern(small, kGranule, 1));
    EXPECT_TRUE(holds_pattern(large, 6 * kGranule, 2));
    EXPECT_TRUE(holds_pattern(other, kGranule, 3));
    expect_exact_numbers(pool, host);
  }
  EXPECT_EQ(pool.find(large).generation, 4U);
}

TEST_F(SleepWake, R5_WorkInFlightWhenSleepIsCalledIsFinishedFirst) {
  const auto address = pool.malloc("weights", kGranule);
  UserStream stream(host);
  for (std::uint8_t cycle = 1; cycle <= 5; ++cycle) {
    stream.fill(address, kGranule, cycle);  // would run after the copy, were it not waited for
    ASSERT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_OK);
    ASSERT_EQ(pool.wake().status, CUMEMPOOL_OK);
    EXPECT_TRUE(all_are(address, kGranule, cycle));
  }
}

TEST_F(SleepWake, R5_FreeWaitsForWorkInFlight) {
  const auto address = pool.malloc("weights", kGranule);
  UserStream stream(host);
  stream.fill(address, kGranule, 7);
  EXPECT_EQ(cumempool_free(address), CUMEMPOOL_OK);
  EXPECT_EQ(host.counters().queued_commands, 0U);
  // Work into memory that had gone would have broken the device.
  const auto next = pool.malloc("weights", kGranule);
  stream.fill(next, kGranule, 8);
  EXPECT_EQ(cumempool_free(next), CUMEMPOOL_OK);
}

TEST_F(SleepWake, R5_WakeReturnsWhenRestoredBytesAreThere) {
  const auto kept = pool.malloc("weights", kGranule);
  pool.declare("kv", CUMEMPOOL_ON_WAKE_ZERO);
  const auto zeroed = pool.malloc("kv", kGranule);
  write_pattern(kept, kGranule, 4);
  must(pool.sleep({{{"weights", kOffload}, {"kv", kDiscard}}}).status);
  must(pool.wake().status);
  EXPECT_EQ(host.counters().queued_commands, 0U);
  EXPECT_TRUE(holds_pattern(kept, kGranule, 4));
  EXPECT_TRUE(all_are(zeroed, kGranule, 0));
}

TEST_F(SleepWake, OnlyTheListedTagsSleepAndWake) {
  const auto weights = pool.malloc("weights", kGranule);
  const auto kv = pool.malloc("kv", kGranule);
  must(pool.sleep({{{"weights", kOffload}, {"kv", kDiscard}}}).status);
  must(pool.wake({{"kv"}}).status);
  EXPECT_EQ(pool.find(weights).state, CUMEMPOOL_ASLEEP_BACKED_UP);
  EXPECT_EQ(pool.find(kv).state, CUMEMPOOL_AWAKE);
  must(pool.wake(std::vector<const char*>{}).status);
  EXPECT_EQ(pool.find(weights).state, CUMEMPOOL_ASLEEP_BACKED_UP) << "an empty list names no tag";
  must(pool.wake({{"weights", "weights"}}).status);
  EXPECT_EQ(pool.find(weights).state, CUMEMPOOL_AWAKE);
}

TEST_F(SleepWake, R3_SleepAndWakeAreIdempotent) {
  const auto address = pool.malloc("weights", kGranule);
  write_pattern(address, kGranule, 1);
  EXPECT_TRUE(pool.wake().rows.empty());
  must(pool.sleep("weights", kOffload).status);
  const Outcome again = pool.sleep("weights", kOffload);
  EXPECT_EQ(again.status, CUMEMPOOL_OK);
  EXPECT_TRUE(again.rows.empty());
  must(pool.sleep("weights", kDiscard).status);
  EXPECT_EQ(pool.find(address).state, CUMEMPOOL_ASLEEP_BACKED_UP)
      << "without drop_backups, what is backed up stays so";
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(address, kGranule, 1));
  EXPECT_TRUE(pool.wake().rows.empty());
  EXPECT_EQ(pool.find(address).generation, 2U) << "only a real wake makes a new generation";
}

TEST_F(SleepWake, R3_AnAllocationMadeBetweenTwoSleepsFollowsAtTheSecond) {
  const auto first = pool.malloc("weights", kGranule);
  must(pool.sleep("weights", kOffload).status);
  const auto second = pool.malloc("weights", 2 * kGranule);
  EXPECT_EQ(pool.sleep("weights", kOffload).row("weights").allocations, 1U);
  const Outcome woken = pool.wake();
  EXPECT_EQ(woken.row("weights").allocations, 2U);
  EXPECT_EQ(pool.find(first).state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(pool.find(second).state, CUMEMPOOL_AWAKE);
}

TEST_F(SleepWake, DropBackupsForgetsWhatWasSavedAndOnlyOfDiscardedTags) {
  const auto weights = pool.malloc("weights", 2 * kGranule);
  const auto kv = pool.malloc("kv", kGranule);
  write_pattern(kv, kGranule, 5);
  must(pool.sleep({{{"weights", kOffload}, {"kv", kOffload}}}).status);
  SleepCall forget{{{"weights", kDiscard}, {"kv", kOffload}}};
  forget.drop_backups = true;
  const Outcome outcome = pool.sleep(forget);
  ASSERT_EQ(outcome.status, CUMEMPOOL_OK);
  EXPECT_EQ(outcome.rows.size(), 1U);
  EXPECT_EQ(outcome.row("weights").allocations, 1U);
  EXPECT_EQ(outcome.row("weights").discarded_bytes, 2 * kGranule);
  EXPECT_EQ(outcome.row("weights").freed_bytes, 0U);
  EXPECT_EQ(pool.find(weights).state, CUMEMPOOL_ASLEEP_DISCARDED);
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, kGranule);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(kv, kGranule, 5));
}

TEST_F(SleepWake, OnWakeZeroIsTakenFromThePolicyAtTheTimeOfTheWake) {
  const auto address = pool.malloc("kv", 3 * kGranule);
  write_pattern(address, 3 * kGranule, 1);
  must(pool.sleep("kv", kDiscard).status);
  pool.declare("kv", CUMEMPOOL_ON_WAKE_ZERO);
  const Outcome woken = pool.wake();
  EXPECT_EQ(woken.row("kv").zeroed_bytes, 3 * kGranule);
  EXPECT_TRUE(all_are(address, 3 * kGranule, 0));
  write_pattern(address, 3 * kGranule, 2);
  must(pool.sleep("kv", kOffload).status);
  EXPECT_EQ(pool.wake().row("kv").zeroed_bytes, 0U) << "a backup is restored, not zeroed";
  EXPECT_TRUE(holds_pattern(address, 3 * kGranule, 2));
}

TEST_F(SleepWake, WithoutOnWakeZeroDiscardedContentsAreGone) {
  const auto address = pool.malloc("kv", kGranule);
  write_pattern(address, kGranule, 1);
  must(pool.sleep("kv", kDiscard).status);
  EXPECT_EQ(pool.wake().row("kv").zeroed_bytes, 0U);
  EXPECT_FALSE(holds_pattern(address, kGranule, 1));
}

TEST_F(SleepWake, R6_FreeingWhileAsleepReturnsAddressAndBackup) {
  const auto backed_up = pool.malloc("weights", 2 * kGranule);
  const auto discarded = pool.malloc("kv", kGranule);
  must(pool.sleep({{{"weights", kOffload}, {"kv", kDiscard}}}).status);
  EXPECT_EQ(cumempool_free(backed_up), CUMEMPOOL_OK);
  EXPECT_EQ(cumempool_free(discarded), CUMEMPOOL_OK);
  EXPECT_EQ(host.counters().reserved_bytes, 0U);
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, 0U);
  EXPECT_EQ(cumempool_free(backed_up), CUMEMPOOL_NOT_OWNED);
  EXPECT_TRUE(pool.wake().rows.empty());
}

TEST_F(SleepWake, PinnedMemoryIsKeptForTheNextSleepAndReturnedOnRequest) {
  pool.malloc("weights", 4 * kGranule);
  must(pool.sleep("weights", kOffload).status);
  const auto held = host.counters().registered_bytes;
  EXPECT_EQ(held, 4 * kGranule);
  std::uint64_t released = 1;
  must(cumempool_release_host_memory(pool.get(), &released));
  EXPECT_EQ(released, 0U) << "it holds a backup";
  must(pool.wake().status);
  must(pool.sleep("weights", kOffload).status);
  EXPECT_EQ(host.counters().registered_bytes, held) << "reused";
  must(pool.wake().status);
  must(cumempool_release_host_memory(pool.get(), &released));
  EXPECT_EQ(released, held);
  EXPECT_EQ(host.counters().registered_bytes, 0U);
}

TEST_F(SleepWake, TwoAllocatorsOnOneDriverDoNotTouchEachOther) {
  const Pool other(host);
  const auto mine = pool.malloc("weights", kGranule);
  const auto theirs = other.malloc("weights", kGranule);
  write_pattern(theirs, kGranule, 9);
  must(pool.sleep("weights", kOffload).status);
  EXPECT_TRUE(holds_pattern(theirs, kGranule, 9));
  EXPECT_EQ(other.find(theirs).state, CUMEMPOOL_AWAKE);
  cumempool_allocation_info info{};
  info.size = sizeof info;
  EXPECT_EQ(cumempool_find(other.get(), mine, &info), CUMEMPOOL_NOT_OWNED);
  EXPECT_EQ(cumempool_find(nullptr, mine, &info), CUMEMPOOL_OK);
  EXPECT_EQ(info.state, CUMEMPOOL_ASLEEP_BACKED_UP);
  EXPECT_EQ(pool.snapshot().totals.reserved_address_bytes, kGranule);
  EXPECT_EQ(other.snapshot().totals.physical_bytes, kGranule);
  EXPECT_EQ(pool.close(true), CUMEMPOOL_OK);
  EXPECT_EQ(other.sleep("weights", kOffload).status, CUMEMPOOL_OK);
  EXPECT_EQ(other.wake().status, CUMEMPOOL_OK);
  EXPECT_TRUE(holds_pattern(theirs, kGranule, 9));
  must(cumempool_free(mine));
}

TEST_F(SleepWake, SleepAndWakeOfNothingSucceed) {
  EXPECT_EQ(pool.sleep(SleepCall{}).status, CUMEMPOOL_OK);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_OK);
  pool.declare("empty");
  EXPECT_EQ(pool.sleep("empty", kOffload).status, CUMEMPOOL_OK);
  EXPECT_EQ(pool.snapshot().totals.sleeps, 2U);
  EXPECT_EQ(host.counters().retained_contexts, 0U) << "and touch no device";
}

// ---- dead ranges -------------------------------------------------------------------------------

class DeadRanges : public SleepWake {
 protected:
  static constexpr std::size_t kBytes = 4 * kGranule;
  static constexpr std::size_t kUnit = 512;  // what is live begins and ends at its multiples

  void SetUp() override {
    address = pool.malloc("weights", kBytes);
    write_pattern(address, kBytes, 1);
  }

  // Sleeps with these dead ranges and wakes; returns the bytes that were backed up.
  std::uint64_t backed_up_with(const std::vector<cumempool_extent>& dead) const {
    const Outcome slept = pool.sleep({{{"weights", kOffload}}, dead});
    EXPECT_EQ(slept.status, CUMEMPOOL_OK);
    const cumempool_report_row row = slept.row("weights");
    EXPECT_EQ(row.backed_up_bytes + row.discarded_bytes, row.freed_bytes);
    EXPECT_EQ(pool.snapshot().tag("weights").backup_bytes, row.backed_up_bytes);
    EXPECT_EQ(pool.wake().row("weights").restored_bytes, row.backed_up_bytes);
    return row.backed_up_bytes;
  }
  bool holds(std::size_t offset, std::size_t bytes) const {
    return holds_pattern(address, offset, bytes, 1);
  }

  cumempool_address address = 0;
};

TEST_F(DeadRanges, R9_AreNotCopied) {
  EXPECT_EQ(backed_up_with({{address + kUnit, 2 * kUnit}, {address + kGranule, kGranule}}),
            kBytes - kGranule - 2 * kUnit);
  EXPECT_TRUE(holds(0, kUnit));
  EXPECT_TRUE(holds(3 * kUnit, kGranule - 3 * kUnit));
  EXPECT_TRUE(holds(2 * kGranule, 2 * kGranule));
  EXPECT_FALSE(holds(kGranule, kGranule)) << "new memory has other contents";
}

TEST_F(DeadRanges, R9_AreRoundedInwards) {
  EXPECT_EQ(backed_up_with({{address + 10, 100}, {address + kUnit + 1, kUnit + 1}}), kBytes);
  EXPECT_TRUE(holds(0, kBytes));
  EXPECT_EQ(backed_up_with({{address + 500, 1100}}), kBytes - 2 * kUnit);
  EXPECT_TRUE(holds(0, kUnit));
  EXPECT_TRUE(holds(3 * kUnit, kBytes - 3 * kUnit));
}

TEST_F(DeadRanges, R9_MayComeUnsortedOverlappingRepeatedAndNested) {
  EXPECT_EQ(backed_up_with({{address + 90 * kUnit, 20 * kUnit},
                            {address + 10 * kUnit, 50 * kUnit},
                            {address + 50 * kUnit, 50 * kUnit},
                            {address + 20 * kUnit, 10},
                            {address + 90 * kUnit, 20 * kUnit},
                            {address + 30 * kUnit, 0}}),
            kBytes - 100 * kUnit);
  EXPECT_TRUE(holds(0, 10 * kUnit));
  EXPECT_TRUE(holds(110 * kUnit, kBytes - 110 * kUnit));
}

TEST_F(DeadRanges, R9_ThatReachIntoTheAllocationFromOutsideAreCut) {
  EXPECT_EQ(backed_up_with({{address - 100, 100 + kUnit}, {address + kBytes - 2 * kUnit, 5000}}),
            kBytes - 3 * kUnit);
  EXPECT_TRUE(holds(kUnit, kBytes - 3 * kUnit));
}

TEST_F(DeadRanges, R9_ALongOneCountsEvenWhereAShortOneStartsNearer) {
  EXPECT_EQ(backed_up_with({{address - 1000, 1000 + kUnit}, {address - 500, 10}}), kBytes - kUnit);
  EXPECT_TRUE(holds(kUnit, kBytes - kUnit));
}

TEST_F(DeadRanges, R9_OutsideAnyAllocationDoNothing) {
  EXPECT_EQ(backed_up_with({{0, 1}, {address - 4096, 4096}, {address + kBytes, 10}}), kBytes);
  EXPECT_TRUE(holds(0, kBytes));
}

TEST_F(DeadRanges, R9_OfZeroBytesDoNothing) {
  EXPECT_EQ(backed_up_with({{address, 0}, {address + 7, 0}}), kBytes);
  EXPECT_TRUE(holds(0, kBytes));
}

TEST_F(DeadRanges, R9_ThatEndPastTheLastAddressReachThere) {
  EXPECT_EQ(backed_up_with({{address + kGranule, kHighest}}), kGranule);
  EXPECT_TRUE(holds(0, kGranule));
  write_pattern(address, kBytes, 1);
  EXPECT_EQ(backed_up_with({{address + kGranule, kHighest - address - kGranule}}), kGranule);
  write_pattern(address, kBytes, 1);
  EXPECT_EQ(backed_up_with({{kHighest, kHighest}, {kHighest - 5, 100}}), kBytes)
      << "a wrapped end reaches no low address";
  EXPECT_TRUE(holds(0, kBytes));
}

TEST_F(DeadRanges, AreCopiedWhereAScopeMayHaveHandedThemOutSinceTheListWasMade) {
  const std::vector<cumempool_extent> dead{{address, kGranule}};
  const auto backed_up = [&](std::uint64_t as_of) {
    const Outcome slept = pool.sleep({{{"weights", kOffload}}, dead, {}, false, as_of});
    EXPECT_EQ(slept.status, CUMEMPOOL_OK);
    EXPECT_EQ(pool.wake().status, CUMEMPOOL_OK);
    return slept.row("weights").backed_up_bytes;
  };
  const std::uint64_t before = pool.moment();
  EXPECT_EQ(backed_up(before), kBytes - kGranule);
  std::uint32_t slot = 0;
  must(cumempool_bind_slot(pool.get(), "weights", &slot));
  const std::uint64_t inside = pool.moment();
  must(cumempool_unbind_slot(slot));
  const std::uint64_t after = pool.moment();
  EXPECT_EQ(backed_up(before), kBytes) << "the scope began and ended since";
  EXPECT_EQ(backed_up(inside), kBytes) << "the scope was open, and ended since";
  EXPECT_EQ(backed_up(after), kBytes - kGranule);
  pool.declare("other");
  must(cumempool_bind_slot(pool.get(), "other", &slot));
  EXPECT_EQ(backed_up(after), kBytes - kGranule) << "a scope of another tag";
  must(cumempool_unbind_slot(slot));
}

TEST_F(DeadRanges, AreCopiedOfAnAllocationThatIsYoungerThanTheList) {
  const std::uint64_t before = pool.moment();
  const auto young = pool.malloc("weights", kGranule);  // at an address that may be a dead one's
  write_pattern(young, kGranule, 7);
  const SleepCall call{{{"weights", kOffload}}, {{young, kGranule}}, {}, false, before};
  EXPECT_EQ(pool.sleep(call).row("weights").backed_up_bytes, kBytes + kGranule);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_OK);
  EXPECT_TRUE(holds_pattern(young, kGranule, 7));
}

TEST_F(DeadRanges, CountAsLiveForPrepareWhileAScopeMayHandThemOut) {
  std::uint32_t slot = 0;
  must(cumempool_bind_slot(pool.get(), "weights", &slot));
  const SleepCall call{{{"weights", kOffload}}, {{address, kBytes}}, {}, false, pool.moment()};
  std::uint64_t pinned = 0;
  EXPECT_EQ(pool.prepare(call, pinned), CUMEMPOOL_OK);
  EXPECT_GE(pinned, kBytes);
  must(cumempool_unbind_slot(slot));
}

TEST_F(DeadRanges, R9_MayCrossTheBordersOfAllocations) {
  const auto second = pool.malloc("weights", kBytes);
  write_pattern(second, kBytes, 2);
  const auto low = std::min(address, second);
  const auto high = std::max(address, second);
  // From the middle of the lower one to the middle of the higher one, whatever lies between.
  const std::uint64_t dead = high + kGranule - (low + kGranule);
  EXPECT_EQ(backed_up_with({{low + kGranule, dead}}), 4 * kGranule);
  EXPECT_TRUE(holds_pattern(low, kGranule, low == address ? 1 : 2));
  EXPECT_TRUE(holds_pattern(high, kGranule, 3 * kGranule, high == address ? 1 : 2));
}

TEST_F(DeadRanges, R9_AnAllocationThatIsAllDeadIsDiscarded) {
  must(pool.sleep({{{"weights", kOffload}}, {{address, kBytes}}}).status);
  EXPECT_EQ(pool.find(address).state, CUMEMPOOL_ASLEEP_DISCARDED);
  EXPECT_EQ(host.counters().registered_bytes, 0U);
  pool.declare("weights", CUMEMPOOL_ON_WAKE_ZERO);
  EXPECT_EQ(pool.wake().row("weights").zeroed_bytes, kBytes);
  EXPECT_TRUE(all_are(address, kBytes, 0));
}

TEST_F(DeadRanges, R9_ComeBackAsZeroWhereTheTagSaysSo) {
  pool.declare("weights", CUMEMPOOL_ON_WAKE_ZERO);
  must(pool.sleep({{{"weights", kOffload}}, {{address, kUnit}, {address + 2 * kUnit, kGranule}}})
           .status);
  EXPECT_EQ(pool.wake().row("weights").zeroed_bytes, kGranule + kUnit);
  EXPECT_TRUE(all_are(address, kUnit, 0));
  EXPECT_TRUE(holds(kUnit, kUnit));
  EXPECT_TRUE(all_are(address + 2 * kUnit, kGranule, 0));
  EXPECT_TRUE(holds(2 * kUnit + kGranule, kBytes - kGranule - 2 * kUnit));
}

TEST_F(DeadRanges, R9_DoNotMatterToATagThatIsDiscarded) {
  const Outcome slept = pool.sleep({{{"weights", kDiscard}}, {{address, 10}}});
  EXPECT_EQ(slept.row("weights").discarded_bytes, kBytes);
  EXPECT_EQ(slept.row("weights").backed_up_bytes, 0U);
}

// ---- reports and statistics --------------------------------------------------------------------

TEST_F(SleepWake, R13_ReportsAreExactPerTagAndDevice) {
  pool.malloc("weights", 3 * kGranule);
  pool.malloc("weights", kGranule, 1);
  pool.malloc("kv", 2 * kGranule);
  const auto partly_dead = pool.malloc("weights", kGranule);
  const Outcome slept =
      pool.sleep({{{"weights", kOffload}, {"kv", kDiscard}}, {{partly_dead, 1024}}});
  ASSERT_EQ(slept.rows.size(), 3U);
  const auto on_0 = slept.row("weights", 0);
  EXPECT_EQ(on_0.allocations, 2U);
  EXPECT_EQ(on_0.freed_bytes, 4 * kGranule);
  EXPECT_EQ(on_0.backed_up_bytes, 4 * kGranule - 1024);
  EXPECT_EQ(on_0.discarded_bytes, 1024U);
  EXPECT_EQ(on_0.mapped_bytes + on_0.restored_bytes + on_0.zeroed_bytes, 0U);
  EXPECT_EQ(slept.row("weights", 1).backed_up_bytes, kGranule);
  EXPECT_EQ(slept.row("kv").discarded_bytes, 2 * kGranule);
  EXPECT_EQ(slept.row("kv").backed_up_bytes, 0U);
  EXPECT_TRUE(slept.problems.empty());
  for (const auto& row : slept.rows) {
    const bool copied = row.backed_up_bytes != 0;
    EXPECT_EQ(row.copy_seconds > 0.0, copied) << row.tag;
    EXPECT_LE(row.copy_seconds, slept.seconds) << "devices copy at the same time";
  }

  const Outcome woken = pool.wake();
  ASSERT_EQ(woken.rows.size(), 3U);
  EXPECT_EQ(woken.row("weights", 0).mapped_bytes, 4 * kGranule);
  EXPECT_EQ(woken.row("weights", 0).restored_bytes, 4 * kGranule - 1024);
  EXPECT_EQ(woken.row("weights", 1).restored_bytes, kGranule);
  EXPECT_EQ(woken.row("kv").allocations, 1U);
  EXPECT_EQ(woken.row("kv").restored_bytes + woken.row("kv").freed_bytes, 0U);
}

TEST_F(SleepWake, R13_SnapshotsAreExact) {
  pool.declare("unused");
  const auto weights = pool.malloc("weights", kGranule + 1);
  const auto kv = pool.malloc("kv", 5, 1);
  must(pool.sleep("weights", kOffload).status);
  const Picture picture = pool.snapshot();
  ASSERT_EQ(picture.allocations.size(), 2U);
  const auto& first = picture.allocations[0];
  EXPECT_EQ(first.address, weights);
  EXPECT_EQ(first.bytes, 2 * kGranule);
  EXPECT_EQ(first.requested_bytes, kGranule + 1);
  EXPECT_STREQ(first.tag, "weights");
  EXPECT_EQ(first.device, 0);
  EXPECT_EQ(first.state, CUMEMPOOL_ASLEEP_BACKED_UP);
  EXPECT_EQ(first.generation, 1U);
  EXPECT_EQ(first.backup_bytes, 2 * kGranule);
  EXPECT_EQ(first.backup_tier, CUMEMPOOL_BACKUP_PINNED);
  EXPECT_EQ(picture.allocations[1].backup_tier, CUMEMPOOL_BACKUP_UNSET);
  EXPECT_EQ(picture.allocations[1].address, kv);
  EXPECT_LT(first.sequence, picture.allocations[1].sequence);

  ASSERT_EQ(picture.tags.size(), 3U);
  EXPECT_EQ(picture.tag("unused", -1).awake_allocations, 0U);
  const auto row = picture.tag("weights");
  EXPECT_EQ(row.backed_up_allocations, 1U);
  EXPECT_EQ(row.backed_up_bytes, 2 * kGranule);
  EXPECT_EQ(row.awake_allocations + row.discarded_allocations + row.unreleased_bytes, 0U);
  EXPECT_EQ(row.handle_types, static_cast<std::uint32_t>(CUMEMPOOL_HANDLE_POSIX_FD));
  EXPECT_EQ(row.rdma, 0U);
  EXPECT_EQ(row.backup_tier, CUMEMPOOL_BACKUP_PINNED);
  EXPECT_EQ(row.backup_bytes, 2 * kGranule);
  EXPECT_EQ(row.retained_bytes, 0U);
  EXPECT_EQ(picture.tag("kv", 1).awake_bytes, kGranule);

  EXPECT_EQ(picture.totals.physical_bytes, kGranule);
  EXPECT_EQ(picture.totals.mapped_bytes, kGranule);
  EXPECT_EQ(picture.totals.reserved_address_bytes, 3 * kGranule);
  EXPECT_EQ(picture.totals.host_used_bytes, 2 * kGranule);
  EXPECT_EQ(picture.totals.malloc_calls, 2U);
  EXPECT_EQ(picture.totals.malloc_failures + picture.totals.free_calls, 0U);
  EXPECT_EQ(picture.totals.sleeps, 1U);
  EXPECT_EQ(picture.totals.wakes + picture.totals.swaps, 0U);
  EXPECT_EQ(picture.totals.failed_transitions, 0U);
  EXPECT_EQ(picture.totals.pageable_bytes + picture.totals.file_bytes, 0U);
  EXPECT_EQ(picture.totals.peer_bytes + picture.totals.staging_bytes, 0U);
  EXPECT_TRUE(pool.snapshot(false).allocations.empty());
  expect_exact_numbers(pool, host);
}

TEST_F(SleepWake, SnapshotsAndReportsOutliveTheAllocatorHandle) {
  auto* report = static_cast<cumempool_report*>(nullptr);
  auto* snapshot = static_cast<cumempool_snapshot*>(nullptr);
  pool.malloc("weights", kGranule);
  const cumempool_tag_action action{"weights", kOffload};
  cumempool_sleep_request request{};
  request.size = sizeof request;
  request.tags = &action;
  request.tag_count = 1;
  must(cumempool_sleep(pool.get(), &request, &report));
  must(cumempool_take_snapshot(pool.get(), 1, &snapshot));
  must(cumempool_free(pool.snapshot().allocations.front().address));
  pool.destroy();
  std::size_t count = 0;
  EXPECT_STREQ(cumempool_report_rows(report, &count)->tag, "weights");
  EXPECT_STREQ(cumempool_snapshot_tags(snapshot, &count)->tag, "weights");
  EXPECT_STREQ(cumempool_snapshot_allocations(snapshot, &count)->tag, "weights");
  cumempool_report_destroy(report);
  cumempool_snapshot_destroy(snapshot);
}

TEST_F(SleepWake, PreparePinsWhatTheSleepNeedsAndNoMore) {
  const auto kept = pool.malloc("weights", 8 * kGranule);
  pool.malloc("kv", 4 * kGranule);
  write_pattern(kept, 8 * kGranule, 9);
  const SleepCall call{{{"weights", kOffload}, {"kv", kDiscard}}, {{kept, kGranule}}};
  std::uint64_t pinned = 0;
  must(pool.prepare(call, pinned));
  EXPECT_GE(pinned, 7 * kGranule) << "dead ranges need no room";
  EXPECT_EQ(host.counters().registered_bytes, pinned);
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, 0U);
  const auto registrations = host.counters().registrations;
  must(pool.sleep(call).status);
  EXPECT_EQ(host.counters().registrations, registrations) << "the sleep only copies";
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(kept, kGranule, 7 * kGranule, 9));
  must(pool.prepare(call, pinned));
  EXPECT_EQ(pinned, 0U) << "there is room already";
}

TEST_F(SleepWake, PrepareRefusesWhatSleepWouldRefuse) {
  pool.malloc("weights", kGranule);
  std::uint64_t pinned = 77;
  EXPECT_EQ(pool.prepare(SleepCall{{{"nobody", kOffload}}}, pinned), CUMEMPOOL_UNKNOWN_TAG);
  EXPECT_EQ(cumempool_prepare(pool.get(), nullptr, nullptr, 0, &pinned),
            CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(pinned, 77U);
  must(pool.prepare(SleepCall{{{"weights", kDiscard}}}, pinned));
  EXPECT_EQ(pinned, 0U);
}

TEST(Statistics, R13_ThePeakIsTheMostThatWasHeldSinceItWasReset) {
  const Host host;
  const Pool pool{host};
  const auto peak = [&] { return pool.snapshot().totals.peak_physical_bytes; };
  EXPECT_EQ(peak(), 0U);
  const auto first = pool.malloc("w", 3 * kGranule);
  const auto second = pool.malloc("w", kGranule);
  EXPECT_EQ(peak(), 4 * kGranule);
  must(cumempool_free(second));
  must(pool.sleep("w", kOffload).status);
  EXPECT_EQ(peak(), 4 * kGranule) << "what has gone counts";
  must(cumempool_reset_peaks(pool.get()));
  EXPECT_EQ(peak(), 0U);
  must(pool.wake().status);
  EXPECT_EQ(peak(), 3 * kGranule) << "a wake takes memory, too";
  must(cumempool_free(first));
  must(pool.set_memory("plain", CUMEMPOOL_BACKING_CUDA_MALLOC));
  must(cumempool_reset_peaks(pool.get()));
  must(cumempool_free(pool.malloc("plain", 5 * kGranule)));
  EXPECT_EQ(peak(), 5 * kGranule);
}

TEST(Statistics, R13_ThePeakOfManyThreadsIsNeverBelowWhatIsHeld) {
  const Host host;
  const Pool pool{host};
  pool.declare("w");
  std::atomic<bool> done{false};
  std::thread resetting([&] {
    while (!done) must(cumempool_reset_peaks(pool.get()));
  });
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 200; ++round) must(cumempool_free(pool.malloc("w", kGranule)));
    });
  }
  for (int i = 0; i < 200; ++i) {
    const cumempool_totals totals = pool.snapshot().totals;
    EXPECT_GE(totals.peak_physical_bytes, totals.physical_bytes);
    EXPECT_LE(totals.peak_physical_bytes, 3 * kGranule);
  }
  for (std::thread& thread : threads) thread.join();
  done = true;
  resetting.join();
  must(cumempool_reset_peaks(pool.get()));
  EXPECT_EQ(pool.snapshot().totals.peak_physical_bytes, 0U);
}

}  // namespace
}  // namespace cumempool::tests
