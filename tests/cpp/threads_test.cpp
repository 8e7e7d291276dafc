// Many threads on one allocator: allocations and statistics while other tags sleep, wake and swap,
// frees and closes that race, and contents that survive all of it.
#include <atomic>
#include <chrono>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "host_fixture.hpp"

namespace cumempool::tests {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kThreads = 8;
constexpr std::chrono::milliseconds kDuration{2000};

class Threads : public ::testing::Test {
 protected:
  explicit Threads(bool retain_backups = false)
      : pool(host.table(), pool_options(0, retain_backups)) {}

  struct Block {
    cumempool_address address;
    std::size_t bytes;
    std::uint32_t seed;
  };

  // Allocates, fills, checks and frees until `stop`; counts what it found damaged.
  void churn(int number) {
    std::minstd_rand random(static_cast<unsigned>(number) + 1);
    std::vector<Block> mine;
    const std::string tag = "thread " + std::to_string(number % 4);
    const int device = number % 2;
    while (!stop) {
      if (mine.size() < 4 && random() % 2 == 0) {
        Block block{0, (1 + random() % 2) * kGranule, static_cast<std::uint32_t>(random())};
        if (pool.try_malloc(tag.c_str(), block.bytes, device, block.address) != CUMEMPOOL_OK) {
          ++failures;  // there is room for all of them
          continue;
        }
        write_pattern(block.address, block.bytes, block.seed);
        mine.push_back(block);
      } else if (!mine.empty()) {
        std::swap(mine[random() % mine.size()], mine.back());
        check_and_free(mine);
      }
      look_around(mine);
      ++rounds;
    }
    while (!mine.empty()) check_and_free(mine);
  }

  void check_and_free(std::vector<Block>& mine) {
    const Block block = mine.back();
    mine.pop_back();
    if (!holds_pattern(block.address, block.bytes, block.seed)) ++damaged;
    if (cumempool_free(block.address) != CUMEMPOOL_OK) ++failures;
  }

  void look_around(const std::vector<Block>& mine) {
    const Picture picture = pool.snapshot();
    if (picture.totals.physical_bytes > 2 * kDeviceGranules * kGranule) ++failures;
    if (mine.empty()) return;
    if (pool.find(mine.front().address + 1).state != CUMEMPOOL_AWAKE) ++failures;
  }

  void run_for(std::chrono::milliseconds duration, const std::function<void()>& meanwhile) {
    std::vector<std::thread> threads;
    threads.reserve(kThreads);
    for (int i = 0; i < kThreads; ++i) {
      pool.declare(("thread " + std::to_string(i % 4)).c_str());
      threads.emplace_back([this, i] { churn(i); });
    }
    const auto end = Clock::now() + duration;
    while (Clock::now() < end) meanwhile();
    stop = true;
    for (std::thread& thread : threads) thread.join();
  }

  Host host;
  Pool pool;
  std::atomic<bool> stop{false};
  std::atomic<int> damaged{0};
  std::atomic<int> failures{0};
  std::atomic<int> rounds{0};
};

TEST_F(Threads, R7_AllocateFreeAndLookWhileOtherTagsSleepAndWake) {
  std::vector<Block> weights;
  for (std::uint32_t i = 0; i < 6; ++i) {
    weights.push_back(
        {pool.malloc("weights", 2 * kGranule, static_cast<int>(i % 2)), 2 * kGranule, i});
    write_pattern(weights.back().address, weights.back().bytes, i);
  }
  pool.malloc("kv", 4 * kGranule);
  int cycles = 0;
  run_for(kDuration, [&] {
    ASSERT_EQ(pool.sleep({{{"weights", kOffload}, {"kv", kDiscard}}}).status, CUMEMPOOL_OK);
    ASSERT_EQ(pool.wake({{"weights", "kv"}}).status, CUMEMPOOL_OK)
        << cumempool_last_error()->message;
    for (const Block& block : weights) {
      if (!holds_pattern(block.address, block.bytes, block.seed)) ++damaged;
    }
    ++cycles;
  });
  EXPECT_EQ(damaged, 0);
  EXPECT_EQ(failures, 0);
  EXPECT_GT(cycles, 0);
  EXPECT_GT(rounds, kThreads);
  expect_exact_numbers(pool, host);
}

class RetainingThreads : public Threads {
 protected:
  RetainingThreads() : Threads(true) {}

