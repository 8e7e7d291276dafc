// Transitions that are refused, fail, or are disturbed: what the caller sees, and that nothing is
// lost.
#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "fault_driver.hpp"
#include "host_fixture.hpp"

namespace cumempool::tests {
namespace {

using driver::FaultDriver;
using Repeat = FaultDriver::Repeat;

constexpr cumempool_result kOutOfMemory = CUMEMPOOL_RESULT_OUT_OF_MEMORY;

std::string last_message() { return cumempool_last_error()->message; }

class TransitionFailure : public ::testing::Test {
 protected:
  cumempool_address filled(const char* tag, std::size_t bytes, std::uint32_t seed, int device = 0) {
    const cumempool_address address = pool.malloc(tag, bytes, device);
    write_pattern(address, bytes, seed);
    return address;
  }
  std::uint64_t failed_transitions() const { return pool.snapshot().totals.failed_transitions; }
  std::uint64_t leaked() const { return pool.snapshot().totals.leaked_bytes; }

  Host host{16};
  FaultDriver faults{host.table()};
  Pool pool{faults.table()};
};

// ---- wake --------------------------------------------------------------------------------------

TEST_F(TransitionFailure, R4_WakeWithoutRoomKeepsEverythingAsleepAndALaterOneRestoresAll) {
  const auto first = filled("weights", 6 * kGranule, 1);
  const auto second = filled("weights", 6 * kGranule, 2);
  const auto elsewhere = filled("weights", 2 * kGranule, 3, 1);
  must(pool.sleep("weights", kOffload).status);
  const auto in_the_way = pool.malloc("other", 5 * kGranule);
  for (int attempt = 1; attempt <= 3; ++attempt) {
    ASSERT_EQ(pool.wake().status, CUMEMPOOL_OUT_OF_MEMORY);
    EXPECT_EQ(host.counters().charged_bytes, 5 * kGranule) << "what was taken was given back";
    for (const auto address : {first, second, elsewhere}) {
      EXPECT_EQ(pool.find(address).state, CUMEMPOOL_ASLEEP_BACKED_UP);
      EXPECT_EQ(pool.find(address).generation, 1U);
    }
    EXPECT_EQ(pool.snapshot().totals.host_used_bytes, 14 * kGranule);
    EXPECT_EQ(failed_transitions(), static_cast<std::uint64_t>(attempt));
    expect_exact_numbers(pool, host);
  }
  must(cumempool_free(in_the_way));
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(first, 6 * kGranule, 1));
  EXPECT_TRUE(holds_pattern(second, 6 * kGranule, 2));
  EXPECT_TRUE(holds_pattern(elsewhere, 2 * kGranule, 3));
}

TEST_F(TransitionFailure, R12_WakeWithoutRoomSaysWhatItNeedsAndWhatToDo) {
  filled("weights", 6 * kGranule, 1);
  filled("weights", 4 * kGranule, 2);
  must(pool.sleep("weights", kOffload).status);
  pool.malloc("other", 9 * kGranule);
  ASSERT_EQ(pool.wake().status, CUMEMPOOL_OUT_OF_MEMORY);
  const cumempool_error error = *cumempool_last_error();
  EXPECT_STREQ(error.operation, "wake");
  EXPECT_STREQ(error.tag, "weights");
  EXPECT_EQ(error.device, 0);
  EXPECT_EQ(error.bytes, 4 * kGranule);
  EXPECT_STREQ(error.driver_call, "host.create");
  EXPECT_STREQ(error.result_name, "CUDA_ERROR_OUT_OF_MEMORY");
  EXPECT_EQ(error.total_bytes, 16 * kGranule);
  EXPECT_EQ(error.secondary_count, 0U);
  EXPECT_NE(last_message().find("needs 640.00 KiB"), std::string::npos) << last_message();
  EXPECT_NE(last_message().find("still asleep with its backup"), std::string::npos);
}

TEST_F(TransitionFailure, R4_WakeThatFailsOnTheSecondDeviceUndoesTheFirst) {
  const auto here = filled("weights", kGranule, 1, 0);
  const auto there = filled("weights", kGranule, 2, 1);
  must(pool.sleep("weights", kOffload).status);
  faults.fail_nth("copy_to_device", 2, 719);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(cumempool_last_error()->device, 1);
  EXPECT_EQ(host.counters().charged_bytes, 0U);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(here, kGranule, 1));
  EXPECT_TRUE(holds_pattern(there, kGranule, 2));
}

