// A wake in a thread of its own: streams that wait for single allocations, the order, and ends of
// every kind.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "fault_driver.hpp"
#include "host_fixture.hpp"
#include "temporary_directory.hpp"

namespace cumempool::tests {
namespace {

using driver::FaultDriver;

std::string last_message() { return cumempool_last_error()->message; }

// Holds whoever calls wait() until it is opened.
class Gate {
 public:
  void wait() {
    std::unique_lock lock(mutex_);
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
  }
  void wait_until_somebody_waits() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return waiting_ != 0; });
  }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int waiting_ = 0;
  bool open_ = false;
};

class WakingTest : public ::testing::Test {
 protected:
  static constexpr std::uint32_t kCount = 4;

  void SetUp() override {
    for (std::uint32_t i = 0; i < kCount; ++i) {
      all.push_back(pool.malloc("weights", kGranule));
      write_pattern(all.back(), kGranule, i);
    }
    must(pool.sleep("weights", kOffload).status);
  }
  void TearDown() override { faults.observe(nullptr); }

  // Stops the wake before its n-th copy.
  void stop_before(int copy, Gate& gate) {
    copies = 0;
    faults.observe([this, copy, &gate](const char* entry) {
      if (std::string(entry) == "copy_to_device" && ++copies == copy) gate.wait();
    });
  }
  void expect_whole() const {
    for (std::uint32_t i = 0; i < kCount; ++i) {
      EXPECT_EQ(pool.find(all[i]).state, CUMEMPOOL_AWAKE);
      EXPECT_TRUE(holds_pattern(all[i], kGranule, i));
    }
    expect_exact_numbers(pool, host);
  }
  void expect_asleep() const {
    for (const auto address : all) {
      EXPECT_EQ(pool.find(address).state, CUMEMPOOL_ASLEEP_BACKED_UP);
    }
    expect_exact_numbers(pool, host);
  }
  // The program's own work on a stream, waited for: what a wait() on the stream must have ordered.
  static void synchronize(const UserStream& stream) {
    EXPECT_EQ(stream.synchronize(), CUMEMPOOL_RESULT_SUCCESS);
  }

  Host host{32};
  FaultDriver faults{host.table()};
  Pool pool{faults.table()};
  std::vector<cumempool_address> all;
  std::atomic<int> copies{0};
};

TEST_F(WakingTest, R5_FinishReturnsWhenAllIsThere) {
  const Waking waking = pool.begin_wake();
  must(waking.status());
  const Outcome outcome = waking.finish();
  ASSERT_EQ(outcome.status, CUMEMPOOL_OK);
  EXPECT_TRUE(waking.done());
  EXPECT_EQ(outcome.row("weights").restored_bytes, kCount * kGranule);
  EXPECT_EQ(outcome.row("weights").allocations, kCount);
  expect_whole();
  const Outcome again = waking.finish();
  EXPECT_EQ(again.status, CUMEMPOOL_OK);
  EXPECT_TRUE(again.rows.empty()) << "the report was given away";
  EXPECT_EQ(pool.snapshot().totals.wakes, 1U);
}

TEST_F(WakingTest, R5_AStreamThatWaitsSeesTheContentsBeforeTheWakeEnds) {
  UserStream stream(host);
  Gate gate;
  stop_before(3, gate);
  const Waking waking = pool.begin_wake();
  must(waking.status());
  gate.wait_until_somebody_waits();
  EXPECT_FALSE(waking.done());
  must(waking.wait(all[1] + 100, stream.get()));
  synchronize(stream);
  EXPECT_TRUE(holds_pattern(all[1], kGranule, 1));
  EXPECT_TRUE(holds_pattern(all[0], kGranule, 0)) << "it came before";
  EXPECT_FALSE(waking.done());
  gate.open();
  must(waking.finish().status);
  expect_whole();
}

