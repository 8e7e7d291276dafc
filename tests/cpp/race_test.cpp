// Readers of an allocation against its free: what is being torn down is nobody's any more (R6, R7).
// The thread sanitizer says what these tests cannot.
#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <thread>
#include <vector>

#include "host_fixture.hpp"
#include "pool/records.hpp"

namespace cumempool::tests {
namespace {

constexpr int kRounds = 300;
constexpr int kReaders = 3;

class Race : public ::testing::Test {
 protected:
  // Frees an allocation of "w" that sleeps while readers go on, kRounds times.
  void free_against(const std::function<void(cumempool_address)>& read) {
    for (int round = 0; round < kRounds; ++round) {
      const auto address = pool.malloc("w", kGranule);
      must(pool.sleep("w", kOffload).status);
      std::atomic<bool> stop{false};
      std::atomic<int> reads{0};
      std::vector<std::thread> readers;
      readers.reserve(kReaders);
      for (int i = 0; i < kReaders; ++i) {
        readers.emplace_back([&] {
          while (!stop) {
            read(address);
            ++reads;
          }
        });
      }
      while (reads < 2 * kReaders) std::this_thread::yield();
      must(cumempool_free(address));
      stop = true;
      for (std::thread& reader : readers) reader.join();
    }
    expect_exact_numbers(pool, host);
  }

  Host host;
  Pool pool{host};
  std::atomic<int> failures{0};
};

TEST_F(Race, R6_FindAgainstFree) {
  free_against([&](cumempool_address address) {
    cumempool_allocation_info info{};
    info.size = sizeof info;
    const auto status = cumempool_find(nullptr, address, &info);
    if (status == CUMEMPOOL_NOT_OWNED) return;
    if (status != CUMEMPOOL_OK || info.state != CUMEMPOOL_ASLEEP_BACKED_UP) ++failures;
  });
  EXPECT_EQ(failures, 0) << "it is found with its backup, or not at all";
}

TEST_F(Race, R6_ViewsAgainstFree) {
  free_against([&](cumempool_address address) {
    const View view(pool.get(), address, kGranule);
    if (view.status() != CUMEMPOOL_OK && view.status() != CUMEMPOOL_NOT_OWNED) ++failures;
  });
  EXPECT_EQ(failures, 0) << "there is a view of the backup, or no allocation";
  EXPECT_EQ(pool.close(), CUMEMPOOL_OK) << "no view is left open";
}

TEST_F(Race, R6_WaitsOfAnEndedWakeAgainstFree) {
  const Waking waking = pool.begin_wake();
  must(waking.finish().status);
  const UserStream stream(host);
  free_against([&](cumempool_address address) {
    const auto status = waking.wait(address, stream.get());
    if (status != CUMEMPOOL_INVALID_ARGUMENT && status != CUMEMPOOL_NOT_OWNED &&
        status != CUMEMPOOL_OK) {
      ++failures;
    }
  });
  EXPECT_EQ(failures, 0) << "it sleeps, or is gone";
}

TEST_F(Race, R6_PreservingAgainstFree) {
  free_against([&](cumempool_address address) {
    const auto status = cumempool_preserve(pool.get(), address);
    if (status != CUMEMPOOL_OK && status != CUMEMPOOL_NOT_OWNED) ++failures;
  });
  EXPECT_EQ(failures, 0);
}

TEST_F(Race, R6_ExportsAgainstFree) {
  free_against([&](cumempool_address address) {
    int number = -1;
    cumempool_allocation_info info{};
    info.size = sizeof info;
    const auto status =
        cumempool_export(pool.get(), address, CUMEMPOOL_HANDLE_POSIX_FD, &number, &info);
    if (status != CUMEMPOOL_INVALID_ARGUMENT && status != CUMEMPOOL_NOT_OWNED) ++failures;
  });
  EXPECT_EQ(failures, 0) << "it sleeps, or is gone";
}

TEST_F(Race, R13_StatisticsAgainstFree) {
  std::atomic<bool> stop{false};
  std::thread program([&] {
    while (!stop) must(cumempool_free(pool.malloc("w", kGranule)));
  });
  for (int round = 0; round < 20 * kRounds; ++round) {
    const auto picture = pool.snapshot();
    std::uint64_t awake = 0;
    for (const auto& row : picture.tags) awake += row.awake_bytes;
    if (awake > picture.totals.reserved_address_bytes) ++failures;
  }
  stop = true;
  program.join();
  EXPECT_EQ(failures, 0) << "what is awake has addresses";
}

TEST_F(Race, R13_NoRecordGoesBetweenTheVisitAndItsEnd) {
  pool::RecordSet records;
  std::future<std::uint64_t> other;
  records.for_each([](pool::Record&) {},
                   [&] {
                     other = std::async(std::launch::async, [&] { return records.moment(); });
                     EXPECT_EQ(other.wait_for(std::chrono::milliseconds(50)),
                               std::future_status::timeout);
                   });
  EXPECT_EQ(other.get(), 1U);
}

}  // namespace
}  // namespace cumempool::tests