TEST_F(TransitionFailure, R5_WakeThatCannotWaitForItsCopiesUnmapsNothing) {
  const auto address = filled("weights", kGranule, 1);
  must(pool.sleep("weights", kOffload).status);
  faults.fail_nth("stream_synchronize", 1, 719, Repeat::kFromThenOn);
  faults.fail_nth("fence", 1, 719);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(cumempool_last_error()->secondary_count, 1U);
  faults.fail_nothing();
  EXPECT_EQ(host.counters().mapped_bytes, kGranule) << "a copy may still write to it";
  EXPECT_EQ(leaked(), kGranule);
  EXPECT_EQ(pool.find(address).state, CUMEMPOOL_ASLEEP_BACKED_UP);
  expect_exact_numbers(pool, host);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(address, kGranule, 1));
  EXPECT_EQ(leaked(), 0U);
}

TEST_F(TransitionFailure, R4_MemoryThatAFailedWakeCouldNotUnmapIsWhereTheNextOneRestores) {
  const auto address = filled("weights", kGranule, 1);
  must(pool.sleep("weights", kOffload).status);
  faults.fail_nth("copy_to_device", 1, 719);
  faults.fail_nth("unmap", 1, 719);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(host.counters().charged_bytes, kGranule);
  EXPECT_EQ(leaked(), kGranule);
  EXPECT_TRUE(pool.sleep("weights", kOffload).rows.empty()) << "it was asleep before";
  EXPECT_EQ(leaked(), kGranule);
  faults.reset_counts();
  must(pool.wake().status);
  EXPECT_EQ(faults.calls("create"), 0U) << "nothing else can be mapped at its addresses";
  EXPECT_TRUE(holds_pattern(address, kGranule, 1));
  EXPECT_EQ(leaked(), 0U);
  expect_exact_numbers(pool, host);
}

TEST_F(TransitionFailure, R4_AHandleThatAFailedWakeCouldNotReleaseIsNeverUsedAgain) {
  const auto address = filled("weights", kGranule, 1);
  must(pool.sleep("weights", kOffload).status);
  faults.fail_nth("copy_to_device", 1, 719);
  faults.fail_nth("release", 1, 719);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(cumempool_last_error()->secondary_count, 1U);
  EXPECT_EQ(leaked(), kGranule);
  faults.reset_counts();
  must(pool.wake().status);
  EXPECT_EQ(faults.calls("create"), 1U) << "the driver has refused the other";
  EXPECT_TRUE(holds_pattern(address, kGranule, 1));
  EXPECT_EQ(leaked(), kGranule);
  EXPECT_EQ(host.counters().charged_bytes, 2 * kGranule);
  expect_exact_numbers(pool, host);
  must(cumempool_free(address));
  EXPECT_EQ(leaked(), 0U) << "all of an allocation goes with it";
  EXPECT_EQ(host.counters().charged_bytes, 0U);
}

// ---- sleep -------------------------------------------------------------------------------------

TEST_F(TransitionFailure, R4_SleepThatFailsHalfwayLeavesEverythingAwake) {
  const auto first = filled("weights", kGranule, 1);
  const auto second = filled("kv", 2 * kGranule, 2);
  for (const char* entry : {"fence", "host_register", "copy_to_host", "event_create",
                            "event_record", "event_synchronize", "unmap"}) {
    faults.fail_nth(entry, 1, 719);
    ASSERT_NE(pool.sleep({{{"weights", kOffload}, {"kv", kOffload}}}).status, CUMEMPOOL_OK)
        << entry;
    EXPECT_EQ(pool.find(first).state, CUMEMPOOL_AWAKE) << entry;
    EXPECT_EQ(pool.find(second).state, CUMEMPOOL_AWAKE) << entry;
    EXPECT_EQ(pool.snapshot().totals.host_used_bytes, 0U) << entry;
    EXPECT_TRUE(holds_pattern(first, kGranule, 1)) << entry;
    EXPECT_TRUE(holds_pattern(second, 2 * kGranule, 2)) << entry;
    expect_exact_numbers(pool, host);
  }
}

TEST_F(TransitionFailure, R4_ASleepThatFailsBehindItsCopiesBringsBackWhatHadGone) {
  const auto first = filled("weights", 8 * kGranule, 1);
  const auto second = filled("weights", 8 * kGranule, 2);  // the device is full
  faults.fail_nth("unmap", 2, 719);
  EXPECT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(cumempool_last_error()->secondary_count, 0U) << last_message();
  EXPECT_EQ(pool.find(first).state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(pool.find(first).generation, 2U) << "its physical pages are new";
  EXPECT_EQ(pool.find(second).generation, 1U);
  EXPECT_TRUE(holds_pattern(first, 8 * kGranule, 1));
  EXPECT_TRUE(holds_pattern(second, 8 * kGranule, 2));
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, 0U);
  expect_exact_numbers(pool, host);
}

