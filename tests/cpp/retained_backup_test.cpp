// Backups that are kept while awake: what the next sleep copies, and when they are given up.
#include <atomic>
#include <string>
#include <vector>

#include "fault_driver.hpp"
#include "host_fixture.hpp"
#include "temporary_directory.hpp"

namespace cumempool::tests {
namespace {

using driver::FaultDriver;

constexpr std::size_t kSlice = std::size_t{1} << 20;
constexpr cumempool_result kNotSupported = CUMEMPOOL_RESULT_NOT_SUPPORTED;

class RetainedBackup : public ::testing::Test {
 protected:
  static constexpr std::size_t kBytes = 4 * kSlice + kGranule;

  void SetUp() override {
    address = pool.malloc("weights", kBytes);
    write_pattern(address, kBytes, 1);
  }

  Outcome sleep(const std::vector<cumempool_extent>& dead = {}) const {
    faults_.reset_counts();
    return pool.sleep({{{"weights", kOffload}}, dead});
  }
  // Sleeps and wakes once, so that a backup is kept.
  void retain() const {
    must(sleep().status);
    must(pool.wake().status);
  }
  std::uint64_t copies() const { return faults_.calls("copy_to_host"); }
  // Wakes, and checks that it all came back.
  void expect_whole() const {
    must(pool.wake().status);
    EXPECT_TRUE(holds_pattern(address, kBytes, 1));
    expect_exact_numbers(pool, host);
  }