  void fill(const char* tag, std::vector<Block>& blocks) const {
    for (std::uint32_t i = 0; i < 4; ++i) {
      const int device = static_cast<int>(i % 2);
      const std::uint32_t seed = i + static_cast<std::uint32_t>(tag[0]);
      blocks.push_back({pool.malloc(tag, 2 * kGranule, device), 2 * kGranule, seed});
      write_pattern(blocks.back().address, blocks.back().bytes, seed);
    }
  }
  void check(const std::vector<Block>& blocks) {
    for (const Block& block : blocks) {
      if (!holds_pattern(block.address, block.bytes, block.seed)) ++damaged;
    }
  }
  // What other threads of a program may ask for at any time.
  void ask(const std::vector<Block>& blocks) {
    while (!stop) {
      const View view(pool.get(), blocks.front().address, blocks.front().bytes);
      if (view.status() == CUMEMPOOL_OK &&
          !holds_pattern(view.address(), blocks.front().bytes, blocks.front().seed)) {
        ++damaged;
      }
      std::uint64_t pinned = 0;
      if (pool.prepare({{{"a", kOffload}, {"b", kOffload}}}, pinned) != CUMEMPOOL_OK) ++failures;
      pool.release_host_memory();
    }
  }
};

TEST_F(RetainingThreads, R7_AllocateFreeAndLookWhileOtherTagsSwapAndWakeAsynchronously) {
  std::vector<Block> a;
  std::vector<Block> b;
  must(pool.set_backup("b", backup_in(CUMEMPOOL_BACKUP_PAGEABLE)));
  fill("a", a);
  fill("b", b);
  const UserStream stream(host);
  std::thread asking([&] { ask(a); });
  int cycles = 0;
  run_for(kDuration, [&] {
    ASSERT_EQ(pool.sleep("b", kOffload).status, CUMEMPOOL_OK);
    ASSERT_EQ(pool.swap({{{"a", kOffload}}}, {{"b"}}).status, CUMEMPOOL_OK)
        << cumempool_last_error()->message;
    check(b);
    const Waking waking = pool.begin_wake({{"a"}}, {a[2].address});
    ASSERT_EQ(waking.status(), CUMEMPOOL_OK);
    EXPECT_EQ(waking.wait(a[2].address, stream.get()), CUMEMPOOL_OK);
    EXPECT_EQ(waking.wait(a[0].address, stream.get()), CUMEMPOOL_OK);
    ASSERT_EQ(waking.finish().status, CUMEMPOOL_OK);
    check(a);
    ++cycles;
  });
  asking.join();
  EXPECT_EQ(damaged, 0);
  EXPECT_EQ(failures, 0);
  EXPECT_GT(cycles, 0);
  expect_exact_numbers(pool, host);
}

TEST_F(RetainingThreads, R6_FreesRaceWellWithSwapsAndAsynchronousWakes) {
  for (int cycle = 0; cycle < 20; ++cycle) {
    std::vector<cumempool_address> addresses;
    for (int i = 0; i < 6; ++i) addresses.push_back(pool.malloc("a", kGranule, i % 2));
    if (pool.sleep("a", kOffload).status != CUMEMPOOL_OK) ++failures;
    for (int i = 0; i < 6; ++i) addresses.push_back(pool.malloc("b", kGranule, i % 2));
    std::thread mover([&] {
      if (pool.swap({{{"b", kOffload}}}, {{"a"}}).status != CUMEMPOOL_OK) ++failures;
      const Waking waking = pool.begin_wake();
      const UserStream stream(host);
      const cumempool_status waited = waking.wait(addresses.back(), stream.get());
      if (waited != CUMEMPOOL_OK && waited != CUMEMPOOL_NOT_OWNED) ++failures;
      if (waking.finish().status != CUMEMPOOL_OK) ++failures;
    });
    std::thread freer([&] {
      for (const auto address : addresses) failures += cumempool_free(address) != CUMEMPOOL_OK;
    });
    mover.join();
    freer.join();
    ASSERT_EQ(host.counters().reserved_bytes, 0U);
  }
  EXPECT_EQ(failures, 0);
  expect_exact_numbers(pool, host);
}

TEST_F(Threads, R3_TransitionsOfSeveralThreadsTakeTurns) {
  const auto address = pool.malloc("weights", 2 * kGranule);
  write_pattern(address, 2 * kGranule, 1);
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int cycle = 0; cycle < 20; ++cycle) {
        const auto status =
            i % 2 == 0 ? pool.sleep("weights", kOffload).status : pool.wake().status;
        if (status != CUMEMPOOL_OK) ++failures;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures, 0);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(address, 2 * kGranule, 1));
  const auto totals = pool.snapshot().totals;
  EXPECT_EQ(totals.sleeps + totals.wakes, static_cast<std::uint64_t>(kThreads) * 20 + 1);
  expect_exact_numbers(pool, host);
}

TEST_F(Threads, R6_FreesOfSleepingAndWakingAllocationsRaceWell) {
  for (int cycle = 0; cycle < 30; ++cycle) {
    std::vector<cumempool_address> addresses;
    addresses.reserve(12);
    for (int i = 0; i < 12; ++i) addresses.push_back(pool.malloc("weights", kGranule, i % 2));
    std::thread sleeper([&] {
      if (pool.sleep("weights", kOffload).status != CUMEMPOOL_OK) ++failures;
      if (pool.wake().status != CUMEMPOOL_OK) ++failures;
    });
    std::thread freer([&] {
      for (const auto address : addresses) failures += cumempool_free(address) != CUMEMPOOL_OK;
    });
    sleeper.join();
    freer.join();
    ASSERT_EQ(host.counters().reserved_bytes, 0U);
  }
  EXPECT_EQ(failures, 0);
  expect_exact_numbers(pool, host);
}

TEST_F(Threads, CloseByForceRacesWellWithAllocatingFreeingAndLooking) {
  for (int cycle = 0; cycle < 30; ++cycle) {
    Pool closing(host);
    closing.declare("weights");
    std::vector<std::thread> threads;
    threads.reserve(4);
    std::atomic<int> made{0};
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&, i] {
        cumempool_address address = 0;
        while (closing.try_malloc("weights", kGranule, i % 2, address) == CUMEMPOOL_OK) {
          ++made;
          (void)closing.snapshot();
          failures += cumempool_free(address) != CUMEMPOOL_OK;
        }
        failures += cumempool_last_error()->status != CUMEMPOOL_CLOSED;
      });
    }
    while (made < 8) std::this_thread::yield();
    EXPECT_EQ(closing.close(true), CUMEMPOOL_OK) << cumempool_last_error()->message;
    for (std::thread& thread : threads) thread.join();
    closing.destroy();
    host.expect_empty();
  }
  EXPECT_EQ(failures, 0);
}

}  // namespace
}  // namespace cumempool::tests
