// The fault driver: it passes calls on, counts them, fails the ones it was told to, and lets a test
// watch them.
#include "fault_driver.hpp"

#include <gtest/gtest.h>

#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "conformance_fixture.hpp"
#include "driver/builtin.hpp"
#include "driver/host_driver.hpp"

namespace cumempool::driver {
namespace {

constexpr std::size_t kGranule = 64u << 10;

class FaultDriverTest : public ::testing::Test {
 protected:
  void TearDown() override { destroy_host_driver(host_); }

  static const cumempool_driver* make_host() {
    cumempool_host_driver_options options{};
    options.size = sizeof(options);
    options.device_count = 1;
    options.bytes_per_device = 64 * kGranule;
    options.granularity = kGranule;
    const auto* host = make_host_driver(options);
    conformance::must(host->init(host->self), "init");
    return host;
  }

  cumempool_result reserve() {
    cumempool_address address = 0;
    return CALL(faults_.table(), reserve, kGranule, &address);
  }

  cumempool_result count_devices() {
    int count = 0;
    return CALL(faults_.table(), device_count, &count);
  }

  const cumempool_driver* host_ = make_host();
  FaultDriver faults_{*host_};
};

TEST_F(FaultDriverTest, LooksLikeTheDriverBehindIt) {
  EXPECT_STREQ(faults_.table().name, "host");
  EXPECT_EQ(faults_.table().version, CUMEMPOOL_DRIVER_VERSION);
  EXPECT_EQ(faults_.table().size, sizeof(cumempool_driver));
}

TEST_F(FaultDriverTest, HasEveryEntryOnceInTheOrderOfTheTable) {
  const auto& entries = FaultDriver::entries();
  EXPECT_EQ(std::set<std::string>(entries.begin(), entries.end()).size(), entries.size());
  EXPECT_EQ(entries.size() * sizeof(void (*)()),
            sizeof(cumempool_driver) - offsetof(cumempool_driver, init));
  EXPECT_STREQ(entries.front(), "init");
  EXPECT_STREQ(entries.back(), "fence");
}

TEST_F(FaultDriverTest, PassesArgumentsAndResultsOn) {
  cumempool_address address = 0;
  EXPECT_EQ(CALL(faults_.table(), reserve, kGranule, &address), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_NE(address, 0u);
  EXPECT_EQ(CALL(faults_.table(), unreserve, address, 2 * kGranule),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(faults_.table(), unreserve, address, kGranule), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(faults_.calls("reserve"), 1u);
  EXPECT_EQ(faults_.calls("unreserve"), 2u);
  EXPECT_EQ(faults_.calls(), 3u);
  EXPECT_EQ(faults_.failures(), 0u) << "the other driver's failures are its own";
}

TEST_F(FaultDriverTest, FailsTheNthCallOfAnEntryOnce) {
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_SUCCESS);
  faults_.fail_nth("reserve", 2, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(count_devices(), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(faults_.failures(), 1u);
  EXPECT_EQ(host_driver_counters(host_).reservations, 3u) << "a failed call has no effect";
}

TEST_F(FaultDriverTest, ADriverThatComputesNoDigestsIsMadeByFailingThem) {
  faults_.fail_nth("digest", 1, CUMEMPOOL_RESULT_NOT_SUPPORTED, FaultDriver::Repeat::kFromThenOn);
  for (int call = 0; call < 2; ++call) {
    EXPECT_EQ(CALL(faults_.table(), digest, 0, std::uint64_t{1}, nullptr, std::size_t{0}, nullptr,
                   cumempool_stream{0}),
              CUMEMPOOL_RESULT_NOT_SUPPORTED);
  }
}

TEST_F(FaultDriverTest, FailsFromThenOnUntilToldToFailNothing) {
  faults_.fail_nth("reserve", 2, CUMEMPOOL_RESULT_OPERATING_SYSTEM,
                   FaultDriver::Repeat::kFromThenOn);
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_OPERATING_SYSTEM);
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_OPERATING_SYSTEM);
  faults_.fail_nothing();
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(faults_.failures(), 2u);
}

TEST_F(FaultDriverTest, FailsTheNthCallOfAnyEntryButTheExcluded) {
  faults_.exclude("device_count");
  faults_.fail_nth_of_any(2, CUMEMPOOL_RESULT_NOT_SUPPORTED);
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(count_devices(), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_NOT_SUPPORTED);
  EXPECT_EQ(faults_.calls(), 2u);
  EXPECT_EQ(faults_.calls("device_count"), 1u);
  faults_.fail_nth("device_count", 1, CUMEMPOOL_RESULT_NO_DEVICE);
  EXPECT_EQ(count_devices(), CUMEMPOOL_RESULT_NO_DEVICE) << "named, it fails all the same";
}

TEST_F(FaultDriverTest, FirstPlanWinsWhereTwoFailTheSameCall) {
  faults_.fail_nth("reserve", 1, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  faults_.fail_nth_of_any(1, CUMEMPOOL_RESULT_NOT_SUPPORTED);
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(faults_.failures(), 1u);
}

TEST_F(FaultDriverTest, ResetCountsStartsAgainFromZero) {
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_SUCCESS);
  faults_.reset_counts();
  EXPECT_EQ(faults_.calls(), 0u);
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(faults_.calls("reserve"), 1u);
}

TEST_F(FaultDriverTest, ObserverSeesEachCallBeforeItAndMayUseTheTable) {
  std::vector<std::string> order;
  faults_.observe([&](const char* entry) {
    order.emplace_back(entry);
    if (order.size() == 1) {
      EXPECT_EQ(host_driver_counters(host_).reservations, 0u);
      EXPECT_EQ(count_devices(), CUMEMPOOL_RESULT_SUCCESS);
    }
  });
  faults_.fail_nth("reserve", 1, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  EXPECT_EQ(order, (std::vector<std::string>{"reserve", "device_count"}));
  faults_.observe(nullptr);
  EXPECT_EQ(reserve(), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(order.size(), 2u);
}

TEST_F(FaultDriverTest, CountsTheCallsOfEveryThread) {
  faults_.fail_nth("device_count", 50, CUMEMPOOL_RESULT_NO_DEVICE);
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([this] {
      for (int call = 0; call < 100; ++call) count_devices();
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(faults_.calls("device_count"), 400u);
  EXPECT_EQ(faults_.failures(), 1u);
}

TEST_F(FaultDriverTest, NamesAndNumbersThatMakeNoSenseThrow) {
  EXPECT_THROW(faults_.fail_nth("cuMemMap", 1, CUMEMPOOL_RESULT_OUT_OF_MEMORY),
               std::invalid_argument);
  EXPECT_THROW(faults_.fail_nth("map", 0, CUMEMPOOL_RESULT_OUT_OF_MEMORY), std::invalid_argument);
  EXPECT_THROW(faults_.fail_nth_of_any(0, CUMEMPOOL_RESULT_OUT_OF_MEMORY), std::invalid_argument);
  EXPECT_THROW(faults_.exclude(""), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(faults_.calls("mapp")), std::invalid_argument);
}

}  // namespace
}  // namespace cumempool::driver