TEST_F(WakingTest, R5_AStreamWaitsForACopyThatHasNotRun) {
  UserStream stream(host);
  Gate gate;
  // Before the wake looks how far its copies are, which lets the device run them.
  faults.observe([&gate](const char* entry) {
    if (std::string(entry) == "event_query") gate.wait();
  });
  const Waking waking = pool.begin_wake();
  must(waking.status());
  gate.wait_until_somebody_waits();
  EXPECT_FALSE(holds_pattern(all[0], kGranule, 0)) << "in the queue only";
  must(waking.wait(all[0], stream.get()));
  synchronize(stream);
  EXPECT_TRUE(holds_pattern(all[0], kGranule, 0));
  gate.open();
  must(waking.finish().status);
  expect_whole();
}

TEST_F(WakingTest, AWaitHoldsUntilTheCopyIsInTheQueue) {
  UserStream stream(host);
  Gate gate;
  stop_before(2, gate);
  const Waking waking = pool.begin_wake();
  must(waking.status());
  gate.wait_until_somebody_waits();
  std::atomic<bool> arranged{false};
  std::thread waiter([&] {
    EXPECT_EQ(waking.wait(all[3], stream.get()), CUMEMPOOL_OK);
    arranged = true;
  });
  EXPECT_FALSE(arranged);
  gate.open();
  waiter.join();
  synchronize(stream);
  EXPECT_TRUE(holds_pattern(all[3], kGranule, 3));
  must(waking.finish().status);
}

TEST_F(WakingTest, WaitingAfterTheEndIsNoEffect) {
  const UserStream stream(host);
  const Waking waking = pool.begin_wake();
  must(waking.finish().status);
  EXPECT_EQ(waking.wait(all[0], stream.get()), CUMEMPOOL_OK);
  must(pool.sleep("weights", kOffload).status);
  EXPECT_EQ(waking.wait(all[0], stream.get()), CUMEMPOOL_INVALID_ARGUMENT) << "it sleeps again";
}

TEST_F(WakingTest, WaitingForWhatIsNotPartOfIt) {
  const UserStream stream(host);
  const auto awake = pool.malloc("other", kGranule);
  const auto asleep = pool.malloc("kv", kGranule);
  must(pool.sleep("kv", kOffload).status);
  const Waking waking = pool.begin_wake({{"weights"}});
  must(waking.status());
  EXPECT_EQ(waking.wait(awake, stream.get()), CUMEMPOOL_OK);
  EXPECT_EQ(waking.wait(asleep, stream.get()), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(waking.wait(1, stream.get()), CUMEMPOOL_NOT_OWNED);
  EXPECT_STREQ(cumempool_last_error()->operation, "wait");
  {
    const Pool other(host);
    EXPECT_EQ(waking.wait(other.malloc("weights", 1), stream.get()), CUMEMPOOL_NOT_OWNED);
  }
  must(waking.finish().status);
  EXPECT_EQ(pool.find(asleep).state, CUMEMPOOL_ASLEEP_BACKED_UP);
}

TEST_F(WakingTest, R5_AStreamThatIsBeingCapturedIsRefused) {
  UserStream stream(host);
  Gate gate;
  stop_before(4, gate);
  stream.set_capturing(true);
  EXPECT_EQ(pool.begin_wake(std::nullopt, {}, {stream.get()}).status(), CUMEMPOOL_CAPTURING);
  expect_asleep();
  const Waking waking = pool.begin_wake();
  must(waking.status());
  gate.wait_until_somebody_waits();
  EXPECT_EQ(waking.wait(all[0], stream.get()), CUMEMPOOL_CAPTURING);
  stream.set_capturing(false);
  EXPECT_EQ(waking.wait(all[0], stream.get()), CUMEMPOOL_OK);
  gate.open();
  must(waking.finish().status);
}

TEST_F(WakingTest, ComesInTheOrderOfAllocationButWhatIsAskedForFirst) {
  const auto discarded = pool.malloc("kv", kGranule);
  must(pool.sleep("kv", kDiscard).status);
  const UserStream stream(host);
  Gate gate;
  stop_before(2, gate);
  const Waking waking = pool.begin_wake(std::nullopt, {all[2] + 5});
  must(waking.status());
  gate.wait_until_somebody_waits();
  must(waking.wait(all[2], stream.get()));
  synchronize(stream);
  EXPECT_TRUE(holds_pattern(all[2], kGranule, 2));
  gate.open();
  must(waking.finish().status);
  expect_whole();
  EXPECT_EQ(pool.find(discarded).state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(pool.begin_wake(std::nullopt, {1}).status(), CUMEMPOOL_NOT_OWNED);
}

TEST_F(WakingTest, StagedTiersAreReadyOneAfterAnotherAsWell) {
  const TemporaryDirectory directory;
  for (const auto& policy : {backup_in(CUMEMPOOL_BACKUP_PAGEABLE),
                             backup_in(CUMEMPOOL_BACKUP_FILE, directory.path().c_str()),
                             backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, 1)}) {
    must(pool.wake().status);
    must(pool.set_backup("weights", policy));
    must(pool.sleep("weights", kOffload).status);
    const UserStream stream(host);
    const Waking waking = pool.begin_wake();
    must(waking.status());
    for (std::uint32_t i = 0; i < kCount; ++i) {
      must(waking.wait(all[i], stream.get()));
      synchronize(stream);
      EXPECT_TRUE(holds_pattern(all[i], kGranule, i));
    }
    must(waking.finish().status);
    expect_whole();
  }
}

TEST_F(WakingTest, SeveralDevices) {
  const auto other = pool.malloc("weights", kGranule, 1);
  write_pattern(other, kGranule, 9);
  must(pool.sleep("weights", kOffload).status);
  const UserStream here(host);
  const UserStream there(host, 1);
  const Waking waking = pool.begin_wake();
  must(waking.status());
  must(waking.wait(other, here.get()));  // a stream of another device may wait as well
  must(waking.wait(other, there.get()));
  synchronize(there);
  EXPECT_TRUE(holds_pattern(other, kGranule, 9));
  synchronize(here);
  must(waking.finish().status);
  expect_whole();
}

// Nothing of the allocator is on that device.
TEST_F(WakingTest, R5_AStreamOfADeviceThatOnlyTheProgramUsesMayWait) {
  const UserStream there(host, 1);
  Gate gate;
  stop_before(3, gate);
  const Waking waking = pool.begin_wake();
  must(waking.status());
  gate.wait_until_somebody_waits();
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(waking.wait(all[1], there.get()), CUMEMPOOL_OK) << last_message();
  }
  synchronize(there);
  EXPECT_TRUE(holds_pattern(all[1], kGranule, 1));
  gate.open();
  must(waking.finish().status);
  EXPECT_EQ(host.counters().retained_contexts, 1U) << "the other device's is not kept";
  expect_whole();
}

