// Memory whose contents are kept where its tag is discarded, and the margin that allocations leave
// free on a device.
#include <string>

#include "fault_driver.hpp"
#include "host_fixture.hpp"

extern "C" {
void* cumempool_malloc_0(ssize_t bytes, int device, void* stream);
}

namespace cumempool::tests {
namespace {

constexpr cumempool_on_sleep kOffload = CUMEMPOOL_ON_SLEEP_OFFLOAD;
constexpr cumempool_on_sleep kDiscard = CUMEMPOOL_ON_SLEEP_DISCARD;

std::string last_message() { return cumempool_last_error()->message; }

class Preserve : public ::testing::Test {
 protected:
  cumempool_address preserved(const char* tag, std::uint32_t seed) const {
    pool.declare(tag);
    cumempool_address address = 0;
    must(cumempool_malloc_preserved(pool.get(), tag, 0, kGranule, &address));
    write_pattern(address, kGranule, seed);
    return address;
  }

  Host host;
  driver::FaultDriver faults{host.table()};
  Pool pool{faults.table()};
};

TEST_F(Preserve, ContentsOutliveADiscardAndTheOthersDoNot) {
  const cumempool_address kept = preserved("kv", 1);
  const cumempool_address lost = pool.malloc("kv", kGranule);
  write_pattern(lost, kGranule, 2);
  const Outcome slept = pool.sleep("kv", kDiscard);
  ASSERT_EQ(slept.status, CUMEMPOOL_OK);
  EXPECT_EQ(slept.row("kv").backed_up_bytes, kGranule);
  EXPECT_EQ(slept.row("kv").discarded_bytes, kGranule);
  EXPECT_EQ(pool.snapshot().tag("kv").preserved_bytes, kGranule);
  EXPECT_EQ(pool.find(kept).state, CUMEMPOOL_ASLEEP_BACKED_UP);
  EXPECT_EQ(pool.find(lost).state, CUMEMPOOL_ASLEEP_DISCARDED);
  ASSERT_EQ(pool.wake().status, CUMEMPOOL_OK);
  EXPECT_TRUE(holds_pattern(kept, kGranule, 1));
  EXPECT_FALSE(holds_pattern(lost, kGranule, 2));
  expect_exact_numbers(pool, host);
}

TEST_F(Preserve, ADiscardOfWhatSleepsDropsNoPreservedBackup) {
  const cumempool_address kept = preserved("kv", 1);
  const cumempool_address lost = pool.malloc("kv", kGranule);
  ASSERT_EQ(pool.sleep("kv", kOffload).status, CUMEMPOOL_OK);
  SleepCall discard{{{"kv", kDiscard}}};
  discard.drop_backups = true;
  ASSERT_EQ(pool.sleep(discard).status, CUMEMPOOL_OK);
  EXPECT_EQ(pool.find(kept).state, CUMEMPOOL_ASLEEP_BACKED_UP);
  EXPECT_EQ(pool.find(lost).state, CUMEMPOOL_ASLEEP_DISCARDED);
  ASSERT_EQ(pool.wake().status, CUMEMPOOL_OK);
  EXPECT_TRUE(holds_pattern(kept, kGranule, 1));
}

TEST_F(Preserve, R4_ADiscardThatFailsLeavesPreservedContentsAwake) {
  const cumempool_address kept = preserved("kv", 1);
  faults.fail_nth("copy_to_host", 1, 700);
  ASSERT_NE(pool.sleep("kv", kDiscard).status, CUMEMPOOL_OK);
  EXPECT_EQ(pool.find(kept).state, CUMEMPOOL_AWAKE);
  EXPECT_TRUE(holds_pattern(kept, kGranule, 1));
  ASSERT_EQ(pool.sleep("kv", kDiscard).status, CUMEMPOOL_OK);
  ASSERT_EQ(pool.wake().status, CUMEMPOOL_OK);
  EXPECT_TRUE(holds_pattern(kept, kGranule, 1));
  expect_exact_numbers(pool, host);
}

TEST_F(Preserve, GoesForWhatExistsAlreadyAwakeOrAsleep) {
  const cumempool_address awake = pool.malloc("a", kGranule);
  const cumempool_address asleep = pool.malloc("b", kGranule);
  write_pattern(awake, kGranule, 1);
  write_pattern(asleep, kGranule, 2);
  ASSERT_EQ(pool.sleep("b", kOffload).status, CUMEMPOOL_OK);
  must(cumempool_preserve(pool.get(), awake + kGranule - 1));
  must(cumempool_preserve(pool.get(), asleep));
  SleepCall discard{{{"a", kDiscard}, {"b", kDiscard}}};
  discard.drop_backups = true;
  ASSERT_EQ(pool.sleep(discard).status, CUMEMPOOL_OK);
  ASSERT_EQ(pool.wake().status, CUMEMPOOL_OK);
  EXPECT_TRUE(holds_pattern(awake, kGranule, 1));
  EXPECT_TRUE(holds_pattern(asleep, kGranule, 2));
  EXPECT_EQ(pool.find(awake).preserved, 1U);
}

TEST_F(Preserve, IsRefusedForMemoryOfOthers) {
  const Pool other(host);
  const cumempool_address address = other.malloc("kv", kGranule);
  EXPECT_EQ(cumempool_preserve(pool.get(), address), CUMEMPOOL_NOT_OWNED);
  EXPECT_EQ(cumempool_preserve(pool.get(), 1), CUMEMPOOL_NOT_OWNED);
  EXPECT_EQ(other.find(address).preserved, 0U);
}

TEST_F(Preserve, PrepareCountsIt) {
  preserved("kv", 1);
  pool.malloc("kv", kGranule);
  std::uint64_t pinned = 0;
  must(pool.prepare({{{"kv", kDiscard}}}, pinned));
  EXPECT_GE(pinned, kGranule);
  const std::uint64_t before = pool.snapshot().totals.host_bytes;
  ASSERT_EQ(pool.sleep("kv", kDiscard).status, CUMEMPOOL_OK);
  EXPECT_EQ(pool.snapshot().totals.host_bytes, before);
}

TEST_F(Preserve, ASlotPreservesUntilItIsUnbound) {
  pool.declare("kv");
  for (const bool preserves : {true, false}) {
    std::uint32_t slot = 9;
    must(cumempool_bind_slot(pool.get(), "kv", &slot));
    ASSERT_EQ(slot, 0U);
    if (preserves) must(cumempool_preserve_slot(slot));
    const auto address = reinterpret_cast<std::uintptr_t>(cumempool_malloc_0(1, 0, nullptr));
    EXPECT_EQ(pool.find(address).preserved, preserves ? 1U : 0U);
    must(cumempool_unbind_slot(slot));
  }
  EXPECT_EQ(cumempool_preserve_slot(0), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_preserve_slot(64), CUMEMPOOL_INVALID_ARGUMENT);
}

TEST_F(Preserve, ArgumentsAreChecked) {
  cumempool_address address = 0;
  pool.declare("kv");
  EXPECT_EQ(cumempool_malloc_preserved(nullptr, "kv", 0, 1, &address), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_malloc_preserved(pool.get(), nullptr, 0, 1, &address),
            CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_malloc_preserved(pool.get(), "kv", 0, 1, nullptr),
            CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_malloc_preserved(pool.get(), "no", 0, 1, &address), CUMEMPOOL_UNKNOWN_TAG);
  EXPECT_EQ(cumempool_preserve(nullptr, 1), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_set_memory_margin(nullptr, 1), CUMEMPOOL_INVALID_ARGUMENT);
}

// ---- the margin ---------------------------------------------------------------------------------

class Margin : public ::testing::Test {
 protected:
  Host host{4};  // granules
  Pool pool{host};
};

TEST_F(Margin, StaysFreeAndRefusedAllocationsHoldNothing) {
  must(cumempool_set_memory_margin(pool.get(), 2 * kGranule));
  pool.malloc("a", 2 * kGranule);
  cumempool_address address = 0;
  EXPECT_EQ(pool.try_malloc("a", 1, 0, address), CUMEMPOOL_OUT_OF_MEMORY);
  EXPECT_NE(last_message().find("memory margin of 128.00 KiB"), std::string::npos)
      << last_message();
  EXPECT_EQ(cumempool_last_error()->free_bytes, 2 * kGranule);
  EXPECT_EQ(cumempool_last_error()->bytes, kGranule);
  EXPECT_EQ(pool.snapshot().totals.physical_bytes, 2 * kGranule);
  EXPECT_EQ(pool.snapshot().totals.malloc_failures, 1U);
  must(cumempool_set_memory_margin(pool.get(), 2 * kGranule - 1));
  EXPECT_EQ(pool.try_malloc("a", 1, 0, address), CUMEMPOOL_OUT_OF_MEMORY);
  must(cumempool_set_memory_margin(pool.get(), kGranule));
  pool.malloc("a", 1);
  must(cumempool_set_memory_margin(pool.get(), 0));
  pool.malloc("a", 1);
  EXPECT_EQ(pool.try_malloc("a", 1, 0, address), CUMEMPOOL_OUT_OF_MEMORY);
}

TEST_F(Margin, R1_GoesForSlotsAndLeavesNoErrorBehind) {
  pool.declare("a");
  std::uint32_t slot = 9;
  must(cumempool_bind_slot(pool.get(), "a", &slot));
  ASSERT_EQ(slot, 0U);
  must(cumempool_set_memory_margin(pool.get(), 4 * kGranule));
  EXPECT_EQ(cumempool_malloc_0(1, 0, nullptr), nullptr);
  EXPECT_NE(pool.snapshot().last_malloc_failure.find("memory margin"), std::string::npos);
  must(cumempool_set_memory_margin(pool.get(), 3 * kGranule));
  EXPECT_NE(cumempool_malloc_0(1, 0, nullptr), nullptr);
  must(cumempool_unbind_slot(slot));
}

TEST_F(Margin, DoesNotKeepMemoryFromWaking) {
  pool.malloc("a", 3 * kGranule);
  ASSERT_EQ(pool.sleep("a", kOffload).status, CUMEMPOOL_OK);
  must(cumempool_set_memory_margin(pool.get(), 4 * kGranule));
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_OK);
}

TEST_F(Margin, LargerThanTheDeviceRefusesAll) {
  must(cumempool_set_memory_margin(pool.get(), UINT64_MAX));
  pool.declare("a");
  cumempool_address address = 0;
  EXPECT_EQ(pool.try_malloc("a", 1, 0, address), CUMEMPOOL_OUT_OF_MEMORY);
}

}  // namespace
}  // namespace cumempool::tests
