// Where backups go: whole sleeps and wakes for every tier, refusals, the overflow, and several
// devices in one transition.
#include <string>
#include <vector>

#include "fault_driver.hpp"
#include "host_fixture.hpp"
#include "temporary_directory.hpp"

namespace cumempool::tests {
namespace {

using driver::FaultDriver;

constexpr std::size_t kMiB = std::size_t{1} << 20;

std::string last_message() { return cumempool_last_error()->message; }

class BackupTiers : public ::testing::Test {
 protected:
  static constexpr std::size_t kBytes = 3 * kMiB + kGranule;

  cumempool_address filled(const char* tag, std::size_t bytes, std::uint32_t seed, int device = 0) {
    const cumempool_address address = pool.malloc(tag, bytes, device);
    write_pattern(address, bytes, seed);
    return address;
  }
  cumempool_backup_policy file() const {
    return backup_in(CUMEMPOOL_BACKUP_FILE, directory.path().c_str());
  }
  cumempool_totals totals() const { return pool.snapshot().totals; }

  TemporaryDirectory directory;
  Host host{256, 3};
  FaultDriver faults{host.table()};
  Pool pool{faults.table()};
};

TEST_F(BackupTiers, R2_EveryTierBringsTheContentsBack) {
  const auto whole = filled("weights", kBytes, 1);
  const auto holes = filled("weights", kBytes, 2);
  const auto elsewhere = filled("weights", kGranule, 3, 1);
  const std::vector<cumempool_extent> dead{{holes + kMiB, 512}, {holes + 2 * kMiB + 512, kMiB}};
  const std::size_t kept = 2 * kBytes + kGranule - kMiB - 512;
  for (const auto& policy :
       {backup_in(CUMEMPOOL_BACKUP_PAGEABLE), file(), backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, 2),
        backup_in(CUMEMPOOL_BACKUP_PINNED)}) {
    must(pool.set_backup("weights", policy));
    EXPECT_EQ(pool.snapshot().tag("weights").backup_tier, policy.tier);
    const Outcome slept = pool.sleep({{{"weights", kOffload}}, dead});
    ASSERT_EQ(slept.status, CUMEMPOOL_OK) << last_message();
    EXPECT_EQ(slept.row("weights").backed_up_bytes + slept.row("weights", 1).backed_up_bytes, kept);
    EXPECT_EQ(pool.find(whole).backup_tier, policy.tier);
    EXPECT_EQ(pool.find(whole).backup_bytes, kBytes);
    EXPECT_EQ(totals().physical_bytes, 0U);
    expect_exact_numbers(pool, host);
    EXPECT_EQ(totals().pageable_bytes >= kept, policy.tier == CUMEMPOOL_BACKUP_PAGEABLE);
    EXPECT_EQ(totals().file_bytes >= kept, policy.tier == CUMEMPOOL_BACKUP_FILE);
    EXPECT_EQ(totals().peer_bytes >= kept, policy.tier == CUMEMPOOL_BACKUP_PEER);
    EXPECT_EQ(totals().host_bytes >= kept, policy.tier == CUMEMPOOL_BACKUP_PINNED);
    const Outcome woken = pool.wake();
    ASSERT_EQ(woken.status, CUMEMPOOL_OK) << last_message();
    EXPECT_EQ(woken.row("weights").restored_bytes + woken.row("weights", 1).restored_bytes, kept);
    EXPECT_TRUE(holds_pattern(whole, kBytes, 1));
    EXPECT_TRUE(holds_pattern(holes, kMiB, 2));
    EXPECT_TRUE(holds_pattern(holes, kMiB + 512, kMiB, 2));
    EXPECT_TRUE(holds_pattern(holes, 3 * kMiB + 512, kGranule - 512, 2));
    EXPECT_TRUE(holds_pattern(elsewhere, kGranule, 3));
    EXPECT_EQ(totals().file_bytes + totals().peer_bytes + totals().host_used_bytes, 0U);
    pool.release_host_memory();
    EXPECT_EQ(totals().pageable_bytes + totals().host_bytes + totals().staging_bytes, 0U);
    write_pattern(holes, kBytes, 2);
  }
  EXPECT_TRUE(directory.empty()) << "the file has no name";
}

TEST_F(BackupTiers, TagsOfOneSleepMayHaveDifferentTiers) {
  const auto pinned = filled("pinned", kBytes, 1);
  const auto pageable = filled("pageable", kBytes, 2);
  const auto filed = filled("file", kBytes, 3);
  const auto peer = filled("peer", kBytes, 4);
  must(pool.set_backup("pageable", backup_in(CUMEMPOOL_BACKUP_PAGEABLE)));
  must(pool.set_backup("file", file()));
  must(pool.set_backup("peer", backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, 1)));
  must(pool.sleep({{{"pinned", kOffload},
                    {"pageable", kOffload},
                    {"file", kOffload},
                    {"peer", kOffload}}})
           .status);
  EXPECT_EQ(host.counters().charged_bytes, totals().peer_bytes);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(pinned, kBytes, 1));
  EXPECT_TRUE(holds_pattern(pageable, kBytes, 2));
  EXPECT_TRUE(holds_pattern(filed, kBytes, 3));
  EXPECT_TRUE(holds_pattern(peer, kBytes, 4));
  EXPECT_GT(totals().staging_bytes, 0U) << "buffers are kept";
  EXPECT_GT(pool.release_host_memory(), kBytes);
  EXPECT_EQ(host.counters().registered_bytes, 0U);
}

