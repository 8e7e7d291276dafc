// Devices whose driver pins no host memory, as in confidential computing: what works without, and
// what the rest says.
#include <gtest/gtest.h>

#include <string>

#include "host_fixture.hpp"
#include "temporary_directory.hpp"

namespace cumempool::tests {
namespace {

struct HostWithFence : Host {
  explicit HostWithFence(cumempool_fence_way fence)
      : Host(kDeviceGranules, 2, kGranule, CUMEMPOOL_HANDLE_POSIX_FD, false, fence) {}
};

class UnpinnedHost : public ::testing::TestWithParam<cumempool_fence_way> {
 protected:
  cumempool_address filled(const char* tag, std::size_t bytes, std::uint32_t seed) {
    const cumempool_address address = pool.malloc(tag, bytes);
    write_pattern(address, bytes, seed);
    return address;
  }

  HostWithFence host{GetParam()};
  Pool pool{host.table(), pool_options(0, true)};
};

TEST_P(UnpinnedHost, R4_PageableAndFileBackupsAreWholeAgainAndDiscardedMemoryGoes) {
  const TemporaryDirectory directory;
  must(pool.set_backup("weights", backup_in(CUMEMPOOL_BACKUP_PAGEABLE)));
  must(pool.set_backup("adapters", backup_in(CUMEMPOOL_BACKUP_FILE, directory.path().c_str())));
  const auto weights = filled("weights", 3 * kGranule, 1);
  const auto adapters = filled("adapters", 2 * kGranule, 2);
  const auto cache = filled("kv", kGranule, 3);
  for (int round = 0; round < 2; ++round) {
    UserStream stream(host);
    stream.fill(weights, kGranule, 7);
    must(pool.sleep({{{"weights", kOffload}, {"adapters", kOffload}, {"kv", kDiscard}}}).status);
    EXPECT_EQ(host.counters().queued_commands, 0U) << "R5";
    EXPECT_EQ(host.counters().charged_bytes, 0U);
    must(pool.wake().status);
    EXPECT_TRUE(all_are(weights, kGranule, 7));
    EXPECT_TRUE(holds_pattern(adapters, 2 * kGranule, 2));
    write_pattern(weights, 3 * kGranule, 1);
  }
  for (const auto address : {weights, adapters, cache}) must(cumempool_free(address));
  EXPECT_EQ(host.counters().charged_bytes, 0U) << "no free keeps its memory";
  EXPECT_EQ(pool.snapshot().totals.host_bytes, 0U) << "nothing is pinned";
}

TEST_P(UnpinnedHost, R12_APinnedBackupIsRefusedByNameWithAWayOut) {
  const auto weights = filled("weights", kGranule, 1);
  EXPECT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_UNSUPPORTED);
  const std::string message = cumempool_last_error()->message;
  EXPECT_NE(message.find("cannot be pinned here"), std::string::npos) << message;
  EXPECT_NE(message.find("backup='pageable'"), std::string::npos) << message;
  EXPECT_EQ(pool.find(weights).state, CUMEMPOOL_AWAKE);
  EXPECT_TRUE(holds_pattern(weights, kGranule, 1));
}

TEST_P(UnpinnedHost, R4_ABackupThatCannotBePinnedGoesWhereTheOverflowDoes) {
  cumempool_allocator_options options = pool_options();
  options.overflow = backup_in(CUMEMPOOL_BACKUP_PAGEABLE);
  Pool overflowing{host.table(), options};
  const auto address = overflowing.malloc("weights", 3 * kGranule);
  write_pattern(address, 3 * kGranule, 1);
  const auto slept = overflowing.sleep("weights", kOffload);
  ASSERT_EQ(slept.status, CUMEMPOOL_OK) << cumempool_last_error()->message;
  ASSERT_EQ(slept.problems.size(), 1U);
  EXPECT_NE(slept.problems[0].find("cannot be pinned here"), std::string::npos)
      << slept.problems[0];
  EXPECT_EQ(overflowing.find(address).backup_tier, CUMEMPOOL_BACKUP_PAGEABLE);
  must(overflowing.wake().status);
  EXPECT_TRUE(holds_pattern(address, 3 * kGranule, 1));
  const auto again = overflowing.sleep("weights", kOffload);
  ASSERT_EQ(again.status, CUMEMPOOL_OK);
  EXPECT_TRUE(again.problems.empty()) << "it is not tried again";
  EXPECT_EQ(overflowing.snapshot().totals.failed_transitions, 0U) << "R13";
  must(cumempool_free(address));
}

TEST_P(UnpinnedHost, R8_TheProbeSaysSo) {
  cumempool_device_probe probe{};
  probe.size = sizeof probe;
  must(cumempool_probe_device(&host.table(), 0, &probe));
  EXPECT_EQ(probe.usable, 1) << probe.reason;
  EXPECT_EQ(probe.pins_host_memory, 0);
  EXPECT_EQ(probe.fence, GetParam());
}

INSTANTIATE_TEST_SUITE_P(Ways, UnpinnedHost,
                         ::testing::Values(CUMEMPOOL_FENCE_ALLOCATION, CUMEMPOOL_FENCE_CONTEXT));

TEST(FenceWays, R5_TheContextIsNotSynchronisedUnderACapture) {
  const HostWithFence host{CUMEMPOOL_FENCE_CONTEXT};
  {
    Pool pool{host};
    must(pool.set_backup("weights", backup_in(CUMEMPOOL_BACKUP_PAGEABLE)));
    const auto address = pool.malloc("weights", kGranule);
    write_pattern(address, kGranule, 1);
    UserStream other(host);
    other.set_capturing(true);
    EXPECT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_DRIVER_ERROR);
    const std::string message = cumempool_last_error()->message;
    EXPECT_NE(message.find("A stream capture is in the way"), std::string::npos) << message;
    EXPECT_TRUE(holds_pattern(address, kGranule, 1)) << "awake as before";
    other.set_capturing(false);
    must(pool.sleep("weights", kOffload).status);
    must(pool.wake().status);
    EXPECT_TRUE(holds_pattern(address, kGranule, 1));
  }
}

TEST(FenceWays, R8_ADeviceThatNothingWaitsForIsNotUsable) {
  const HostWithFence host{CUMEMPOOL_FENCE_NONE};
  cumempool_device_probe probe{};
  probe.size = sizeof probe;
  must(cumempool_probe_device(&host.table(), 0, &probe));
  EXPECT_EQ(probe.usable, 0);
  EXPECT_EQ(probe.fence, CUMEMPOOL_FENCE_NONE);
  EXPECT_NE(std::string(probe.reason).find("waits for the work of this device"), std::string::npos)
      << probe.reason;
}

}  // namespace
}  // namespace cumempool::tests