TEST_F(TransitionFailure, R4_DiscardedMemoryIsAttachedAgainWithoutAskingForMemory) {
  const auto first = filled("kv", 8 * kGranule, 1);
  const auto second = filled("kv", 8 * kGranule, 2);  // the device is full
  faults.reset_counts();
  faults.fail_nth("unmap", 2, 719);
  EXPECT_EQ(pool.sleep("kv", kDiscard).status, CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(faults.calls("create") + faults.calls("release"), 0U);
  EXPECT_TRUE(holds_pattern(first, 8 * kGranule, 1));
  EXPECT_TRUE(holds_pattern(second, 8 * kGranule, 2));
  EXPECT_EQ(pool.find(first).generation, 1U);
}

TEST_F(TransitionFailure, R4_DiscardedMemoryIsWholeAgainHoweverFarTheCopiesOfAnotherDeviceHadCome) {
  const auto discarded = filled("kv", kGranule, 1);
  const auto here = filled("weights", kGranule, 2);
  std::vector<cumempool_address> there;
  for (std::uint32_t i = 0; i < 3; ++i) there.push_back(filled("weights", kGranule, 3 + i, 1));
  faults.fail_nth("unmap", 5, 719);  // the last of all
  EXPECT_EQ(pool.sleep({{{"kv", kDiscard}, {"weights", kOffload}}}).status, CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(pool.find(discarded).state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(pool.find(discarded).generation, 1U) << "its memory was never given back";
  EXPECT_TRUE(holds_pattern(discarded, kGranule, 1));
  EXPECT_TRUE(holds_pattern(here, kGranule, 2));
  for (std::uint32_t i = 0; i < 3; ++i) EXPECT_TRUE(holds_pattern(there[i], kGranule, 3 + i));
  expect_exact_numbers(pool, host);
}

TEST_F(TransitionFailure, R4_MemoryIsGivenBackBehindTheCopiesAndDiscardedMemoryLast) {
  filled("weights", kGranule, 1);
  filled("kv", kGranule, 2);
  filled("weights", kGranule, 3);
  std::string order;
  faults.observe([&](const char* entry) {
    const std::string name = entry;
    if (name == "copy_to_host") order += 'c';
    if (name == "unmap") order += 'u';
    if (name == "release") order += 'r';
  });
  must(pool.sleep({{{"weights", kOffload}, {"kv", kDiscard}}}).status);
  faults.observe(nullptr);
  EXPECT_EQ(order, "ccuururr");
}

TEST_F(TransitionFailure, R4_SleepThatCannotBeUndoneEitherLosesNothing) {
  const auto gone = filled("weights", kGranule, 1);
  const auto kept = filled("weights", kGranule, 4);
  pool.declare("zero", CUMEMPOOL_ON_WAKE_ZERO);
  const auto zeroed = filled("zero", kGranule, 2);
  const auto last = filled("zero", kGranule, 3);
  faults.fail_nth("unmap", 4, 719);  // of the second that was copied
  faults.fail_nth("map", 1, 719, Repeat::kFromThenOn);
  EXPECT_EQ(pool.sleep({{{"weights", kOffload}, {"zero", kDiscard}}}).status,
            CUMEMPOOL_DRIVER_ERROR);
  ASSERT_EQ(cumempool_last_error()->secondary_count, 3U) << last_message();
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_NE(std::string(cumempool_last_error()->secondary[i]).find("stays asleep"),
              std::string::npos);
  }
  faults.fail_nothing();
  EXPECT_EQ(pool.find(gone).state, CUMEMPOOL_ASLEEP_BACKED_UP);
  EXPECT_EQ(pool.find(kept).state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(pool.find(last).state, CUMEMPOOL_ASLEEP_DISCARDED);
  EXPECT_EQ(pool.snapshot().tag("weights").unreleased_bytes, 0U);
  EXPECT_EQ(pool.snapshot().tag("zero").unreleased_bytes, 2 * kGranule) << "with its contents";
  expect_exact_numbers(pool, host);
  faults.fail_nth("map", 2, 719);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(host.counters().charged_bytes, 3 * kGranule) << "what was held stays held";
  expect_exact_numbers(pool, host);
  const Outcome woken = pool.wake();
  EXPECT_EQ(woken.row("zero").mapped_bytes + woken.row("zero").restored_bytes, 0U)
      << "the same memory, with its contents";
  EXPECT_EQ(woken.row("zero").zeroed_bytes, 0U) << "a sleep that failed discards nothing";
  EXPECT_TRUE(holds_pattern(gone, kGranule, 1));
  EXPECT_TRUE(holds_pattern(kept, kGranule, 4));
  EXPECT_TRUE(holds_pattern(zeroed, kGranule, 2));
  EXPECT_TRUE(holds_pattern(last, kGranule, 3));
}

TEST_F(TransitionFailure, R5_ImagesThatCopiesMayUseStayUntilTheDeviceCouldBeWaitedFor) {
  const auto address = filled("weights", kGranule, 1);
  faults.fail_nth("event_synchronize", 1, 719);
  faults.fail_nth("stream_synchronize", 1, 719, Repeat::kFromThenOn);
  EXPECT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(pool.find(address).state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, kGranule) << "a copy may still write to it";
  EXPECT_EQ(pool.release_host_memory(), 0U);
  faults.fail_nothing();
  EXPECT_EQ(pool.release_host_memory(), kGranule) << "the device could be waited for";
  EXPECT_EQ(host.counters().registered_bytes, 0U);
  must(pool.sleep("weights", kOffload).status);
  // The same image twice.
  for (int attempt = 0; attempt < 2; ++attempt) {
    faults.fail_nth("stream_synchronize", 1, 719, Repeat::kFromThenOn);
    faults.fail_nth("fence", 1, 719, Repeat::kFromThenOn);
    EXPECT_EQ(pool.wake().status, CUMEMPOOL_DRIVER_ERROR);
    faults.fail_nothing();
  }
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(address, kGranule, 1));
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, kGranule) << "it is tried when asked for";
  EXPECT_EQ(pool.release_host_memory(), kGranule);
}

TEST_F(TransitionFailure, R12_ADiscardThatFailsIsCalledSo) {
  filled("kv", kGranule, 1);
  SleepCall discard{{{"kv", kDiscard}}};
  discard.drop_backups = true;
  faults.fail_nth("unmap", 1, 719);
  EXPECT_EQ(pool.sleep(discard).status, CUMEMPOOL_DRIVER_ERROR);
  EXPECT_STREQ(cumempool_last_error()->operation, "discard");
  EXPECT_EQ(last_message().find("discard of tag 'kv'"), 0U) << last_message();
}

TEST_F(TransitionFailure, R12_MemoryThatIsNotTakenBackIsAProblemNotAFailure) {
  const auto address = filled("weights", 2 * kGranule, 1);
  filled("weights", kGranule, 2);
  faults.fail_nth("release", 1, 719);
  const Outcome slept = pool.sleep("weights", kOffload);
  ASSERT_EQ(slept.status, CUMEMPOOL_OK);
  ASSERT_EQ(slept.problems.size(), 1U);
  EXPECT_NE(slept.problems.front().find("host.release"), std::string::npos) << slept.problems[0];
  EXPECT_EQ(slept.row("weights").freed_bytes, kGranule);
  EXPECT_EQ(slept.row("weights").backed_up_bytes, 3 * kGranule);
  EXPECT_EQ(pool.find(address).state, CUMEMPOOL_ASLEEP_BACKED_UP);
  EXPECT_EQ(leaked(), 2 * kGranule);
  EXPECT_EQ(host.counters().charged_bytes, 2 * kGranule);

  faults.reset_counts();
  EXPECT_TRUE(pool.sleep("weights", kOffload).rows.empty());
  EXPECT_EQ(faults.calls("release"), 0U) << "until it is closed";
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(address, 2 * kGranule, 1));
  EXPECT_EQ(host.counters().charged_bytes, 5 * kGranule);
  EXPECT_EQ(leaked(), 2 * kGranule);
  expect_exact_numbers(pool, host);
  must(pool.close(true));
  EXPECT_EQ(leaked(), 0U);
  EXPECT_EQ(host.counters().charged_bytes, 0U);
}