  Host host{256};
  mutable FaultDriver faults_{host.table()};
  Pool pool{faults_.table(), pool_options(0, true)};
  cumempool_address address = 0;
};

// ---- what is copied ----------------------------------------------------------------------------

TEST_F(RetainedBackup, ASecondSleepWithoutAChangeCopiesNothing) {
  const Outcome first = sleep();
  EXPECT_EQ(first.row("weights").backed_up_bytes, kBytes);
  EXPECT_EQ(first.row("weights").clean_bytes, 0U);
  for (int cycle = 0; cycle < 3; ++cycle) {
    must(pool.wake().status);
    EXPECT_EQ(pool.find(address).backup_bytes, kBytes) << "kept while awake";
    EXPECT_EQ(pool.snapshot().tag("weights").retained_bytes, kBytes);
    EXPECT_EQ(pool.snapshot().tag("weights").backup_bytes, 0U);
    expect_exact_numbers(pool, host);
    const Outcome again = sleep();
    EXPECT_EQ(again.row("weights").backed_up_bytes, kBytes);
    EXPECT_EQ(again.row("weights").clean_bytes, kBytes);
    EXPECT_EQ(again.row("weights").freed_bytes, kBytes);
    EXPECT_TRUE(again.problems.empty());
    EXPECT_EQ(copies(), 0U);
    EXPECT_EQ(pool.snapshot().tag("weights").retained_bytes, 0U);
    EXPECT_EQ(pool.snapshot().tag("weights").backup_bytes, kBytes);
  }
  expect_whole();
}

TEST_F(RetainedBackup, OneChangedByteCopiesOneSlice) {
  retain();
  for (const std::size_t changed : {std::size_t{0}, 2 * kSlice - 1, kBytes - 1}) {
    bytes_at(address)[changed] ^= 1U;
    const Outcome again = sleep();
    const std::size_t slice = changed >= 4 * kSlice ? kGranule : kSlice;
    EXPECT_EQ(again.row("weights").clean_bytes, kBytes - slice) << changed;
    EXPECT_EQ(copies(), 1U);
    must(pool.wake().status);
    bytes_at(address)[changed] ^= 1U;
    EXPECT_TRUE(holds_pattern(address, kBytes, 1));
    EXPECT_EQ(sleep().row("weights").clean_bytes, kBytes - slice) << "changed back";
    expect_whole();
  }
}

// Something writes between the digest and the copy. The backup holds what was copied, and the next
// sleep must not take that for what the digest is of.
TEST_F(RetainedBackup, R2_ADigestIsThatOfTheBytesThatWereCopied) {
  const TemporaryDirectory directory;
  for (const auto& policy :
       {backup_in(CUMEMPOOL_BACKUP_PINNED), backup_in(CUMEMPOOL_BACKUP_PAGEABLE),
        backup_in(CUMEMPOOL_BACKUP_FILE, directory.path().c_str())}) {
    SCOPED_TRACE(policy.tier);
    must(pool.set_backup("weights", policy));
    retain();
    write_pattern(address + kSlice, kSlice, 5);
    std::atomic<bool> written{false};
    faults_.observe([&](const char* entry) {
      if (std::string(entry) != "copy_to_host" || written.exchange(true)) return;
      write_pattern(address + kSlice, kSlice, 9);
    });
    const Outcome torn = sleep();
    faults_.observe(nullptr);
    ASSERT_TRUE(written);
    ASSERT_EQ(torn.problems.size(), 1U);
    EXPECT_NE(torn.problems[0].find("1.00 MiB of tag 'weights' on device 0 changed"),
              std::string::npos)
        << torn.problems[0];
    must(pool.wake().status);
    EXPECT_TRUE(holds_pattern(address + kSlice, kSlice, 9));
    write_pattern(address + kSlice, kSlice, 5);
    const Outcome next = sleep();
    EXPECT_EQ(next.row("weights").clean_bytes, kBytes - kSlice);
    EXPECT_TRUE(next.problems.empty());
    must(pool.wake().status);
    EXPECT_TRUE(holds_pattern(address + kSlice, kSlice, 5)) << "what was put to sleep";
    EXPECT_EQ(sleep().row("weights").clean_bytes, kBytes) << "and now it is known";
    must(pool.wake().status);
    write_pattern(address, kBytes, 1);
  }
}

TEST_F(RetainedBackup, ADigestBehindTheCopyThatFailsCostsACopyAndNothingElse) {
  retain();
  write_pattern(address, kSlice, 2);
  faults_.reset_counts();
  faults_.fail_nth("digest", 2, kNotSupported);
  const Outcome torn = pool.sleep("weights", kOffload);
  EXPECT_EQ(torn.status, CUMEMPOOL_OK);
  ASSERT_EQ(torn.problems.size(), 1U);
  EXPECT_NE(torn.problems[0].find("behind their copies"), std::string::npos) << torn.problems[0];
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(address, kSlice, 2));
  EXPECT_EQ(sleep().row("weights").clean_bytes, 0U) << "all of it is copied";
  must(pool.wake().status);
  EXPECT_EQ(sleep().row("weights").clean_bytes, kBytes);
}

TEST_F(RetainedBackup, AllocationsAreJudgedOneByOne) {
  const auto other = pool.malloc("weights", kSlice, 1);
  const auto later = pool.malloc("weights", kSlice);
  write_pattern(other, kSlice, 2);
  write_pattern(later, kSlice, 3);
  retain();
  write_pattern(other, kSlice, 4);
  const auto newest = pool.malloc("weights", kGranule);
  write_pattern(newest, kGranule, 5);
  const Outcome again = sleep();
  EXPECT_EQ(again.row("weights", 0).backed_up_bytes, kBytes + kSlice + kGranule);
  EXPECT_EQ(again.row("weights", 0).clean_bytes, kBytes + kSlice);
  EXPECT_EQ(again.row("weights", 1).clean_bytes, 0U);
  expect_whole();
  EXPECT_TRUE(holds_pattern(other, kSlice, 4));
  EXPECT_TRUE(holds_pattern(later, kSlice, 3));
  EXPECT_TRUE(holds_pattern(newest, kGranule, 5));
}

TEST_F(RetainedBackup, R9_OtherLiveBytesNeedANewBackup) {
  retain();
  const std::vector<cumempool_extent> dead{{address + kSlice, kSlice}};
  EXPECT_EQ(sleep(dead).row("weights").clean_bytes, 0U);
  must(pool.wake().status);
  write_pattern(address, kBytes, 1);
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, kBytes - kSlice);
  EXPECT_EQ(sleep(dead).row("weights").clean_bytes, kBytes - kSlice) << "the dead part matters not";
  must(pool.wake().status);
  write_pattern(address, kBytes, 1);
  EXPECT_EQ(sleep().row("weights").clean_bytes, 0U);
  expect_whole();
}

TEST_F(RetainedBackup, WithoutRetainingEverySleepCopiesAll) {
  const Pool plain(host);
  const auto other = plain.malloc("weights", kSlice);
  write_pattern(other, kSlice, 1);
  for (int cycle = 0; cycle < 2; ++cycle) {
    EXPECT_EQ(plain.sleep("weights", kOffload).row("weights").clean_bytes, 0U);
    must(plain.wake().status);
    EXPECT_EQ(plain.snapshot().totals.host_used_bytes, 0U);
    EXPECT_EQ(plain.snapshot().totals.staging_bytes, 0U) << "and no memory for digests";
  }
}

