// Frees while devices are busy: who frees goes on, who needs the memory waits for it, and the
// numbers stay exact (R5, R6, R13). A function launched on a host driver's device makes it busy.
#include <sys/types.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "fault_driver.hpp"
#include "host_fixture.hpp"

extern "C" {
void* cumempool_malloc_0(ssize_t bytes, int device, void* stream) noexcept;
void cumempool_free_0(void* address, ssize_t bytes, int device, void* stream) noexcept;
}

namespace cumempool::tests {
namespace {

using driver::FaultDriver;
using Repeat = FaultDriver::Repeat;

// Work that lasts until it is told to end, or at the latest until the end of its scope.
class Work {
 public:
  explicit Work(const Host& host, int device = 0) {
    must(cumempool_host_driver_launch(
        &host.table(), device,
        [](void* given) {
          const std::unique_ptr<std::shared_ptr<Gate>> gate(
              static_cast<std::shared_ptr<Gate>*>(given));
          (*gate)->pass();
        },
        new std::shared_ptr<Gate>(gate_)));
  }
  ~Work() { end(); }
  Work(const Work&) = delete;
  Work(Work&&) = delete;
  Work& operator=(const Work&) = delete;
  Work& operator=(Work&&) = delete;

  void end() { gate_->open(); }
  bool ran() { return gate_->passed(); }

 private:
  // Outlives the scope: the device may just be about to pass.
  class Gate {
   public:
    void open() {
      const std::lock_guard lock(mutex_);
      open_ = true;
      changed_.notify_all();
    }
    void pass() {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return open_; });
      passed_ = true;
    }
    bool passed() {
      const std::lock_guard lock(mutex_);
      return passed_;
    }

   private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool open_ = false;
    bool passed_ = false;
  };

  std::shared_ptr<Gate> gate_ = std::make_shared<Gate>();
};

class ReaperTest : public ::testing::Test {
 protected:
  static constexpr std::uint64_t kAnHour = 3'600'000'000'000;
  static constexpr std::size_t kAll = kDeviceGranules * kGranule;

  ReaperTest() { wait(0); }
  ~ReaperTest() override { EXPECT_EQ(pool.close(true), CUMEMPOOL_OK); }

  void wait(std::uint64_t nanoseconds) { must(cumempool_set_free_wait(pool.get(), nanoseconds)); }
  std::uint64_t pending() const { return pool.snapshot(false).totals.pending_free_bytes; }
  std::uint64_t leaked() const { return pool.snapshot(false).totals.leaked_bytes; }
  void wait_until_pending(std::uint64_t bytes) const {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (pending() != bytes && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    EXPECT_EQ(pending(), bytes);
  }
  // Runs `call`, which must wait until the work has ended.
  template <typename Call>
  void waits_for(Work& work, const Call& call) {
    std::thread helper([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      work.end();
    });
    call();
    EXPECT_TRUE(work.ran());
    helper.join();
  }

  Host host;
  FaultDriver faults{host.table()};
  Pool pool{faults.table()};
};

TEST_F(ReaperTest, R6_AFreeGoesOnWhileTheDeviceIsBusy) {
  const auto address = pool.malloc("w", 2 * kGranule);
  Work work(host);
  must(cumempool_free(address));
  EXPECT_FALSE(work.ran()) << "R5: the memory is still there for it";
  EXPECT_EQ(pending(), 2 * kGranule);
  EXPECT_EQ(host.counters().mapped_bytes, 2 * kGranule);
  EXPECT_EQ(cumempool_free(address), CUMEMPOOL_NOT_OWNED);
  EXPECT_TRUE(pool.snapshot().allocations.empty());
  expect_exact_numbers(pool, host);
  work.end();
  wait_until_pending(0);
  EXPECT_EQ(host.counters().reserved_bytes, 0U);
}

TEST_F(ReaperTest, R6_MemoryIsBackWhenAFreeReturnsThatFoundTheDeviceIdle) {
  wait(kAnHour);
  for (int i = 0; i < 50; ++i) {
    must(cumempool_free(pool.malloc("w", kGranule)));
    EXPECT_EQ(pending(), 0U);
    EXPECT_EQ(host.counters().reserved_bytes, 0U);
  }
}

TEST_F(ReaperTest, R5_AFreeFromAnotherThreadIsFencedAsWell) {
  wait(kAnHour);
  UserStream stream(host);
  const auto address = pool.malloc("w", kGranule);
  stream.fill(address, kGranule, 7);
  must(cumempool_free(address));
  EXPECT_EQ(host.counters().queued_commands, 0U);
  must(cumempool_free(pool.malloc("w", kGranule)));  // the device is not broken
}

TEST_F(ReaperTest, OneFenceIsForAllThatWasFreedMeanwhile) {
  std::vector<cumempool_address> addresses;
  for (int i = 0; i < 10; ++i) addresses.push_back(pool.malloc("w", kGranule));
  Work work(host);
  faults.reset_counts();
  for (const auto address : addresses) must(cumempool_free(address));
  EXPECT_EQ(pending(), 10 * kGranule);
  work.end();
  wait_until_pending(0);
  EXPECT_LE(faults.calls("fence"), 2U);
}

TEST_F(ReaperTest, R6_SleepingMemoryGoesAtOnceWhateverTheDeviceDoes) {
  const auto address = pool.malloc("w", kGranule);
  must(pool.sleep("w", kOffload).status);
  Work work(host);
  must(cumempool_free(address));
  EXPECT_EQ(pending(), 0U);
  EXPECT_EQ(host.counters().reserved_bytes, 0U);
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, 0U);
  EXPECT_FALSE(work.ran());
  work.end();
  const int device = 0;
  EXPECT_EQ(host.table().fence(host.table().self, &device, 1), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_TRUE(work.ran());
}

TEST_F(ReaperTest, ARetainedBackupGoesAtOnce) {
  const auto address = pool.malloc("w", kGranule);
  must(pool.sleep("w", kOffload).status);
  must(pool.wake().status);
  const Work work(host);
  must(cumempool_free(address));
  EXPECT_EQ(pending(), kGranule);
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, 0U);
}