TEST_F(WakingTest, AStreamOfADeviceWithoutAContextIsRefusedAndMakesNone) {
  Gate gate;
  stop_before(3, gate);
  const Waking waking = pool.begin_wake();
  must(waking.status());
  gate.wait_until_somebody_waits();
  EXPECT_EQ(waking.wait(all[1], {sizeof(cumempool_device_stream), 1, 0}),
            CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_last_error()->device, 1);
  EXPECT_EQ(host.counters().retained_contexts, 1U);
  gate.open();
  must(waking.finish().status);
}

// ---- failures ----------------------------------------------------------------------------------

// Another process takes the memory while the wake is under way.
class WakingWithoutRoom : public WakingTest {
 protected:
  void SetUp() override {
    must(pool.set_memory("weights", CUMEMPOOL_BACKING_VMM, {1}));
    WakingTest::SetUp();
  }
  void TearDown() override { faults.observe(nullptr); }
};

TEST_F(WakingWithoutRoom, R5_WorkOnWhatWasHandedOutIsWaitedForOnEveryDevice) {
  UserStream here(host);
  UserStream there(host, 1);
  Gate gate;
  std::atomic<int> creates{0};
  faults.reset_counts();
  faults.observe([&](const char* entry) {
    if (std::string(entry) == "create" && ++creates == 3) gate.wait();
  });
  faults.fail_nth("create", 3, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  const Waking waking = pool.begin_wake();
  must(waking.status());
  gate.wait_until_somebody_waits();
  must(waking.wait(all[0], here.get()));
  must(waking.wait(all[1], there.get()));
  here.fill(all[0], kGranule, 9);
  there.fill(all[1], kGranule, 9);
  gate.open();
  EXPECT_EQ(waking.finish().status, CUMEMPOOL_OUT_OF_MEMORY);
  faults.observe(nullptr);
  EXPECT_EQ(host.counters().queued_commands, 0U) << "what was under way has ended";
  synchronize(here);
  synchronize(there);
  expect_asleep();
  ASSERT_EQ(pool.wake().status, CUMEMPOOL_OK) << last_message();
  expect_whole();
}

TEST_F(WakingWithoutRoom, R5_NothingIsHandedOutOnceTheWayBackHasBegun) {
  UserStream stream(host);
  Gate gate;
  faults.reset_counts();
  faults.observe([&](const char* entry) {
    if (std::string(entry) == "unmap") gate.wait();
  });
  faults.fail_nth("create", 3, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  const Waking waking = pool.begin_wake();
  must(waking.status());
  gate.wait_until_somebody_waits();
  std::atomic<bool> answered{false};
  std::thread waiter([&] {
    EXPECT_EQ(waking.wait(all[0], stream.get()), CUMEMPOOL_OUT_OF_MEMORY);
    answered = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(answered) << "it is on its way back";
  gate.open();
  waiter.join();
  EXPECT_EQ(waking.finish().status, CUMEMPOOL_OUT_OF_MEMORY);
  faults.observe(nullptr);
  expect_asleep();
}

// A wait() that has found the memory ready is still at its call of the driver.
TEST_F(WakingWithoutRoom, R5_TheWayBackBeginsBehindThoseWhoAreBeingHandedMemory) {
  UserStream stream(host);
  Gate create;
  Gate handing_out;
  std::atomic<bool> taken_back{false};
  std::atomic<int> creates{0};
  faults.reset_counts();
  faults.observe([&](const char* entry) {
    const std::string called(entry);
    if (called == "create" && ++creates == 3) create.wait();
    if (called == "stream_wait_event") handing_out.wait();
    if (called == "unmap") taken_back = true;
  });
  faults.fail_nth("create", 3, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  const Waking waking = pool.begin_wake();
  must(waking.status());
  create.wait_until_somebody_waits();
  std::thread waiter([&] { EXPECT_EQ(waking.wait(all[0], stream.get()), CUMEMPOOL_OK); });
  handing_out.wait_until_somebody_waits();
  create.open();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(taken_back);
  handing_out.open();
  waiter.join();
  EXPECT_EQ(waking.finish().status, CUMEMPOOL_OUT_OF_MEMORY);
  faults.observe(nullptr);
  expect_asleep();
}

TEST_F(WakingTest, R4_WithoutRoomItDoesNotBegin) {
  pool.malloc("other", 29 * kGranule);
  const Waking waking = pool.begin_wake();
  EXPECT_EQ(waking.status(), CUMEMPOOL_OUT_OF_MEMORY);
  EXPECT_EQ(waking.get(), nullptr);
  EXPECT_STREQ(cumempool_last_error()->operation, "wake");
  EXPECT_NE(last_message().find("needs 256.00 KiB"), std::string::npos) << last_message();
  expect_asleep();
}

TEST_F(WakingTest, R4_AFailureHalfwayIsSeenByWaitAndFinish) {
  UserStream stream(host);
  Gate gate;
  faults.observe([&](const char* entry) {
    if (std::string(entry) != "copy_to_device") return;
    if (++copies == 3) gate.wait();
  });
  faults.fail_nth("copy_to_device", 4, 719);
  const Waking waking = pool.begin_wake();
  must(waking.status());
  gate.wait_until_somebody_waits();
  must(waking.wait(all[0], stream.get()));
  std::thread waiter([&] {
    EXPECT_EQ(waking.wait(all[3], stream.get()), CUMEMPOOL_DRIVER_ERROR);
    EXPECT_EQ(cumempool_last_error()->result, 719);
  });
  gate.open();
  waiter.join();
  for (int i = 0; i < 2; ++i) {
    const Outcome outcome = waking.finish();
    EXPECT_EQ(outcome.status, CUMEMPOOL_DRIVER_ERROR);
    EXPECT_STREQ(cumempool_last_error()->operation, "wake");
    EXPECT_STREQ(cumempool_last_error()->driver_call, "host.copy_to_device");
  }
  EXPECT_EQ(waking.wait(all[0], stream.get()), CUMEMPOOL_DRIVER_ERROR) << "it is gone again";
  faults.observe(nullptr);
  expect_asleep();
  EXPECT_EQ(host.counters().charged_bytes, 0U);
  must(pool.begin_wake().finish().status);
  expect_whole();
}

TEST_F(WakingTest, R6_FreedMeanwhile) {
  Gate gate;
  stop_before(2, gate);
  const Waking waking = pool.begin_wake();
  must(waking.status());
  gate.wait_until_somebody_waits();
  must(cumempool_free(all[0]));
  must(cumempool_free(all[3]));
  const UserStream stream(host);
  EXPECT_EQ(waking.wait(all[0], stream.get()), CUMEMPOOL_NOT_OWNED);
  gate.open();
  must(waking.finish().status);
  EXPECT_EQ(host.counters().reserved_bytes, 2 * kGranule);
  EXPECT_TRUE(holds_pattern(all[1], kGranule, 1));
  EXPECT_TRUE(holds_pattern(all[2], kGranule, 2));
}

TEST_F(WakingTest, DestroyingItWithoutFinishWaitsForTheEnd) {
  for (const bool fail : {true, false}) {
    if (fail) faults.fail_nth("copy_to_device", 3, 719);
    Waking waking = pool.begin_wake();
    must(waking.status());
    waking.destroy();
    if (fail) expect_asleep();
  }
  expect_whole();
}

TEST_F(WakingTest, OutlivesTheAllocatorsHandle) {
  {
    const Waking waking = pool.begin_wake();
    must(waking.status());
    EXPECT_EQ(pool.close(true), CUMEMPOOL_OK) << "it waited for the wake";
    pool.destroy();
    EXPECT_EQ(waking.finish().status, CUMEMPOOL_OK);
  }
  for (const auto address : all) must(cumempool_free(address));
}

TEST_F(WakingTest, R3_FromInsideATransitionItIsBusy) {
  std::vector<cumempool_status> inside;
  faults.observe([&](const char* entry) {
    if (std::string(entry) != "copy_to_device" || !inside.empty()) return;
    inside.push_back(pool.begin_wake().status());
    inside.push_back(pool.sleep("weights", kOffload).status);
  });
  must(pool.wake().status);
  EXPECT_EQ(inside, std::vector<cumempool_status>(2, CUMEMPOOL_BUSY));
  inside.clear();
  must(pool.sleep("weights", kOffload).status);
  must(pool.begin_wake().finish().status);  // its own thread is inside
  EXPECT_EQ(inside, std::vector<cumempool_status>(2, CUMEMPOOL_BUSY));
  expect_whole();
}

TEST_F(WakingTest, R3_OtherTransitionsWaitForIt) {
  Gate gate;
  stop_before(2, gate);
  const Waking waking = pool.begin_wake();
  must(waking.status());
  gate.wait_until_somebody_waits();
  std::thread sleeper([&] { EXPECT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_OK); });
  gate.open();
  sleeper.join();
  must(waking.finish().status);
  faults.observe(nullptr);
  expect_asleep();
  must(pool.wake().status);
  expect_whole();
}

TEST_F(WakingTest, NothingToWakeEndsAtOnce) {
  must(pool.wake().status);
  const Waking waking = pool.begin_wake();
  must(waking.status());
  const Outcome outcome = waking.finish();
  EXPECT_EQ(outcome.status, CUMEMPOOL_OK);
  EXPECT_TRUE(outcome.rows.empty());
}

TEST(WakingAbi, NullArgumentsAreInvalid) {
  cumempool_waking* waking = nullptr;
  cumempool_report* report = nullptr;
  EXPECT_EQ(cumempool_wake_begin(nullptr, nullptr, 0, nullptr, 0, nullptr, 0, &waking),
            CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_waking_wait(nullptr, 1, {}), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_waking_finish(nullptr, &report), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_waking_done(nullptr), 0);
  cumempool_waking_destroy(nullptr);
  EXPECT_EQ(waking, nullptr);
}

}  // namespace
}  // namespace cumempool::tests