TEST_F(TransitionFailure, R4_ASleepThatFailsBehindARefusedReleaseMapsThatMemoryAgain) {
  const auto first = filled("weights", 8 * kGranule, 1);
  const auto second = filled("weights", 8 * kGranule, 2);  // the device is full
  faults.fail_nth("release", 1, 719);
  faults.fail_nth("unmap", 2, 719);
  EXPECT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(cumempool_last_error()->secondary_count, 0U) << last_message();
  EXPECT_EQ(pool.find(first).state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(pool.find(first).generation, 1U) << "its contents never left";
  EXPECT_EQ(leaked(), 0U) << "nothing is, before the sleep has succeeded";
  EXPECT_TRUE(holds_pattern(first, 8 * kGranule, 1));
  EXPECT_TRUE(holds_pattern(second, 8 * kGranule, 2));
  expect_exact_numbers(pool, host);
}

TEST_F(TransitionFailure, R4_ContentsThatAFailedDiscardCouldNotMapAgainGoWithTheNext) {
  const auto first = filled("kv", kGranule, 1);
  filled("kv", kGranule, 2);
  faults.fail_nth("unmap", 2, 719);
  faults.fail_nth("map", 1, 719);
  EXPECT_EQ(pool.sleep("kv", kDiscard).status, CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(pool.snapshot().tag("kv").unreleased_bytes, kGranule);
  must(pool.sleep("kv", kOffload).status);
  EXPECT_EQ(pool.snapshot().tag("kv").unreleased_bytes, kGranule) << "it keeps its contents";
  const Outcome slept = pool.sleep("kv", kDiscard);
  must(slept.status);
  EXPECT_EQ(slept.row("kv").freed_bytes, kGranule);
  EXPECT_EQ(slept.row("kv").discarded_bytes, kGranule);
  EXPECT_EQ(pool.snapshot().tag("kv").unreleased_bytes, 0U);
  EXPECT_EQ(host.counters().charged_bytes, 0U);
  EXPECT_EQ(pool.find(first).state, CUMEMPOOL_ASLEEP_DISCARDED);
}

TEST_F(TransitionFailure, TheHostBackupLimitRefusesASleepAndLosesNothing) {
  const Pool limited(host.table(), 2 * kGranule);
  const auto address = limited.malloc("weights", 3 * kGranule);
  const auto small = limited.malloc("small", 2 * kGranule);
  write_pattern(address, 3 * kGranule, 1);
  write_pattern(small, 2 * kGranule, 2);
  EXPECT_EQ(limited.sleep("weights", kOffload).status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  EXPECT_NE(last_message().find("host_backup_limit"), std::string::npos) << last_message();
  EXPECT_EQ(host.counters().registered_bytes, 0U) << "refused before anything was pinned";
  EXPECT_EQ(limited.find(address).state, CUMEMPOOL_AWAKE);
  EXPECT_TRUE(holds_pattern(address, 3 * kGranule, 1));
  must(limited.sleep("small", kOffload).status);
  EXPECT_EQ(limited.snapshot().totals.host_bytes, 2 * kGranule);
  must(limited.sleep("weights", kDiscard).status);
  must(limited.wake().status);
  EXPECT_TRUE(holds_pattern(small, 2 * kGranule, 2));
  must(limited.sleep({{{"weights", kOffload}}, {{address, kGranule}}}).status);
}

// ---- refusals ----------------------------------------------------------------------------------

TEST_F(TransitionFailure, R5_CaptureOnTheCallersStreamIsRefusedAndNothingChanges) {
  const auto address = filled("weights", kGranule, 1);
  UserStream stream(host);
  stream.set_capturing(true);
  const Outcome slept = pool.sleep({{{"weights", kOffload}}, {}, {stream.get()}});
  EXPECT_EQ(slept.status, CUMEMPOOL_CAPTURING);
  EXPECT_STREQ(cumempool_last_error()->operation, "sleep");
  EXPECT_EQ(pool.find(address).state, CUMEMPOOL_AWAKE);
  EXPECT_TRUE(holds_pattern(address, kGranule, 1));
  stream.set_capturing(false);
  must(pool.sleep({{{"weights", kOffload}}, {}, {stream.get()}}).status);

  stream.set_capturing(true);
  EXPECT_EQ(pool.wake(std::nullopt, {stream.get()}).status, CUMEMPOOL_CAPTURING);
  EXPECT_EQ(pool.find(address).state, CUMEMPOOL_ASLEEP_BACKED_UP);
  stream.set_capturing(false);
  must(pool.wake(std::nullopt, {stream.get()}).status);
  EXPECT_TRUE(holds_pattern(address, kGranule, 1));
  EXPECT_EQ(failed_transitions(), 2U);
}

TEST_F(TransitionFailure, R5_CaptureOnAStreamThatIsNotTheCallersDisturbsNothing) {
  const auto address = filled("weights", kGranule, 1);
  UserStream mine(host);
  UserStream other(host);
  other.set_capturing(true);
  must(pool.sleep({{{"weights", kOffload}}, {}, {mine.get()}}).status);
  must(pool.wake(std::nullopt, {mine.get()}).status);
  EXPECT_TRUE(holds_pattern(address, kGranule, 1));
  other.set_capturing(false);
}

TEST_F(TransitionFailure, StreamsOfDevicesWithoutAllocationsAreNotLookedAt) {
  filled("weights", kGranule, 1);
  constexpr std::uint32_t kSize = sizeof(cumempool_device_stream);
  EXPECT_EQ(
      pool.sleep({{{"weights", kOffload}}, {}, {{kSize, 1, 99}, {kSize, -1, 0}, {kSize, 77, 0}}})
          .status,
      CUMEMPOOL_OK);
}

TEST_F(TransitionFailure, R3_CallsFromInsideATransitionAreBusy) {
  filled("weights", kGranule, 1);
  std::vector<cumempool_status> inside;
  faults.observe([&](const char* entry) {
    if (std::string(entry) != "copy_to_host") return;
    inside.push_back(pool.sleep("weights", kOffload).status);
    inside.push_back(pool.wake().status);
    inside.push_back(pool.close(true));
    std::uint64_t released = 0;
    inside.push_back(cumempool_release_host_memory(pool.get(), &released));
  });
  EXPECT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_OK);
  faults.observe(nullptr);
  EXPECT_EQ(inside, std::vector<cumempool_status>(4, CUMEMPOOL_BUSY));
  EXPECT_NE(last_message().find("from inside a sleep"), std::string::npos) << last_message();
  EXPECT_EQ(failed_transitions(), 0U) << "a refused call is no transition";
  must(pool.wake().status);
}

TEST_F(TransitionFailure, R3_ATransitionOfAnotherThreadIsWaitedFor) {
  const auto address = filled("weights", kGranule, 1);
  using namespace std::chrono_literals;
  std::thread other;
  cumempool_status woken = CUMEMPOOL_INTERNAL;
  std::atomic<bool> ended{false};
  faults.observe([&](const char* entry) {
    if (std::string(entry) != "copy_to_host" || other.joinable()) return;
    other = std::thread([&] {
      woken = pool.wake().status;
      ended = true;
    });
    // Time enough to end for a wake that does not wait.
    for (int i = 0; i < 50 && !ended; ++i) std::this_thread::sleep_for(2ms);
    EXPECT_FALSE(ended);
  });
  EXPECT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_OK);
  other.join();
  faults.observe(nullptr);
  EXPECT_EQ(woken, CUMEMPOOL_OK);
  EXPECT_EQ(pool.find(address).state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(pool.find(address).generation, 2U) << "the wake came after the sleep";
  EXPECT_TRUE(holds_pattern(address, kGranule, 1));
}

// ---- frees and allocations during a transition -------------------------------------------------

TEST_F(TransitionFailure, R6_FreeDuringASleepIsPutOffAndThenCarriedOut) {
  const auto first = filled("weights", kGranule, 1);
  const auto second = filled("weights", 2 * kGranule, 2);
  std::uint64_t pending = 0;
  bool done = false;
  faults.observe([&](const char* entry) {
    if (std::string(entry) != "copy_to_host" || done) return;
    done = true;
    EXPECT_EQ(cumempool_free(second), CUMEMPOOL_OK);
    EXPECT_EQ(cumempool_free(second), CUMEMPOOL_NOT_OWNED);
    pending = pool.snapshot().totals.pending_free_bytes;
    EXPECT_EQ(pool.snapshot().tag("weights").awake_bytes, kGranule) << "it is gone for the program";
  });
  ASSERT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_OK);
  faults.observe(nullptr);
  EXPECT_EQ(pending, 2 * kGranule);
  EXPECT_EQ(host.counters().reserved_bytes, kGranule);
  EXPECT_EQ(pool.snapshot().totals.pending_free_bytes, 0U);
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, kGranule);
  expect_exact_numbers(pool, host);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(first, kGranule, 1));
}