TEST_F(BackupTiers, ATierThatChangesWhileAsleepCountsFromTheNextSleepOn) {
  const auto address = filled("weights", kBytes, 1);
  must(pool.sleep("weights", kOffload).status);
  must(pool.set_backup("weights", file()));
  EXPECT_EQ(pool.find(address).backup_tier, CUMEMPOOL_BACKUP_PINNED);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(address, kBytes, 1));
  must(pool.sleep("weights", kOffload).status);
  EXPECT_EQ(pool.find(address).backup_tier, CUMEMPOOL_BACKUP_FILE);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(address, kBytes, 1));
}

TEST_F(BackupTiers, R6_FreeingWhileAsleepGivesTheRoomBack) {
  for (const auto& policy : {backup_in(CUMEMPOOL_BACKUP_PAGEABLE), file(),
                             backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, 1)}) {
    const auto address = filled("weights", kBytes, 1);
    must(pool.set_backup("weights", policy));
    must(pool.sleep("weights", kOffload).status);
    must(cumempool_free(address));
    EXPECT_EQ(totals().file_bytes + totals().peer_bytes, 0U);
    EXPECT_EQ(host.counters().reserved_bytes, 0U);
    pool.release_host_memory();
    EXPECT_EQ(totals().pageable_bytes, 0U);
  }
}

TEST_F(BackupTiers, UnsetLeavesWhatWasSetBefore) {
  must(pool.set_backup("weights", file()));
  must(pool.set_backup("weights", backup_in(CUMEMPOOL_BACKUP_UNSET)));
  EXPECT_EQ(pool.snapshot().tag("weights", -1).backup_tier, CUMEMPOOL_BACKUP_FILE);
}

TEST_F(BackupTiers, PoliciesThatCannotBeAreRefused) {
  const auto refused = [&](const cumempool_backup_policy& policy) {
    return pool.set_backup("weights", policy) == CUMEMPOOL_INVALID_ARGUMENT;
  };
  EXPECT_TRUE(refused(backup_in(static_cast<cumempool_backup_tier>(5))));
  EXPECT_TRUE(refused(backup_in(CUMEMPOOL_BACKUP_FILE)));
  EXPECT_TRUE(refused(backup_in(CUMEMPOOL_BACKUP_FILE, "")));
  EXPECT_TRUE(refused(backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, 3)));
  EXPECT_TRUE(refused(backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, -1)));
  cumempool_backup_policy policy = backup_in(CUMEMPOOL_BACKUP_PINNED);
  policy.size -= 4;
  EXPECT_TRUE(refused(policy));
  EXPECT_EQ(cumempool_set_backup(pool.get(), "weights", nullptr), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_set_backup(pool.get(), "nobody", &policy), CUMEMPOOL_INVALID_ARGUMENT);
  policy.size += 4;
  EXPECT_EQ(cumempool_set_backup(pool.get(), "nobody", &policy), CUMEMPOOL_UNKNOWN_TAG);
  for (const cumempool_backup_tier tier : {CUMEMPOOL_BACKUP_PINNED, CUMEMPOOL_BACKUP_PEER}) {
    cumempool_allocator_options options = pool_options(kMiB);
    options.overflow = backup_in(tier, nullptr, 1);
    cumempool_allocator* allocator = nullptr;
    EXPECT_EQ(cumempool_allocator_create(&host.table(), &options, &allocator),
              CUMEMPOOL_INVALID_ARGUMENT);
    EXPECT_EQ(allocator, nullptr);
  }
  EXPECT_EQ(pool.snapshot().tag("weights", -1).backup_tier, CUMEMPOOL_BACKUP_PINNED);
}

