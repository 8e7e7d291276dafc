// Room in host memory is found, or refused, before a page of it is touched: limits of the kernel,
// the limit on pinned memory across NUMA nodes, addresses, and the tier that takes the overflow.
#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "backup/bounce_buffers.hpp"
#include "host_fixture.hpp"
#include "host_root.hpp"
#include "temporary_directory.hpp"

namespace cumempool::tests {
namespace {

constexpr std::size_t kSet = 8 * kGranule;
constexpr std::uint64_t kBuffers = 2 * backup::BounceBuffers::kAllBytes;  // out and in

std::string failure() { return cumempool_last_error()->message; }

cumempool_allocator_options overflowing(const cumempool_backup_policy& overflow,
                                        std::uint64_t limit = 0, bool retain = false) {
  cumempool_allocator_options options = pool_options(limit, retain);
  options.overflow = overflow;
  return options;
}

// What copies go through that no engine makes.
void make_buffers(const Pool& pool) {
  must(pool.set_backup("first", backup_in(CUMEMPOOL_BACKUP_PAGEABLE)));
  pool.malloc("first", kGranule);
  must(pool.sleep("first", kOffload).status);
  must(pool.wake().status);
}

// ---- what the driver pins
// ------------------------------------------------------------------------

// A limit on locked memory, as RLIMIT_MEMLOCK is one, which counts the buffers of copies as one
// set: they would need 256 MiB each. One at a time.
class LockLimit {
 public:
  explicit LockLimit(const Host& host) : table_(host.table()) {
    real_ = host.table();
    held_.clear();
    limit = UINT64_MAX;
    table_.host_register = [](void* self, int device, void* pointer,
                              std::size_t bytes) -> cumempool_result {
      const std::uint64_t counted = bytes == backup::BounceBuffers::kAllBytes ? kSet : bytes;
      if (held() + counted > limit) return CUMEMPOOL_RESULT_OUT_OF_MEMORY;
      const cumempool_result result = real_.host_register(self, device, pointer, bytes);
      if (result == CUMEMPOOL_RESULT_SUCCESS) held_[pointer] = counted;
      return result;
    };
    table_.host_unregister = [](void* self, int device, void* pointer) {
      const cumempool_result result = real_.host_unregister(self, device, pointer);
      if (result == CUMEMPOOL_RESULT_SUCCESS) held_.erase(pointer);
      return result;
    };
  }
  const cumempool_driver& table() const { return table_; }

  static std::uint64_t held() {
    std::uint64_t bytes = 0;
    for (const auto& entry : held_) bytes += entry.second;
    return bytes;
  }
  static inline std::uint64_t limit = 0;

 private:
  static inline cumempool_driver real_{};
  static inline std::map<void*, std::uint64_t> held_;
  cumempool_driver table_;
};

class Locked : public ::testing::Test {
 protected:
  Locked() {
    write_pattern(a, kSet, 1);
    write_pattern(b, 2 * kSet, 2);
  }
  void expect_whole() const {
    must(pool.wake().status);
    EXPECT_TRUE(holds_pattern(a, kSet, 1));
    EXPECT_TRUE(holds_pattern(b, 2 * kSet, 2));
    EXPECT_EQ(pool.snapshot().totals.failed_transitions, 0U) << "R13";
  }
  static void expect_told(const std::vector<std::string>& problems) {
    ASSERT_EQ(problems.size(), 1U);
    EXPECT_NE(problems[0].find("could not be pinned"), std::string::npos) << problems[0];
  }

