// Some tags leave while others arrive: contents, room, refusals, and failures that are undone on
// both sides.
#include <algorithm>
#include <string>
#include <vector>

#include "fault_driver.hpp"
#include "host_fixture.hpp"

namespace cumempool::tests {
namespace {

using driver::FaultDriver;
using Repeat = FaultDriver::Repeat;

std::string last_message() { return cumempool_last_error()->message; }

class Swap : public ::testing::Test {
 protected:
  static constexpr std::size_t kRoom = 16;  // granules of each device

  cumempool_address filled(const char* tag, std::size_t granules, std::uint32_t seed,
                           int device = 0) {
    const cumempool_address address = pool.malloc(tag, granules * kGranule, device);
    write_pattern(address, granules * kGranule, seed);
    return address;
  }
  // Two sets of four allocations each, "b" asleep; `granules` each.
  void two_sets(std::size_t granules, int device = 0) {
    each = granules;
    for (std::uint32_t i = 0; i < 4; ++i) b.push_back(filled("b", granules, 10 + i, device));
    must(pool.sleep("b", kOffload).status);
    for (std::uint32_t i = 0; i < 4; ++i) a.push_back(filled("a", granules, i, device));
  }
  void expect_state(const char* tag, cumempool_state state) const {
    for (const auto& info : pool.snapshot().allocations) {
      if (std::string(info.tag) != tag) continue;
      EXPECT_EQ(info.state, state) << tag;
    }
  }
  bool hold(const std::vector<cumempool_address>& addresses, std::uint32_t seed) const {
    for (const cumempool_address address : addresses) {
      if (!holds_pattern(address, each * kGranule, seed++)) return false;
    }
    return true;
  }
  void expect_as_at_first() const {
    expect_state("a", CUMEMPOOL_AWAKE);
    expect_state("b", CUMEMPOOL_ASLEEP_BACKED_UP);
    EXPECT_TRUE(hold(a, 0));
    expect_exact_numbers(pool, host);
  }
  void expect_swapped() const {
    expect_state("a", CUMEMPOOL_ASLEEP_BACKED_UP);
    expect_state("b", CUMEMPOOL_AWAKE);
    EXPECT_TRUE(hold(b, 10));
    expect_exact_numbers(pool, host);
  }
  void there_and_back(std::uint64_t most) {
    std::uint64_t peak = 0;
    faults.observe([&](const char*) { peak = std::max(peak, host.counters().charged_bytes); });
    const Outcome out = pool.swap({{{"a", kOffload}}}, {{"b"}});
    faults.observe(nullptr);
    ASSERT_EQ(out.status, CUMEMPOOL_OK) << last_message();
    EXPECT_LE(peak, most);
    expect_swapped();
    EXPECT_EQ(out.row("a").freed_bytes, 4 * each * kGranule);
    EXPECT_EQ(out.row("a").backed_up_bytes, 4 * each * kGranule);
    EXPECT_EQ(out.row("b").mapped_bytes, 4 * each * kGranule);
    EXPECT_EQ(out.row("b").restored_bytes, 4 * each * kGranule);
    EXPECT_TRUE(out.problems.empty());
    must(pool.swap({{{"b", kOffload}}}, {{"a"}}).status);
    expect_as_at_first();
    EXPECT_EQ(pool.snapshot().totals.swaps, 2U);
    EXPECT_EQ(pool.snapshot().totals.failed_transitions, 0U);
    must(pool.wake().status);
    EXPECT_TRUE(hold(b, 10));
  }