TEST_F(RetainedBackup, PrepareCountsWhatIsKept) {
  std::uint64_t pinned = 7;
  const SleepCall call{{{"weights", kOffload}}};
  must(pool.prepare(call, pinned));
  EXPECT_GE(pinned, kBytes);
  retain();
  must(pool.prepare(call, pinned));
  EXPECT_EQ(pinned, 0U);
  SleepCall other = call;
  other.dead = {{address, kSlice}};
  must(pool.prepare(other, pinned));
  EXPECT_GT(pinned, 0U) << "that needs another backup";
}

TEST_F(RetainedBackup, PrepareMakesRoomWhereTheTierHasChanged) {
  retain();
  must(pool.set_backup("weights", backup_in(CUMEMPOOL_BACKUP_PAGEABLE)));
  std::uint64_t pinned = 7;
  must(pool.prepare({{{"weights", kOffload}}}, pinned));
  EXPECT_EQ(pinned, 0U);
  EXPECT_GE(pool.snapshot().totals.pageable_bytes, kBytes);
}

// ---- when they are given up --------------------------------------------------------------------

TEST_F(RetainedBackup, ADiscardDropsIt) {
  retain();
  must(pool.sleep("weights", kDiscard).status);
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, 0U);
  EXPECT_EQ(pool.find(address).state, CUMEMPOOL_ASLEEP_DISCARDED);
  must(pool.wake().status);
  write_pattern(address, kBytes, 1);
  EXPECT_EQ(sleep().row("weights").clean_bytes, 0U);
  expect_whole();
}

TEST_F(RetainedBackup, ReleasingHostMemoryDropsThoseOfWhatIsAwakeOnly) {
  const auto asleep = pool.malloc("kv", kSlice);
  write_pattern(asleep, kSlice, 2);
  retain();
  must(pool.sleep("kv", kOffload).status);
  EXPECT_GT(pool.release_host_memory(), 0U);
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, kSlice);
  EXPECT_EQ(pool.snapshot().totals.staging_bytes, 0U);
  EXPECT_EQ(sleep().row("weights").clean_bytes, 0U);
  expect_whole();
  EXPECT_TRUE(holds_pattern(asleep, kSlice, 2));
}

TEST_F(RetainedBackup, R6_FreeingWhileAwakeGivesItBack) {
  retain();
  must(cumempool_free(address));
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, 0U);
  EXPECT_EQ(host.counters().reserved_bytes, 0U);
  EXPECT_GE(pool.release_host_memory(), kBytes);
}

TEST_F(RetainedBackup, GivesWayToBackupsThatTheLimitLeavesNoRoomFor) {
  const Pool limited(faults_.table(), pool_options(3 * kSlice, true));
  const auto kept = limited.malloc("kept", 2 * kSlice);
  const auto other = limited.malloc("other", 2 * kSlice);
  write_pattern(kept, 2 * kSlice, 1);
  write_pattern(other, 2 * kSlice, 2);
  must(limited.sleep("kept", kOffload).status);
  must(limited.wake().status);
  EXPECT_EQ(limited.snapshot().tag("kept").retained_bytes, 2 * kSlice);
  must(limited.sleep("other", kOffload).status);
  EXPECT_EQ(limited.snapshot().tag("kept").retained_bytes, 0U);
  EXPECT_EQ(limited.sleep("kept", kOffload).status, CUMEMPOOL_OUT_OF_HOST_MEMORY)
      << "what sleeps does not give way";
  EXPECT_TRUE(holds_pattern(kept, 2 * kSlice, 1));
  must(limited.wake().status);
  EXPECT_TRUE(holds_pattern(other, 2 * kSlice, 2));
  must(limited.sleep("kept", kOffload).status);
  must(limited.wake().status);
  EXPECT_TRUE(holds_pattern(kept, 2 * kSlice, 1));
}

TEST_F(RetainedBackup, ItsOwnRoomCountsForItsSuccessor) {
  cumempool_allocator_options options = pool_options(2 * kSlice, true);
  options.overflow = backup_in(CUMEMPOOL_BACKUP_PAGEABLE);
  const Pool limited(faults_.table(), options);
  const auto kept = limited.malloc("kept", 2 * kSlice);
  must(limited.sleep("kept", kOffload).status);
  must(limited.wake().status);
  must(limited.sleep({{{"kept", kOffload}}, {{kept, 512}}}).status);
  EXPECT_EQ(limited.find(kept).backup_tier, CUMEMPOOL_BACKUP_PINNED);
}