TEST_F(ReaperTest, OrdinaryMemoryIsFreedByTheThreadAsWell) {
  must(pool.set_memory("plain", CUMEMPOOL_BACKING_CUDA_MALLOC));
  const auto address = pool.malloc("plain", kGranule);
  Work work(host);
  must(cumempool_free(address));
  EXPECT_EQ(pending(), kGranule);
  EXPECT_EQ(host.counters().allocations, 1U);
  work.end();
  wait_until_pending(0);
  EXPECT_EQ(host.counters().allocations, 0U);
}

TEST_F(ReaperTest, R1_ASlotsFreeGoesOnWhileTheDeviceIsBusy) {
  pool.declare("w");
  std::uint32_t slot = 9;
  must(cumempool_bind_slot(pool.get(), "w", &slot));
  ASSERT_EQ(slot, 0U);
  void* const memory = cumempool_malloc_0(kGranule, 0, nullptr);
  ASSERT_NE(memory, nullptr);
  const Work work(host);
  cumempool_free_0(memory, kGranule, 0, nullptr);
  EXPECT_EQ(pending(), kGranule);
  must(cumempool_unbind_slot(slot));
}

// ---- who needs the memory ----------------------------------------------------------------------

TEST_F(ReaperTest, R1_MallocWithoutRoomWaitsForWhatWasFreed) {
  const auto address = pool.malloc("w", kAll);
  Work work(host);
  must(cumempool_free(address));
  cumempool_address other = 0;
  waits_for(work, [&] { must(pool.try_malloc("w", kAll, 0, other)); });
  EXPECT_EQ(pending(), 0U);
}

TEST_F(ReaperTest, R13_MallocBelowTheMarginWaitsForWhatWasFreed) {
  must(cumempool_set_memory_margin(pool.get(), kAll / 2));
  const auto address = pool.malloc("w", kAll / 2);
  Work work(host);
  must(cumempool_free(address));
  cumempool_address other = 0;
  waits_for(work, [&] { must(pool.try_malloc("w", kAll / 2, 0, other)); });
}

TEST_F(ReaperTest, R4_WakesAndSwapsWithoutRoomWaitForWhatWasFreed) {
  enum class Kind { kWake, kBackground, kSwap };
  for (const Kind kind : {Kind::kWake, Kind::kBackground, Kind::kSwap}) {
    const auto kept = pool.malloc("w", kAll);
    write_pattern(kept, kGranule, 3);
    must(pool.sleep("w", kOffload).status);
    const auto other = pool.malloc("other", kAll);
    Work work(host);
    must(cumempool_free(other));
    waits_for(work, [&] {
      if (kind == Kind::kWake) must(pool.wake().status);
      if (kind == Kind::kBackground) must(pool.begin_wake().finish().status);
      if (kind == Kind::kSwap) must(pool.swap({{}}).status);
    });
    EXPECT_TRUE(holds_pattern(kept, kGranule, 3));
    must(cumempool_free(kept));
    wait_until_pending(0);
  }
}