TEST_F(TransitionFailure, R6_FreeDuringAWakeOrAFailingTransitionIsCarriedOut) {
  for (const bool fail : {false, true}) {
    const auto kept = filled("weights", kGranule, 1);
    const auto freed = filled("weights", kGranule, 2);
    must(pool.sleep("weights", kOffload).status);
    bool done = false;
    faults.observe([&](const char* entry) {
      if (std::string(entry) != "copy_to_device" || done) return;
      done = true;
      must(cumempool_free(freed));
    });
    if (fail) faults.fail_nth("copy_to_device", 2, 719);
    EXPECT_EQ(pool.wake().status, fail ? CUMEMPOOL_DRIVER_ERROR : CUMEMPOOL_OK);
    faults.observe(nullptr);
    EXPECT_TRUE(done);
    EXPECT_EQ(host.counters().reserved_bytes, kGranule);
    expect_exact_numbers(pool, host);
    must(pool.wake().status);
    EXPECT_TRUE(holds_pattern(kept, kGranule, 1));
    must(cumempool_free(kept));
  }
}

TEST_F(TransitionFailure, R5_FreeDuringAWakeWaitsForWorkInFlightWhenItIsCarriedOut) {
  const auto kept = filled("weights", kGranule, 1);
  const auto freed = filled("weights", kGranule, 2);
  UserStream stream(host);
  must(pool.sleep("weights", kOffload).status);
  int copies = 0;
  faults.observe([&](const char* entry) {
    if (std::string(entry) != "copy_to_device" || ++copies != 2) return;  // both are mapped now
    stream.fill(freed, kGranule, 7);
    must(cumempool_free(freed));
  });
  must(pool.wake().status);
  faults.observe(nullptr);
  EXPECT_EQ(host.counters().queued_commands, 0U);
  // Work into memory that had gone would have broken the device.
  must(pool.sleep("weights", kOffload).status);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(kept, kGranule, 1));
}