  Host host{kRoom};
  FaultDriver faults{host.table()};
  Pool pool{faults.table()};
  std::vector<cumempool_address> a;
  std::vector<cumempool_address> b;
  std::size_t each = 0;
};

TEST_F(Swap, R2_BothSetsAreThereAgainWhereThereIsRoomForBoth) {
  two_sets(2);
  there_and_back(kRoom * kGranule);
}

TEST_F(Swap, R4_NeedsRoomForOneSetOnly) {
  two_sets(4);  // the device is full
  std::uint64_t peak = 0;
  faults.observe([&](const char*) { peak = std::max(peak, host.counters().charged_bytes); });
  ASSERT_EQ(pool.swap({{{"a", kOffload}}}, {{"b"}}).status, CUMEMPOOL_OK) << last_message();
  faults.observe(nullptr);
  EXPECT_LE(peak, kRoom * kGranule);
  expect_swapped();
  ASSERT_EQ(pool.swap({{{"b", kOffload}}}).status, CUMEMPOOL_OK) << last_message();
  expect_as_at_first();
}

TEST_F(Swap, SetsMayDifferInSize) {
  const auto large = filled("large", 10, 1);
  must(pool.sleep("large", kOffload).status);
  std::vector<cumempool_address> small;
  for (std::uint32_t i = 0; i < 12; ++i) small.push_back(filled("small", 1, 20 + i));
  must(pool.swap({{{"small", kOffload}}}, {{"large"}}).status);
  EXPECT_TRUE(holds_pattern(large, 10 * kGranule, 1));
  must(pool.swap({{{"large", kOffload}}}, {{"small"}}).status);
  each = 1;
  EXPECT_TRUE(hold(small, 20));
  expect_exact_numbers(pool, host);
}

TEST_F(Swap, SeveralDevicesInOne) {
  const auto a0 = filled("a", 12, 1, 0);
  const auto a1 = filled("a", 12, 2, 1);
  must(pool.sleep("a", kOffload).status);
  const auto b0 = filled("b", 12, 3, 0);
  const auto b1 = filled("b", 12, 4, 1);
  must(pool.swap({{{"b", kOffload}}}).status);
  EXPECT_TRUE(holds_pattern(a0, 12 * kGranule, 1));
  EXPECT_TRUE(holds_pattern(a1, 12 * kGranule, 2));
  must(pool.swap({{{"a", kOffload}}}).status);
  EXPECT_TRUE(holds_pattern(b0, 12 * kGranule, 3));
  EXPECT_TRUE(holds_pattern(b1, 12 * kGranule, 4));
  expect_exact_numbers(pool, host);
}

TEST_F(Swap, WithoutAListAllThatTheSleepDoesNotNameWakes) {
  two_sets(1);
  const auto other = filled("other", 1, 5);
  must(pool.sleep("other", kOffload).status);
  must(pool.swap({{{"a", kOffload}}}).status);
  expect_swapped();
  EXPECT_TRUE(holds_pattern(other, kGranule, 5));
  const Outcome again = pool.swap({{{"a", kOffload}}});
  EXPECT_EQ(again.status, CUMEMPOOL_OK);
  EXPECT_TRUE(again.rows.empty()) << "nothing was left to do";
}

TEST_F(Swap, DiscardedTagsMakeRoomAndKeepTheirPolicy) {
  pool.declare("kv", CUMEMPOOL_ON_WAKE_ZERO);
  two_sets(2);
  const auto kv = filled("kv", 8, 9);
  must(pool.swap({{{"kv", kDiscard}}}, {{"b"}}).status);
  expect_state("kv", CUMEMPOOL_ASLEEP_DISCARDED);
  EXPECT_TRUE(hold(b, 10));
  EXPECT_TRUE(hold(a, 0));
  must(pool.swap({{{"b", kOffload}}}, {{"kv"}}).status);
  EXPECT_TRUE(all_are(kv, 8 * kGranule, 0));
  expect_exact_numbers(pool, host);
}

TEST_F(Swap, R4_DiscardedMemoryIsReleasedLast) {
  two_sets(2);
  filled("kv", 4, 9);
  std::vector<std::string> calls;
  faults.observe([&](const char* entry) {
    const std::string name = entry;
    if (name == "release" || name == "create") calls.push_back(name);
  });
  must(pool.swap({{{"a", kOffload}, {"kv", kDiscard}}}, {{"b"}}).status);
  faults.observe(nullptr);
  ASSERT_EQ(calls.size(), 9U);
  EXPECT_EQ(calls.back(), "release");
  EXPECT_EQ(std::count(calls.begin(), calls.begin() + 8, "release"), 4);
}

TEST_F(Swap, R9_DeadRangesAreNotCopied) {
  two_sets(2);
  const Outcome out = pool.swap({{{"a", kOffload}}, {{a[0], kGranule}}}, {{"b"}});
  EXPECT_EQ(out.row("a").backed_up_bytes, 7 * kGranule);
  EXPECT_EQ(out.row("a").discarded_bytes, kGranule);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(a[0], kGranule, kGranule, 0));
}

TEST_F(Swap, RetainedBackupsMakeItCopyOnlyOneWay) {
  const Pool retaining(faults.table(), pool_options(0, true));
  const auto first = retaining.malloc("a", 8 * kGranule);
  write_pattern(first, 8 * kGranule, 1);
  must(retaining.sleep("a", kOffload).status);
  const auto second = retaining.malloc("b", 8 * kGranule);
  write_pattern(second, 8 * kGranule, 2);
  must(retaining.swap({{{"b", kOffload}}}, {{"a"}}).status);
  const Outcome out = retaining.swap({{{"a", kOffload}}}, {{"b"}});
  EXPECT_EQ(out.row("a").clean_bytes, 8 * kGranule);
  EXPECT_TRUE(holds_pattern(second, 8 * kGranule, 2));
  EXPECT_EQ(retaining.swap({{{"b", kOffload}}}, {{"a"}}).row("b").clean_bytes, 8 * kGranule);
  EXPECT_TRUE(holds_pattern(first, 8 * kGranule, 1));
}

// ---- refusals ----------------------------------------------------------------------------------

TEST_F(Swap, R4_WithoutRoomItIsRefusedBeforeAnythingMoves) {
  two_sets(2);
  const auto big = filled("big", 8, 9);
  must(pool.sleep("big", kOffload).status);
  filled("other", 7, 8);
  faults.reset_counts();
  EXPECT_EQ(pool.swap({{{"a", kOffload}}}).status, CUMEMPOOL_OUT_OF_MEMORY);
  EXPECT_STREQ(cumempool_last_error()->operation, "swap");
  EXPECT_EQ(cumempool_last_error()->bytes, 16 * kGranule);
  EXPECT_EQ(cumempool_last_error()->device, 0);
  EXPECT_NE(last_message().find("needs 1.00 MiB"), std::string::npos) << last_message();
  EXPECT_NE(last_message().find("room for 576.00 KiB"), std::string::npos) << last_message();
  EXPECT_EQ(faults.calls("copy_to_host") + faults.calls("unmap") + faults.calls("create"), 0U);
  expect_as_at_first();
  must(pool.swap({{{"a", kOffload}, {"other", kDiscard}}}).status);
  EXPECT_TRUE(hold(b, 10));
  EXPECT_TRUE(holds_pattern(big, 8 * kGranule, 9));
}

TEST_F(Swap, RequestsThatContradictThemselvesAreInvalid) {
  two_sets(1);
  EXPECT_EQ(pool.swap({{{"a", kOffload}}}, {{"a"}}).status, CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(pool.swap({{{"a", kOffload}}}, {{"nobody"}}).status, CUMEMPOOL_UNKNOWN_TAG);
  EXPECT_EQ(pool.swap({{{"nobody", kOffload}}}, {{"b"}}).status, CUMEMPOOL_UNKNOWN_TAG);
  cumempool_report* report = nullptr;
  cumempool_swap_request request{};
  EXPECT_EQ(cumempool_swap(pool.get(), &request, &report), CUMEMPOOL_INVALID_ARGUMENT);
  request.size = sizeof request;
  EXPECT_EQ(cumempool_swap(pool.get(), &request, &report), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_swap(pool.get(), nullptr, &report), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(report, nullptr);
  expect_as_at_first();
}

TEST_F(Swap, R5_CaptureOnTheCallersStreamIsRefused) {
  two_sets(1);
  UserStream stream(host);
  stream.set_capturing(true);
  EXPECT_EQ(pool.swap({{{"a", kOffload}}, {}, {stream.get()}}).status, CUMEMPOOL_CAPTURING);
  expect_as_at_first();
  stream.set_capturing(false);
}

TEST_F(Swap, R5_WorkInFlightIsFinishedFirst) {
  two_sets(4);
  UserStream stream(host);
  stream.fill(a[0], 4 * kGranule, 7);
  must(pool.swap({{{"a", kOffload}}}).status);
  must(pool.swap({{{"b", kOffload}}}).status);
  EXPECT_TRUE(all_are(a[0], 4 * kGranule, 7));
}

TEST_F(Swap, R3_FromInsideATransitionItIsBusy) {
  two_sets(1);
  cumempool_status inside = CUMEMPOOL_OK;
  faults.observe([&](const char* entry) {
    if (std::string(entry) == "copy_to_host") inside = pool.swap({{{"a", kOffload}}}).status;
  });
  must(pool.swap({{{"a", kOffload}}}).status);
  faults.observe(nullptr);
  EXPECT_EQ(inside, CUMEMPOOL_BUSY);
  expect_swapped();
}

// ---- failures ----------------------------------------------------------------------------------

TEST_F(Swap, R4_AFailureIsUndoneOnBothSides) {
  for (const char* entry : {"fence", "host_register", "copy_to_host", "create", "map", "set_access",
                            "copy_to_device", "event_record", "unmap"}) {
    for (const std::uint64_t nth : {1U, 3U}) {
      if (std::string(entry) == "fence" && nth == 3) continue;
      if (std::string(entry) == "host_register" && nth == 3) continue;
      const Pool fresh(faults.table());
      std::vector<cumempool_address> out;
      std::vector<cumempool_address> in;
      for (std::uint32_t i = 0; i < 4; ++i) in.push_back(fresh.malloc("b", 4 * kGranule));
      for (std::uint32_t i = 0; i < 4; ++i) write_pattern(in[i], 4 * kGranule, 10 + i);
      must(fresh.sleep("b", kOffload).status);
      for (std::uint32_t i = 0; i < 4; ++i) out.push_back(fresh.malloc("a", 4 * kGranule));
      for (std::uint32_t i = 0; i < 4; ++i) write_pattern(out[i], 4 * kGranule, i);
      faults.fail_nth(entry, nth, 719);
      const cumempool_status status = fresh.swap({{{"a", kOffload}}}, {{"b"}}).status;
      EXPECT_NE(status, CUMEMPOOL_OK) << entry << nth;
      EXPECT_STREQ(cumempool_last_error()->operation, "swap") << entry << nth;
      EXPECT_EQ(cumempool_last_error()->secondary_count, 0U) << last_message();
      faults.fail_nothing();
      for (std::uint32_t i = 0; i < 4; ++i) {
        EXPECT_EQ(fresh.find(out[i]).state, CUMEMPOOL_AWAKE) << entry << nth;
        EXPECT_EQ(fresh.find(in[i]).state, CUMEMPOOL_ASLEEP_BACKED_UP) << entry << nth;
        EXPECT_TRUE(holds_pattern(out[i], 4 * kGranule, i)) << entry << nth;
      }
      expect_exact_numbers(fresh, host);
      must(fresh.swap({{{"a", kOffload}}}, {{"b"}}).status);
      for (std::uint32_t i = 0; i < 4; ++i) EXPECT_TRUE(holds_pattern(in[i], 4 * kGranule, 10 + i));
      for (const auto address : in) must(cumempool_free(address));
      must(fresh.wake().status);
      for (std::uint32_t i = 0; i < 4; ++i) EXPECT_TRUE(holds_pattern(out[i], 4 * kGranule, i));
    }
  }
}

TEST_F(Swap, R4_WhatWasDiscardedAndReusedStaysAsleepAndTheErrorSaysSo) {
  each = 4;
  for (std::uint32_t i = 0; i < 4; ++i) b.push_back(filled("b", 4, 10 + i));
  must(pool.sleep("b", kOffload).status);
  const auto kv = filled("kv", 16, 1);
  faults.fail_nth("copy_to_device", 3, 719);
  EXPECT_EQ(pool.swap({{{"kv", kDiscard}}}, {{"b"}}).status, CUMEMPOOL_DRIVER_ERROR);
  ASSERT_EQ(cumempool_last_error()->secondary_count, 1U);
  EXPECT_NE(std::string(cumempool_last_error()->secondary[0]).find("discarded already"),
            std::string::npos);
  EXPECT_EQ(pool.find(kv).state, CUMEMPOOL_ASLEEP_DISCARDED);
  expect_state("b", CUMEMPOOL_ASLEEP_BACKED_UP);
  expect_exact_numbers(pool, host);
  must(pool.wake({{"b"}}).status);
  EXPECT_TRUE(hold(b, 10));
}

TEST_F(Swap, R4_WhereUndoingIsRefusedMemorySleepsWithItsBackup) {
  two_sets(4);
  faults.fail_nth("copy_to_device", 3, 719);
  faults.fail_nth("create", 4, CUMEMPOOL_RESULT_OUT_OF_MEMORY, Repeat::kFromThenOn);
  EXPECT_EQ(pool.swap({{{"a", kOffload}}}, {{"b"}}).status, CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(cumempool_last_error()->secondary_count, 3U) << last_message();
  faults.fail_nothing();
  expect_state("b", CUMEMPOOL_ASLEEP_BACKED_UP);
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(pool.find(a[i]).state, i < 3 ? CUMEMPOOL_ASLEEP_BACKED_UP : CUMEMPOOL_AWAKE);
  }
  expect_exact_numbers(pool, host);
  must(pool.wake({{"a"}}).status);
  EXPECT_TRUE(hold(a, 0));
  must(pool.swap({{{"a", kOffload}}}, {{"b"}}).status);
  expect_swapped();
}

TEST_F(Swap, R12_MemoryThatIsNotTakenBackIsAProblemWhereThereIsRoom) {
  two_sets(2);
  faults.fail_nth("release", 1, 719);
  const Outcome out = pool.swap({{{"a", kOffload}}}, {{"b"}});
  ASSERT_EQ(out.status, CUMEMPOOL_OK);
  EXPECT_EQ(out.problems.size(), 1U);
  EXPECT_EQ(pool.snapshot().totals.leaked_bytes, 2 * kGranule);
  expect_exact_numbers(pool, host);
  expect_swapped();
}

TEST_F(Swap, R6_FreedMeanwhileOnEitherSide) {
  two_sets(2);
  bool done = false;
  faults.observe([&](const char* entry) {
    if (std::string(entry) != "copy_to_device" || done) return;
    done = true;
    must(cumempool_free(a[3]));
    must(cumempool_free(b[3]));
  });
  must(pool.swap({{{"a", kOffload}}}, {{"b"}}).status);
  faults.observe(nullptr);
  EXPECT_EQ(host.counters().reserved_bytes, 12 * kGranule);
  a.pop_back();
  b.pop_back();
  expect_swapped();
  must(pool.wake().status);
  EXPECT_TRUE(hold(a, 0));
}

}  // namespace
}  // namespace cumempool::tests