  const TemporaryDirectory directory;
  const Host host;
  const LockLimit lock{host};
  const Pool pool{lock.table(),
                  overflowing(backup_in(CUMEMPOOL_BACKUP_FILE, directory.path().c_str()))};
  const cumempool_address a = pool.malloc("a", kSet);
  const cumempool_address b = pool.malloc("b", 2 * kSet);
};

TEST_F(Locked, R4_WhatCannotBeLockedOverflowsAndWhatIsPinnedStays) {
  must(pool.sleep("a", kOffload).status);
  LockLimit::limit = LockLimit::held() + kSet;  // for the buffers
  const auto slept = pool.sleep("b", kOffload);
  ASSERT_EQ(slept.status, CUMEMPOOL_OK) << failure();
  expect_told(slept.problems);
  EXPECT_EQ(pool.find(a).backup_tier, CUMEMPOOL_BACKUP_PINNED);
  EXPECT_EQ(pool.find(b).backup_tier, CUMEMPOOL_BACKUP_FILE);
  LockLimit::limit += kSet;  // those of the wake
  expect_whole();
}

TEST_F(Locked, ItIsNotTriedAgainUntilHostMemoryIsReleased) {
  LockLimit::limit = kSet;
  expect_told(pool.sleep("b", kOffload).problems);
  LockLimit::limit = UINT64_MAX;
  must(pool.wake().status);
  EXPECT_TRUE(pool.sleep("b", kOffload).problems.empty());
  EXPECT_EQ(pool.find(b).backup_tier, CUMEMPOOL_BACKUP_FILE);
  must(pool.wake().status);
  std::uint64_t released = 0;
  must(cumempool_release_host_memory(pool.get(), &released));
  must(pool.sleep("b", kOffload).status);
  EXPECT_EQ(pool.find(b).backup_tier, CUMEMPOOL_BACKUP_PINNED);
  expect_whole();
}

TEST_F(Locked, FreePinnedMemoryMakesRoomForTheBuffers) {
  must(pool.sleep("a", kOffload).status);
  must(pool.wake().status);
  LockLimit::limit = LockLimit::held() + kSet / 2;
  const auto slept = pool.sleep({{{"a", kOffload}, {"b", kOffload}}});
  ASSERT_EQ(slept.status, CUMEMPOOL_OK) << failure();
  expect_told(slept.problems);
  LockLimit::limit = UINT64_MAX;
  expect_whole();
}

TEST_F(Locked, R4_ASwapOverflowsAsASleepDoes) {
  must(pool.sleep("a", kOffload).status);
  LockLimit::limit = LockLimit::held() + kSet;
  const auto swapped = pool.swap({{{"b", kOffload}}}, {{"a"}});
  ASSERT_EQ(swapped.status, CUMEMPOOL_OK) << failure();
  expect_told(swapped.problems);
  EXPECT_EQ(pool.find(a).state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(pool.find(b).backup_tier, CUMEMPOOL_BACKUP_FILE);
  LockLimit::limit = UINT64_MAX;
  expect_whole();
}

TEST_F(Locked, APreparedSleepKnowsWhereItGoes) {
  LockLimit::limit = kSet;
  std::uint64_t pinned = 0;
  ASSERT_EQ(pool.prepare({{{"b", kOffload}}}, pinned), CUMEMPOOL_OK) << failure();
  EXPECT_EQ(pinned, 0U);
  const auto slept = pool.sleep("b", kOffload);
  ASSERT_EQ(slept.status, CUMEMPOOL_OK) << failure();
  EXPECT_TRUE(slept.problems.empty());
  LockLimit::limit = UINT64_MAX;
  expect_whole();
}

TEST(HostPlan, R12_WithoutRoomInTheOverflowEitherTheErrorSaysWhoRefused) {
  const Host host;
  const LockLimit lock(host);
  const Pool pool{lock.table(), overflowing(backup_in(CUMEMPOOL_BACKUP_PAGEABLE))};
  pool.malloc("a", kSet);
  LockLimit::limit = kSet / 2;
  const SmallHost small(2 * kSet);  // nothing of it for the buffers of the overflow
  EXPECT_EQ(pool.sleep("a", kOffload).status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  for (const char* const part : {"the driver has refused to pin more", "release_host_memory()"}) {
    EXPECT_NE(failure().find(part), std::string::npos) << failure();
  }
  LockLimit::limit = UINT64_MAX;
  small.leave(2 * kBuffers);
  ASSERT_EQ(pool.sleep("a", kOffload).status, CUMEMPOOL_OK) << failure();
}

TEST(HostPlan, R4_WithoutAnOverflowWhatCannotBeLockedIsRefused) {
  const Host host;
  const LockLimit lock(host);
  const Pool pool{lock.table()};
  const auto a = pool.malloc("a", kSet);
  write_pattern(a, kSet, 1);
  LockLimit::limit = kSet / 2;
  EXPECT_EQ(pool.sleep("a", kOffload).status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  EXPECT_EQ(pool.snapshot().totals.failed_transitions, 1U);
  EXPECT_TRUE(holds_pattern(a, kSet, 1));
  LockLimit::limit = UINT64_MAX;
  EXPECT_EQ(pool.sleep("a", kOffload).status, CUMEMPOOL_OK) << "it is tried each time";
}

// ---- what the kernel leaves --------------------------------------------------------------------

TEST(HostPlan, R4_ASleepThatDoesNotFitIsRefusedBeforeAPageIsTouched) {
  const Host host;
  const Pool pool{host};
  const SmallHost small(kSet - kGranule);
  const auto a = pool.malloc("w", kSet);
  write_pattern(a, kSet, 1);
  EXPECT_EQ(pool.sleep("w", kOffload).status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  for (const char* const part : {"sleep of tag 'w' on device 0", "needs 512.00 KiB more",
                                 "are left of", "/proc/meminfo", "host_backup_overflow"}) {
    EXPECT_NE(failure().find(part), std::string::npos) << failure();
  }
  EXPECT_EQ(pool.find(a).state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(pool.snapshot().totals.host_bytes, 0U);
  EXPECT_TRUE(holds_pattern(a, kSet, 1));
  std::uint64_t pinned = 0;
  EXPECT_EQ(pool.prepare({{{"w", kOffload}}}, pinned), CUMEMPOOL_OUT_OF_HOST_MEMORY);
  EXPECT_NE(failure().find("prepare of tag 'w'"), std::string::npos) << failure();
  EXPECT_EQ(pool.snapshot().totals.host_bytes, 0U);
  small.leave(kSet);
  EXPECT_EQ(pool.sleep("w", kOffload).status, CUMEMPOOL_OK) << failure();
}

TEST(HostPlan, TwoNodesOrTiersShareWhatTheKernelLeaves) {
  const Host host{kDeviceGranules, 2};
  const Pool pool{host};
  must(pool.set_backup("b", backup_in(CUMEMPOOL_BACKUP_PAGEABLE)));
  pool.malloc("a", kSet, 0);
  pool.malloc("b", kSet, 1);
  const SmallHost small(2 * kSet - kGranule + kBuffers);
  const SleepCall both{{{"a", kOffload}, {"b", kOffload}}};
  EXPECT_EQ(pool.sleep(both).status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  EXPECT_EQ(pool.snapshot().totals.host_bytes + pool.snapshot().totals.pageable_bytes, 0U);
  small.leave(2 * kSet + kBuffers);
  EXPECT_EQ(pool.sleep(both).status, CUMEMPOOL_OK) << failure();
}

TEST(HostPlan, WhatTheKernelLeavesNoRoomForOverflowsToTheFile) {
  const TemporaryDirectory directory;
  const Host host;
  const Pool pool{host.table(),
                  overflowing(backup_in(CUMEMPOOL_BACKUP_FILE, directory.path().c_str()))};
  const auto a = pool.malloc("a", kSet);
  const auto b = pool.malloc("b", kSet);
  write_pattern(a, kSet, 1);
  write_pattern(b, kSet, 2);
  make_buffers(pool);
  const SmallHost small(kSet);
  ASSERT_EQ(pool.sleep({{{"a", kOffload}, {"b", kOffload}}}).status, CUMEMPOOL_OK) << failure();
  EXPECT_EQ(pool.find(a).backup_tier, CUMEMPOOL_BACKUP_PINNED);
  EXPECT_EQ(pool.find(b).backup_tier, CUMEMPOOL_BACKUP_FILE);
  ASSERT_EQ(pool.wake().status, CUMEMPOOL_OK) << failure();
  EXPECT_TRUE(holds_pattern(a, kSet, 1) && holds_pattern(b, kSet, 2));
}

TEST(HostPlan, PageableMemoryIsNoWayOutOfTheKernelsLimit) {
  const Host host;
  const Pool pool{host.table(), overflowing(backup_in(CUMEMPOOL_BACKUP_PAGEABLE))};
  make_buffers(pool);
  pool.malloc("a", kSet);
  pool.malloc("b", kSet);
  const SmallHost small(2 * kSet - kGranule);
  EXPECT_EQ(pool.sleep({{{"a", kOffload}, {"b", kOffload}}}).status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  EXPECT_EQ(pool.snapshot().totals.host_bytes, 0U);
}

TEST(HostPlan, BuffersForCopiesAreRefusedAsWell) {
  const TemporaryDirectory directory;
  const Host host;
  const Pool pool{host};
  must(pool.set_backup("w", backup_in(CUMEMPOOL_BACKUP_FILE, directory.path().c_str())));
  pool.malloc("w", kSet);
  const SmallHost small(kBuffers - kGranule);
  EXPECT_EQ(pool.sleep("w", kOffload).status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  small.leave(kBuffers);
  ASSERT_EQ(pool.sleep("w", kOffload).status, CUMEMPOOL_OK) << failure();
  small.leave(0);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_OUT_OF_HOST_MEMORY) << "the way in has its own";
  EXPECT_EQ(pool.find(pool.snapshot().allocations[0].address).state, CUMEMPOOL_ASLEEP_BACKED_UP);
}

TEST(HostPlan, RetainedBackupsMakeRoomInWhatTheKernelLeaves) {
  const Host host;
  const Pool pool{host.table(), pool_options(0, true)};
  const auto a = pool.malloc("a", kSet);
  const auto b = pool.malloc("b", kSet);
  write_pattern(a, kSet, 1);
  write_pattern(b, kSet, 2);
  must(pool.sleep("a", kOffload).status);
  must(pool.wake().status);
  const SmallHost small(0);
  EXPECT_EQ(pool.sleep("b", kOffload).status, CUMEMPOOL_OK) << failure();
  EXPECT_EQ(pool.find(a).backup_bytes, 0U);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(a, kSet, 1) && holds_pattern(b, kSet, 2));
}

TEST(HostPlan, ASleepThatNeedsNothingMoreAsksForNothing) {
  const Host host;
  const Pool pool{host.table(), pool_options(0, true)};
  const auto a = pool.malloc("a", kSet);
  pool.malloc("kv", kSet);
  write_pattern(a, kSet, 1);
  must(pool.sleep("a", kOffload).status);
  must(pool.wake().status);
  const SmallHost small(0);
  EXPECT_EQ(pool.sleep({{{"a", kOffload}, {"kv", kDiscard}}}).status, CUMEMPOOL_OK) << "clean";
  must(pool.wake().status);
  EXPECT_EQ(pool.sleep("kv", kDiscard).status, CUMEMPOOL_OK);
}

TEST(HostPlan, AViewThatHasToGatherIsRefusedBeforeAPageIsTouched) {
  const Host host;
  const Pool pool{host};
  const auto hole = pool.malloc("hole", kGranule);
  const auto a = pool.malloc("w", kGranule);
  must(pool.sleep({{{"hole", kOffload}, {"w", kOffload}}}).status);
  must(pool.wake({{"hole"}}).status);
  const auto scattered = pool.malloc("s", 2 * kGranule);
  must(pool.sleep("s", kOffload).status);
  const SmallHost small(kGranule);
  const View view(pool.get(), scattered, 2 * kGranule);
  EXPECT_EQ(view.status(), CUMEMPOOL_OUT_OF_HOST_MEMORY);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_OK);
  EXPECT_NE(hole, a);
}

// ---- the limit on pinned memory ----------------------------------------------------------------

cumempool_result (*device_attribute)(void*, int, cumempool_device_attribute, int*);

// Each device on a NUMA node of its own.
cumempool_result attribute_by_node(void* self, int device, cumempool_device_attribute attribute,
                                   int* value) {
  if (attribute == CUMEMPOOL_ATTRIBUTE_HOST_NUMA) {
    *value = device;
    return CUMEMPOOL_RESULT_SUCCESS;
  }
  return device_attribute(self, device, attribute, value);
}

class HostPlanOfTwoNodes : public ::testing::Test {
 protected:
  HostPlanOfTwoNodes() : table(host.table()) {
    device_attribute = table.device_attribute;
    table.device_attribute = attribute_by_node;
  }

  Host host{kDeviceGranules, 2};
  cumempool_driver table;
};

class HostPlanOfTwoNodesWithOverflow : public HostPlanOfTwoNodes,
                                       public ::testing::WithParamInterface<bool> {};

TEST_P(HostPlanOfTwoNodesWithOverflow, RoomNearAnotherNodeIsGivenBackForTheLimit) {
  const Pool pool{table, GetParam() ? overflowing(backup_in(CUMEMPOOL_BACKUP_PAGEABLE), kSet)
                                    : pool_options(kSet)};
  pool.malloc("a", kSet, 0);
  const auto b = pool.malloc("b", kSet, 1);
  write_pattern(b, kSet, 2);
  ASSERT_EQ(pool.sleep("a", kOffload).status, CUMEMPOOL_OK);
  ASSERT_EQ(pool.wake().status, CUMEMPOOL_OK);
  ASSERT_EQ(pool.snapshot().totals.host_bytes, kSet);
  std::uint64_t pinned = 0;
  EXPECT_EQ(pool.prepare({{{"b", kOffload}}}, pinned), CUMEMPOOL_OK) << failure();
  ASSERT_EQ(pool.sleep("b", kOffload).status, CUMEMPOOL_OK) << failure();
  EXPECT_EQ(pool.find(b).backup_tier, CUMEMPOOL_BACKUP_PINNED);
  EXPECT_EQ(pool.snapshot().totals.host_bytes, kSet);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(b, kSet, 2));
}

INSTANTIATE_TEST_SUITE_P(Overflow, HostPlanOfTwoNodesWithOverflow, ::testing::Bool());

TEST_F(HostPlanOfTwoNodes, RoomInUseNearAnotherNodeMakesItOverflow) {
  const Pool pool{table, overflowing(backup_in(CUMEMPOOL_BACKUP_PAGEABLE), kSet)};
  pool.malloc("a", kSet, 0);
  const auto b = pool.malloc("b", kSet, 1);
  const auto c = pool.malloc("c", kGranule, 0);
  must(pool.sleep("a", kOffload).status);
  EXPECT_EQ(pool.sleep({{{"b", kOffload}, {"c", kOffload}}}).status, CUMEMPOOL_OK) << failure();
  EXPECT_EQ(pool.find(b).backup_tier, CUMEMPOOL_BACKUP_PAGEABLE);
  EXPECT_EQ(pool.find(c).backup_tier, CUMEMPOOL_BACKUP_PAGEABLE);
}

TEST_F(HostPlanOfTwoNodes, RetainedBackupsNearAnotherNodeMakeRoom) {
  const Pool pool{table, pool_options(kSet, true)};
  pool.malloc("a", kSet, 0);
  pool.malloc("b", kSet, 1);
  must(pool.sleep("a", kOffload).status);
  must(pool.wake().status);
  EXPECT_EQ(pool.sleep("b", kOffload).status, CUMEMPOOL_OK) << failure();
}

// A live range of an odd number of bytes takes whole pages of the arena.
TEST(HostPlan, BytesAreRoundedAsTheArenaRoundsThem) {
  const Host host;
  const Pool pool{host.table(), overflowing(backup_in(CUMEMPOOL_BACKUP_PAGEABLE), 4096 + 512)};
  const auto a = pool.malloc("w", kGranule);
  const SleepCall call{{{"w", kOffload}}, {{a + 4096 + 512, kGranule - 4096 - 512}}};
  EXPECT_EQ(pool.sleep(call).status, CUMEMPOOL_OK) << failure();
  EXPECT_EQ(pool.find(a).backup_tier, CUMEMPOOL_BACKUP_PAGEABLE);
}

}  // namespace
}  // namespace cumempool::tests