TEST_F(TransitionFailure, R6_FreeThatTheDriverRefusesIsLeakedAndTriedAgainAtClose) {
  for (const char* entry : {"fence", "unmap", "release", "unreserve"}) {
    const Pool closing(faults.table());
    const auto address = closing.malloc("weights", kGranule);
    faults.fail_nth(entry, 1, 719);
    EXPECT_EQ(cumempool_free(address), CUMEMPOOL_OK) << entry;
    EXPECT_EQ(cumempool_free(address), CUMEMPOOL_NOT_OWNED) << entry;
    EXPECT_EQ(closing.snapshot().totals.leaked_bytes, kGranule) << entry;
    EXPECT_EQ(closing.snapshot().totals.pending_free_bytes, 0U) << entry;
    expect_exact_numbers(closing, host);
    faults.reset_counts();
    must(closing.wake().status);
    EXPECT_EQ(faults.calls("unmap") + faults.calls("release") + faults.calls("unreserve"), 0U);
    must(cumempool_free(closing.malloc("weights", kGranule)));
    EXPECT_EQ(closing.snapshot().totals.leaked_bytes, kGranule) << "until it is closed";
    EXPECT_EQ(closing.close(), CUMEMPOOL_OK) << entry;
    EXPECT_EQ(closing.snapshot().totals.leaked_bytes, 0U) << entry;
    EXPECT_EQ(host.counters().reserved_bytes, 0U) << entry;
  }
}