// ---- peers -------------------------------------------------------------------------------------

TEST_F(BackupTiers, APeerThatNoDeviceReachesIsRefused) {
  driver::host_driver_set_peer_access(&host.table(), false);
  EXPECT_EQ(pool.set_backup("weights", backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, 1)),
            CUMEMPOOL_UNSUPPORTED);
  EXPECT_NE(last_message().find("no other device has peer access to device 1"), std::string::npos)
      << last_message();
  driver::host_driver_set_peer_access(&host.table(), true);
  must(pool.set_backup("weights", backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, 1)));
  const auto address = filled("weights", kBytes, 1);
  driver::host_driver_set_peer_access(&host.table(), false);
  EXPECT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_UNSUPPORTED);
  EXPECT_NE(last_message().find("the device has no peer access to device 1"), std::string::npos)
      << last_message();
  std::uint64_t pinned = 0;
  EXPECT_EQ(pool.prepare({{{"weights", kOffload}}}, pinned), CUMEMPOOL_UNSUPPORTED);
  EXPECT_TRUE(holds_pattern(address, kBytes, 1));
  EXPECT_EQ(pool.find(address).state, CUMEMPOOL_AWAKE);
}

TEST_F(BackupTiers, ADeviceIsNotItsOwnPeer) {
  must(pool.set_backup("weights", backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, 0)));
  const auto address = filled("weights", kBytes, 1);
  EXPECT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_UNSUPPORTED);
  EXPECT_NE(last_message().find("cannot back itself up"), std::string::npos) << last_message();
  EXPECT_TRUE(holds_pattern(address, kBytes, 1));
}

TEST_F(BackupTiers, R4_APeerWithoutRoomRefusesTheSleep) {
  must(pool.set_backup("weights", backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, 1)));
  const auto first = filled("weights", kBytes, 1);
  const auto second = filled("weights", kBytes, 2);
  filled("kv", 256 * kGranule - kBytes - kGranule, 3, 1);
  EXPECT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_OUT_OF_MEMORY);
  EXPECT_STREQ(cumempool_last_error()->operation, "sleep");
  EXPECT_EQ(totals().peer_bytes, 0U);
  EXPECT_TRUE(holds_pattern(first, kBytes, 1));
  EXPECT_TRUE(holds_pattern(second, kBytes, 2));
  must(pool.sleep("kv", kDiscard).status);
  must(pool.sleep("weights", kOffload).status);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_OUT_OF_MEMORY) << "the backups are in the way";
  must(pool.wake({{"weights"}}).status);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(first, kBytes, 1));
  EXPECT_TRUE(holds_pattern(second, kBytes, 2));
}

TEST_F(BackupTiers, R13_MemoryOfAPeerThatIsNotTakenBackIsLeakedUntilAllIsAskedFor) {
  must(pool.set_backup("weights", backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, 1)));
  const auto address = filled("weights", kBytes, 1);
  must(pool.sleep("weights", kOffload).status);
  faults.fail_nth("release", 1, 719);  // nothing else is released by a wake
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(address, kBytes, 1));
  EXPECT_EQ(totals().peer_bytes, kBytes);
  EXPECT_EQ(totals().leaked_bytes, kBytes);
  expect_exact_numbers(pool, host);
  faults.reset_counts();
  must(pool.sleep("weights", kOffload).status);
  EXPECT_EQ(faults.calls("unreserve"), 0U);
  must(pool.wake().status);
  EXPECT_EQ(totals().leaked_bytes, kBytes);
  pool.release_host_memory();
  EXPECT_EQ(totals().peer_bytes + totals().leaked_bytes, 0U);
  expect_exact_numbers(pool, host);
}

// ---- files -------------------------------------------------------------------------------------