TEST_F(RetainedBackup, AWritableViewEndsIt) {
  must(sleep().status);
  {
    const View view(pool.get(), address, 1, true);
    must(view.status());
    view.data()[0] ^= 0xFFU;
  }
  must(pool.wake().status);
  EXPECT_EQ(pool.snapshot().tag("weights").retained_bytes, 0U);
  bytes_at(address)[0] ^= 0xFFU;
  EXPECT_EQ(sleep().row("weights").clean_bytes, 0U);
  expect_whole();
}

TEST_F(RetainedBackup, AViewThatIsStillOpenKeepsItsBytes) {
  must(sleep().status);
  const View view(pool.get(), address, kBytes);
  must(view.status());
  must(pool.wake().status);
  write_pattern(address, kBytes, 2);
  EXPECT_EQ(sleep().row("weights").clean_bytes, 0U);
  EXPECT_TRUE(holds_pattern(view.address(), kBytes, 1)) << "the sleep saved elsewhere";
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(address, kBytes, 2));
}

TEST_F(RetainedBackup, EveryTierCanBeKept) {
  const TemporaryDirectory directory;
  const std::vector<cumempool_backup_policy> policies{
      backup_in(CUMEMPOOL_BACKUP_PAGEABLE),
      backup_in(CUMEMPOOL_BACKUP_FILE, directory.path().c_str()),
      backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, 1)};
  for (const cumempool_backup_policy& policy : policies) {
    must(pool.set_backup("weights", policy));
    EXPECT_EQ(sleep().row("weights").clean_bytes, 0U) << policy.tier << ": another place";
    must(pool.wake().status);
    EXPECT_EQ(pool.find(address).backup_tier, policy.tier);
    bytes_at(address)[kSlice] ^= 1U;
    EXPECT_EQ(sleep().row("weights").clean_bytes, kBytes - kSlice) << policy.tier;
    must(pool.wake().status);
    bytes_at(address)[kSlice] ^= 1U;
    EXPECT_TRUE(holds_pattern(address, kBytes, 1)) << policy.tier;
    expect_exact_numbers(pool, host);
  }
}

// ---- more slices than one launch takes
// ------------------------------------------------------------

// Small allocations, so many that digests are computed in several launches.
class ManySlices : public ::testing::TestWithParam<cumempool_backup_tier> {
 protected:
  static constexpr std::size_t kCount = 2000;

  void SetUp() override {
    for (std::size_t i = 0; i < kCount; ++i) {
      addresses.push_back(pool.malloc("weights", kGranule));
      write_pattern(addresses[i], kGranule, static_cast<std::uint32_t>(i));
    }
    must(pool.set_backup("weights", backup_in(GetParam(), nullptr, 1)));
  }

  // Puts all to sleep, wakes it, and returns the clean bytes.
  std::uint64_t cycle(std::size_t problems = 0) {
    faults_.reset_counts();
    const Outcome outcome = pool.sleep({{{"weights", kOffload}}, {}});
    EXPECT_EQ(outcome.status, CUMEMPOOL_OK);
    EXPECT_EQ(outcome.problems.size(), problems);
    must(pool.wake().status);
    expect_exact_numbers(pool, host);
    return outcome.row("weights").clean_bytes;
  }

  void expect_patterns() const {
    for (std::size_t i = 0; i < kCount; ++i) {
      EXPECT_TRUE(holds_pattern(addresses[i], kGranule, static_cast<std::uint32_t>(i))) << i;
    }
  }

  Host host{kCount + 16};
  FaultDriver faults_{host.table()};
  Pool pool{faults_.table(), pool_options(0, true)};
  std::vector<cumempool_address> addresses;
};

TEST_P(ManySlices, EachIsJudgedByItsOwnDigest) {
  EXPECT_EQ(cycle(), 0U);
  EXPECT_GT(faults_.calls("digest"), 2U);
  EXPECT_EQ(cycle(), kCount * kGranule);
  for (const std::size_t changed : {std::size_t{0}, std::size_t{511}, std::size_t{512},
                                    std::size_t{1024}, std::size_t{1600}, kCount - 1}) {
    write_pattern(addresses[changed], kGranule, 7777);
    EXPECT_EQ(cycle(), (kCount - 1) * kGranule) << changed;
    EXPECT_TRUE(holds_pattern(addresses[changed], kGranule, 7777));
    write_pattern(addresses[changed], kGranule, static_cast<std::uint32_t>(changed));
    EXPECT_EQ(cycle(), (kCount - 1) * kGranule) << changed << ", changed back";
  }
  expect_patterns();
}