TEST_F(TransitionFailure, R1_AllocatingDuringATransitionWorks) {
  filled("weights", kGranule, 1);
  cumempool_address made = 0;
  faults.observe([&](const char* entry) {
    if (std::string(entry) == "copy_to_host" && made == 0) made = pool.malloc("weights", kGranule);
  });
  ASSERT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_OK);
  faults.observe(nullptr);
  EXPECT_EQ(pool.find(made).state, CUMEMPOOL_AWAKE) << "it came after the sleep had begun";
  expect_exact_numbers(pool, host);
}

TEST_F(TransitionFailure, R1_AFailedMallocThatCannotBeUndoneIsLeaked) {
  cumempool_address address = 7;
  must(cumempool_free(pool.malloc("weights", 1)));
  faults.fail_nth("set_access", 1, kOutOfMemory);
  faults.fail_nth("unmap", 1, 719, Repeat::kFromThenOn);
  EXPECT_EQ(pool.try_malloc("weights", kGranule, 0, address), CUMEMPOOL_OUT_OF_MEMORY);
  EXPECT_EQ(address, 7U);
  EXPECT_EQ(leaked(), kGranule);
  expect_exact_numbers(pool, host);
  faults.fail_nothing();
  EXPECT_EQ(pool.try_malloc("weights", 16 * kGranule, 0, address), CUMEMPOOL_OUT_OF_MEMORY);
  must(cumempool_free(pool.malloc("weights", 15 * kGranule)));
  EXPECT_EQ(pool.close(), CUMEMPOOL_OK);
  EXPECT_EQ(leaked(), 0U);
  EXPECT_EQ(host.counters().charged_bytes, 0U);
}

// ---- close -------------------------------------------------------------------------------------