TEST_F(ReaperTest, CloseWaitsForWhatWasFreed) {
  const auto address = pool.malloc("w", kGranule);
  Work work(host);
  must(cumempool_free(address));
  waits_for(work, [&] { EXPECT_EQ(pool.close(), CUMEMPOOL_OK); });
  host.expect_empty();
}

TEST_F(ReaperTest, ACloseThatIsRefusedDoesNotWait) {
  const auto address = pool.malloc("w", kGranule);
  pool.malloc("w", kGranule);
  Work work(host);
  must(cumempool_free(address));
  EXPECT_EQ(pool.close(), CUMEMPOOL_IN_USE);
  EXPECT_FALSE(work.ran());
}

// ---- what the driver refuses -------------------------------------------------------------------

TEST_F(ReaperTest, R13_WhatTheDriverRefusesIsLeakedAndTriedAgainAtCloseOnly) {
  constexpr std::uint64_t kFrees = 50;
  for (const std::uint64_t how : {kAnHour, CUMEMPOOL_FREE_WAITS}) {
    const Pool closing(faults.table());
    const auto totals = [&] { return closing.snapshot(false).totals; };
    must(cumempool_set_free_wait(closing.get(), how));
    std::vector<cumempool_address> addresses;
    for (std::uint64_t i = 0; i < kFrees; ++i) addresses.push_back(closing.malloc("w", kGranule));
    faults.reset_counts();
    faults.fail_nth("fence", 1, 719, Repeat::kFromThenOn);
    for (const auto address : addresses) must(cumempool_free(address));
    const std::uint64_t fences = faults.calls("fence");
    EXPECT_LE(fences, kFrees);
    EXPECT_EQ(totals().pending_free_bytes, 0U);
    EXPECT_EQ(totals().leaked_bytes, kFrees * kGranule);
    expect_exact_numbers(closing, host);
    EXPECT_EQ(closing.wake().status, CUMEMPOOL_OK);
    EXPECT_EQ(faults.calls("fence"), fences);
    EXPECT_EQ(closing.close(), CUMEMPOOL_DRIVER_ERROR);
    EXPECT_EQ(faults.calls("fence"), fences + 1) << "all of them together";
    EXPECT_EQ(totals().leaked_bytes, kFrees * kGranule);
    faults.fail_nothing();
    EXPECT_EQ(closing.close(), CUMEMPOOL_OK);
    EXPECT_EQ(totals().leaked_bytes, 0U);
    EXPECT_EQ(host.counters().reserved_bytes, 0U);
  }
}

TEST_F(ReaperTest, ADeviceThatCannotBeWaitedForKeepsItsOwnMemoryOnly) {
  pool.declare("w");
  cumempool_memory_policy alone = memory_of(CUMEMPOOL_BACKING_VMM, {}, false);
  alone.all_peers = CUMEMPOOL_PEERS_NONE;
  must(cumempool_set_memory(pool.get(), "w", &alone));
  const auto first = pool.malloc("w", kGranule, 0);
  const auto second = pool.malloc("w", 2 * kGranule, 0);
  const auto third = pool.malloc("w", 4 * kGranule, 1);
  Work work(host);
  faults.reset_counts();
  must(cumempool_free(first));
  while (faults.calls("fence") == 0) std::this_thread::yield();
  must(cumempool_free(second));  // with the next batch
  must(cumempool_free(third));
  faults.fail_nth("fence", 1, 719);  // that of the batch's first device
  work.end();
  wait_until_pending(0);
  EXPECT_EQ(leaked(), 4 * kGranule);
  EXPECT_EQ(pool.close(), CUMEMPOOL_OK);
  EXPECT_EQ(leaked(), 0U);
}

TEST_F(ReaperTest, R6_ManyThreadsFreeOnIdleAndBusyDevices) {
  for (const std::uint64_t how : {std::uint64_t{0}, std::uint64_t{1'000'000}, kAnHour}) {
    wait(how);
    pool.declare("w");
    std::vector<std::thread> threads;
    threads.reserve(4);
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&, i] {
        for (int round = 0; round < 50; ++round) {
          must(cumempool_free(pool.malloc("w", kGranule, i % 2)));
        }
      });
    }
    for (int round = 0; round < 10; ++round) {
      must(pool.sleep("w", kDiscard).status);
      must(pool.wake().status);
    }
    for (std::thread& thread : threads) thread.join();
    wait_until_pending(0);
    expect_exact_numbers(pool, host);
  }
}

}  // namespace
}  // namespace cumempool::tests