TEST_P(ManySlices, WhereALaterLaunchFailsTheRestIsCopied) {
  cycle();
  faults_.fail_nth("digest", 4, kNotSupported);  // launched when some have been judged already
  const std::uint64_t clean = cycle(1);
  EXPECT_GT(clean, 0U);
  EXPECT_LT(clean, kCount * kGranule);
  expect_patterns();
  EXPECT_EQ(cycle(), 0U) << "there was nothing to compare with";
  EXPECT_EQ(cycle(), kCount * kGranule);
  expect_patterns();
}

TEST_P(ManySlices, WhereALaterLaunchOfTheFirstSleepFailsNothingIsLost) {
  faults_.fail_nth("digest", 3, kNotSupported);
  EXPECT_EQ(cycle(1), 0U);
  expect_patterns();
  EXPECT_EQ(cycle(), 0U);
  EXPECT_EQ(cycle(), kCount * kGranule);
}

INSTANTIATE_TEST_SUITE_P(Tiers, ManySlices,
                         ::testing::Values(CUMEMPOOL_BACKUP_PINNED, CUMEMPOOL_BACKUP_PEER));

// ---- digests that cannot be had ----------------------------------------------------------------

TEST_F(RetainedBackup, WithoutDigestsAllIsCopiedAndTheReportSaysSo) {
  faults_.fail_nth("digest", 1, kNotSupported, FaultDriver::Repeat::kFromThenOn);
  for (int cycle = 0; cycle < 2; ++cycle) {
    const Outcome outcome = sleep();
    ASSERT_EQ(outcome.status, CUMEMPOOL_OK);
    EXPECT_EQ(outcome.row("weights").clean_bytes, 0U);
    EXPECT_EQ(outcome.row("weights").backed_up_bytes, kBytes);
    ASSERT_EQ(outcome.problems.size(), 1U);
    EXPECT_NE(outcome.problems.front().find("could not be compared"), std::string::npos);
    EXPECT_NE(outcome.problems.front().find("CUDA_ERROR_NOT_SUPPORTED"), std::string::npos);
    must(pool.wake().status);
    EXPECT_EQ(pool.snapshot().totals.host_used_bytes, 0U) << "it would be of no use";
    EXPECT_TRUE(holds_pattern(address, kBytes, 1));
  }
}

TEST_F(RetainedBackup, ADigestThatFailsOnceCostsACopyAndNothingElse) {
  for (const cumempool_result result : {kNotSupported, 719, 2}) {
    retain();
    write_pattern(address, kBytes, 1);
    faults_.fail_nth("digest", 1, result);
    const Outcome outcome = sleep();
    ASSERT_EQ(outcome.status, CUMEMPOOL_OK) << result;
    EXPECT_EQ(outcome.row("weights").clean_bytes, 0U);
    EXPECT_EQ(outcome.problems.size(), 1U);
    expect_whole();
    must(sleep().status);
    expect_whole();
    EXPECT_EQ(sleep().row("weights").clean_bytes, kBytes) << "works again";
    expect_whole();
  }
}

TEST_F(RetainedBackup, MemoryForDigestsThatCannotBePinnedCostsACopy) {
  faults_.fail_nth("host_register", 1, 2);
  const Outcome outcome = sleep();
  ASSERT_EQ(outcome.status, CUMEMPOOL_OK) << cumempool_last_error()->message;
  EXPECT_EQ(outcome.problems.size(), 1U);
  expect_whole();
}

TEST_F(RetainedBackup, PrepareIsContentWithoutDigests) {
  faults_.fail_nth("digest", 1, kNotSupported, FaultDriver::Repeat::kFromThenOn);
  std::uint64_t pinned = 0;
  EXPECT_EQ(pool.prepare({{{"weights", kOffload}}}, pinned), CUMEMPOOL_OK);
}

TEST_F(RetainedBackup, R4_ASleepThatFailsWhileItOverwritesForgetsIt) {
  retain();
  write_pattern(address, kBytes, 2);
  faults_.fail_nth("copy_to_host", 1, 719);
  EXPECT_EQ(sleep().status, CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(pool.snapshot().tag("weights").retained_bytes, 0U) << "half of it is new";
  EXPECT_TRUE(holds_pattern(address, kBytes, 2));
  EXPECT_EQ(sleep().row("weights").clean_bytes, 0U);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(address, kBytes, 2));
}

TEST_F(RetainedBackup, R4_AFailedWakeKeepsIt) {
  retain();
  must(sleep().status);
  faults_.fail_nth("copy_to_device", 1, 719);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_DRIVER_ERROR);
  must(pool.wake().status);
  EXPECT_EQ(sleep().row("weights").clean_bytes, kBytes);
  expect_whole();
}

}  // namespace
}  // namespace cumempool::tests