TEST_F(BackupTiers, ADirectoryThatIsNotThereRefusesTheSleep) {
  const std::string missing = directory.path() + "/missing";
  must(pool.set_backup("weights", backup_in(CUMEMPOOL_BACKUP_FILE, missing.c_str())));
  const auto address = filled("weights", kBytes, 1);
  EXPECT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_BACKUP_FAILED);
  EXPECT_NE(last_message().find(missing), std::string::npos) << last_message();
  EXPECT_TRUE(holds_pattern(address, kBytes, 1));
}

TEST_F(BackupTiers, R4_AFullDiskRefusesTheSleepAndLosesNothing) {
  must(pool.set_backup("weights", file()));
  const auto address = filled("weights", kBytes, 1);
  {
    const FileSizeLimit full(kMiB);
    EXPECT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_BACKUP_FAILED);
  }
  EXPECT_EQ(pool.find(address).state, CUMEMPOOL_AWAKE);
  EXPECT_TRUE(holds_pattern(address, kBytes, 1));
  EXPECT_EQ(totals().file_bytes, 0U);
  must(pool.sleep("weights", kOffload).status);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(address, kBytes, 1));
}

// ---- the limit and its overflow ----------------------------------------------------------------

TEST_F(BackupTiers, WhatTheLimitLeavesNoRoomForGoesToTheOverflow) {
  for (const auto& overflow : {backup_in(CUMEMPOOL_BACKUP_PAGEABLE), file()}) {
    cumempool_allocator_options options = pool_options(4 * kMiB);
    options.overflow = overflow;
    const Pool limited(host.table(), options);
    const auto first = limited.malloc("weights", 3 * kMiB);
    const auto second = limited.malloc("weights", 2 * kMiB);
    const auto third = limited.malloc("weights", kMiB);
    write_pattern(first, 3 * kMiB, 1);
    write_pattern(second, 2 * kMiB, 2);
    write_pattern(third, kMiB, 3);
    const SleepCall call{{{"weights", kOffload}}};
    std::uint64_t pinned = 0;
    must(limited.prepare(call, pinned));
    EXPECT_EQ(pinned, 4 * kMiB);
    must(limited.sleep(call).status);
    EXPECT_EQ(limited.find(first).backup_tier, CUMEMPOOL_BACKUP_PINNED);
    EXPECT_EQ(limited.find(second).backup_tier, overflow.tier);
    EXPECT_EQ(limited.find(third).backup_tier, CUMEMPOOL_BACKUP_PINNED);
    EXPECT_EQ(limited.snapshot().totals.host_bytes, 4 * kMiB);
    must(limited.wake().status);
    EXPECT_TRUE(holds_pattern(first, 3 * kMiB, 1));
    EXPECT_TRUE(holds_pattern(second, 2 * kMiB, 2));
    EXPECT_TRUE(holds_pattern(third, kMiB, 3));
  }
}

TEST_F(BackupTiers, TheLimitIsForPinnedMemoryOnly) {
  cumempool_allocator_options options = pool_options(2 * kMiB, true);
  options.overflow = backup_in(CUMEMPOOL_BACKUP_PAGEABLE);
  const Pool limited(host.table(), options);
  must(limited.set_backup("filed", file()));
  const auto filed = limited.malloc("filed", 3 * kMiB);
  const auto pinned = limited.malloc("weights", 2 * kMiB);
  const auto over = limited.malloc("weights", kMiB);
  write_pattern(filed, 3 * kMiB, 1);
  write_pattern(pinned, 2 * kMiB, 2);
  write_pattern(over, kMiB, 3);
  const SleepCall call{{{"filed", kOffload}, {"weights", kOffload}}};
  std::uint64_t bytes = 0;
  must(limited.prepare(call, bytes));
  EXPECT_EQ(bytes, 2 * kMiB);
  for (int round = 0; round < 2; ++round) {
    const Outcome slept = limited.sleep(call);
    must(slept.status);
    EXPECT_EQ(limited.find(filed).backup_tier, CUMEMPOOL_BACKUP_FILE);
    EXPECT_EQ(limited.find(pinned).backup_tier, CUMEMPOOL_BACKUP_PINNED);
    EXPECT_EQ(limited.find(over).backup_tier, CUMEMPOOL_BACKUP_PAGEABLE);
    const std::uint64_t clean = slept.row("filed").clean_bytes + slept.row("weights").clean_bytes;
    EXPECT_EQ(clean, round == 0 ? 0 : 6 * kMiB) << "every tier is retained, the overflow as well";
    must(limited.wake().status);
    EXPECT_TRUE(holds_pattern(filed, 3 * kMiB, 1));
    EXPECT_TRUE(holds_pattern(pinned, 2 * kMiB, 2));
    EXPECT_TRUE(holds_pattern(over, kMiB, 3));
  }
}