TEST_F(TransitionFailure, CloseIsRefusedWhileAllocationsLiveAndSaysWhich) {
  const auto address = filled("weights", 2 * kGranule, 1);
  filled("kv", kGranule, 2);
  EXPECT_EQ(pool.close(), CUMEMPOOL_IN_USE);
  EXPECT_NE(last_message().find("64.00 KiB under 'kv', 128.00 KiB under 'weights'"),
            std::string::npos)
      << last_message();
  EXPECT_TRUE(holds_pattern(address, 2 * kGranule, 1));
  must(pool.sleep("weights", kOffload).status);
  EXPECT_EQ(pool.close(), CUMEMPOOL_IN_USE) << "asleep is alive";
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(address, 2 * kGranule, 1));
}

TEST_F(TransitionFailure, CloseByForceGivesMemoryBackAndLeavesAddressesUntilTheyAreFreed) {
  const auto awake = filled("weights", kGranule, 1);
  const auto asleep = filled("kv", kGranule, 1, 1);
  must(pool.sleep("kv", kOffload).status);
  ASSERT_EQ(pool.close(true), CUMEMPOOL_OK);
  const auto counters = host.counters();
  EXPECT_EQ(counters.charged_bytes + counters.registered_bytes + counters.mapped_bytes, 0U);
  EXPECT_EQ(counters.streams + counters.events + counters.retained_contexts, 0U);
  EXPECT_EQ(counters.reserved_bytes, 2 * kGranule);
  EXPECT_EQ(pool.find(awake).state, CUMEMPOOL_ASLEEP_DISCARDED);
  expect_exact_numbers(pool, host);
  EXPECT_EQ(cumempool_free(awake), CUMEMPOOL_OK);
  EXPECT_EQ(cumempool_free(asleep), CUMEMPOOL_OK);
  host.expect_empty();
}

TEST_F(TransitionFailure, R5_CloseByForceWaitsForWorkInFlight) {
  const auto address = filled("weights", kGranule, 1);
  UserStream stream(host);
  stream.fill(address, kGranule, 1);
  ASSERT_EQ(pool.close(true), CUMEMPOOL_OK);
  EXPECT_EQ(host.counters().queued_commands, 0U);
}

TEST_F(TransitionFailure, EverythingIsRefusedAfterClose) {
  pool.declare("kv");
  filled("weights", kGranule, 1);
  must(pool.close(true));
  EXPECT_EQ(pool.close(), CUMEMPOOL_OK) << "closing twice is no error";
  EXPECT_EQ(pool.close(true), CUMEMPOOL_OK);
  EXPECT_EQ(pool.sleep("kv", kOffload).status, CUMEMPOOL_CLOSED);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_CLOSED);
  cumempool_address address = 0;
  EXPECT_EQ(pool.try_malloc("kv", 1, 0, address), CUMEMPOOL_CLOSED);
  EXPECT_EQ(
      cumempool_declare_tag(pool.get(), "new", CUMEMPOOL_ON_SLEEP_UNSET, CUMEMPOOL_ON_WAKE_UNSET),
      CUMEMPOOL_CLOSED);
  std::uint64_t released = 0;
  EXPECT_EQ(cumempool_release_host_memory(pool.get(), &released), CUMEMPOOL_CLOSED);
  EXPECT_STRNE(cumempool_last_error()->advice, "");
  EXPECT_EQ(pool.snapshot().allocations.size(), 1U) << "what is left can be looked at";
}

TEST_F(TransitionFailure, CloseThatFailsSaysSoAndGoesOnWhenRepeated) {
  filled("weights", kGranule, 1);
  faults.fail_nth("unmap", 1, 719);
  EXPECT_EQ(pool.close(true), CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(cumempool_last_error()->secondary_count, 1U);
  EXPECT_EQ(cumempool_last_error()->bytes, kGranule);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_CLOSED);
  EXPECT_EQ(host.counters().charged_bytes, kGranule);
  EXPECT_EQ(pool.close(), CUMEMPOOL_OK);
  EXPECT_EQ(host.counters().charged_bytes, 0U);
}

TEST_F(TransitionFailure, DestroyGivesBackWhatAFailedCloseHasLeft) {
  must(cumempool_free(filled("weights", kGranule, 1)));
  faults.fail_nth("context_enter", 1, 719, Repeat::kFromThenOn);
  const auto address = filled("weights", kGranule, 1);
  EXPECT_EQ(pool.close(true), CUMEMPOOL_DRIVER_ERROR);
  faults.fail_nothing();
  pool.destroy();
  EXPECT_EQ(host.counters().charged_bytes, 0U);
  EXPECT_EQ(cumempool_free(address), CUMEMPOOL_OK);
  host.expect_empty();
}

}  // namespace
}  // namespace cumempool::tests