TEST_F(BackupTiers, ReleasingHostMemoryLeavesTheBackupsOfWhatSleeps) {
  const auto filed = filled("filed", kBytes, 1);
  const auto pageable = filled("pageable", kBytes, 2);
  const auto peer = filled("peer", kBytes, 3);
  must(pool.set_backup("filed", file()));
  must(pool.set_backup("pageable", backup_in(CUMEMPOOL_BACKUP_PAGEABLE)));
  must(pool.set_backup("peer", backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, 1)));
  must(pool.sleep({{{"filed", kOffload}, {"pageable", kOffload}, {"peer", kOffload}}}).status);
  pool.release_host_memory();
  EXPECT_GE(totals().file_bytes, kBytes);
  EXPECT_GE(totals().pageable_bytes, kBytes);
  EXPECT_GE(totals().peer_bytes, kBytes);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(filed, kBytes, 1));
  EXPECT_TRUE(holds_pattern(pageable, kBytes, 2));
  EXPECT_TRUE(holds_pattern(peer, kBytes, 3));
}

TEST_F(BackupTiers, WithoutAnOverflowTheLimitRefusesPrepareToo) {
  const Pool limited(host.table(), kMiB);
  const auto address = limited.malloc("weights", 2 * kMiB);
  write_pattern(address, 2 * kMiB, 1);
  std::uint64_t pinned = 7;
  const SleepCall call{{{"weights", kOffload}}};
  EXPECT_EQ(limited.prepare(call, pinned), CUMEMPOOL_OUT_OF_HOST_MEMORY);
  EXPECT_EQ(pinned, 7U);
  EXPECT_EQ(limited.sleep(call).status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  EXPECT_EQ(host.counters().registered_bytes, 0U);
  must(limited.set_backup("weights", backup_in(CUMEMPOOL_BACKUP_PAGEABLE)));
  must(limited.prepare(call, pinned));
  EXPECT_EQ(pinned, 0U) << "pageable memory is not pinned";
  EXPECT_EQ(limited.snapshot().totals.pageable_bytes, 2 * kMiB);
  must(limited.sleep(call).status);
  EXPECT_EQ(limited.snapshot().totals.pageable_bytes, 2 * kMiB) << "it was prepared";
  must(limited.wake().status);
  EXPECT_TRUE(holds_pattern(address, 2 * kMiB, 1));
}

// ---- several devices ---------------------------------------------------------------------------

TEST_F(BackupTiers, R4_DevicesTakeTurnsInOneTransition) {
  std::vector<cumempool_address> all;
  for (std::uint32_t i = 0; i < 6; ++i) {
    all.push_back(filled("weights", kGranule, i, static_cast<int>(i / 3)));
  }
  // Two streams, so a command that is queued to one device runs beside those of the other.
  std::vector<std::string> calls;
  faults.observe([&](const char* entry) {
    const std::string name = entry;
    if (name == "copy_to_host" || name == "copy_to_device" || name == "release") {
      calls.push_back(name);
    }
  });
  const Outcome slept = pool.sleep("weights", kOffload);
  must(slept.status);
  ASSERT_EQ(calls.size(), 12U);
  EXPECT_EQ(calls[5], "copy_to_host") << "all copies of both are in the queues";
  EXPECT_EQ(calls[6], "release") << "before any memory goes";
  EXPECT_EQ(slept.row("weights", 0).freed_bytes, 3 * kGranule);
  EXPECT_EQ(slept.row("weights", 1).freed_bytes, 3 * kGranule);
  calls.clear();
  must(pool.wake().status);
  faults.observe(nullptr);
  EXPECT_EQ(calls.size(), 6U);
  for (std::uint32_t i = 0; i < 6; ++i) EXPECT_TRUE(holds_pattern(all[i], kGranule, i));
}

}  // namespace
}  // namespace cumempool::tests
