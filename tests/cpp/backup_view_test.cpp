// Views of the backups of sleeping memory: what they show, how long, and what they keep.
#include <memory>
#include <string>

#include "fault_driver.hpp"
#include "host_fixture.hpp"
#include "temporary_directory.hpp"

namespace cumempool::tests {
namespace {

using driver::FaultDriver;

class BackupView : public ::testing::Test {
 protected:
  static constexpr std::size_t kBytes = 3 * kGranule;

  void SetUp() override {
    address = pool.malloc("weights", kBytes);
    write_pattern(address, kBytes, 1);
  }
  cumempool_status refused(cumempool_address at, std::uint64_t bytes) const {
    return View(pool.get(), at, bytes).status();
  }

  TemporaryDirectory directory;
  Host host;
  FaultDriver faults{host.table()};
  Pool pool{faults.table()};
  cumempool_address address = 0;
};

TEST_F(BackupView, ShowsTheBytesOfSleepingMemoryWithoutACopy) {
  for (const auto& policy :
       {backup_in(CUMEMPOOL_BACKUP_PINNED), backup_in(CUMEMPOOL_BACKUP_PAGEABLE),
        backup_in(CUMEMPOOL_BACKUP_FILE, directory.path().c_str())}) {
    must(pool.set_backup("weights", policy));
    must(pool.sleep("weights", kOffload).status);
    const View all(pool.get(), address, kBytes);
    const View part(pool.get(), address + 100, 10);
    must(all.status());
    must(part.status());
    EXPECT_TRUE(holds_pattern(all.address(), kBytes, 1));
    EXPECT_EQ(part.data(), all.data() + 100);
    must(pool.wake().status);
    EXPECT_TRUE(holds_pattern(address, kBytes, 1));
    write_pattern(address, kBytes, 2);
    EXPECT_TRUE(holds_pattern(all.address(), kBytes, 1)) << "it shows what was restored";
    write_pattern(address, kBytes, 1);
  }
}

TEST_F(BackupView, WhatIsWrittenIsWhatTheWakeRestores) {
  for (const auto& policy :
       {backup_in(CUMEMPOOL_BACKUP_PINNED), backup_in(CUMEMPOOL_BACKUP_PAGEABLE),
        backup_in(CUMEMPOOL_BACKUP_FILE, directory.path().c_str())}) {
    must(pool.set_backup("weights", policy));
    write_pattern(address, kBytes, 1);
    must(pool.sleep("weights", kOffload).status);
    {
      const View view(pool.get(), address + 5, 2, true);
      must(view.status());
      view.data()[0] = view.data()[1] = 0xEE;
    }
    must(pool.wake().status);
    EXPECT_TRUE(all_are(address + 5, 2, 0xEE)) << policy.tier;
    EXPECT_TRUE(holds_pattern(address, 0, 5, 1));
    EXPECT_TRUE(holds_pattern(address, 7, kBytes - 7, 1));
  }
}

TEST_F(BackupView, RefusesWhatHasNoBackupInHostMemory) {
  EXPECT_EQ(refused(address, 1), CUMEMPOOL_INVALID_ARGUMENT) << "awake";
  EXPECT_EQ(refused(1, 1), CUMEMPOOL_NOT_OWNED);
  {
    const Pool other(host);
    EXPECT_EQ(refused(other.malloc("weights", 1), 1), CUMEMPOOL_NOT_OWNED);
  }
  must(pool.sleep("weights", kDiscard).status);
  EXPECT_EQ(refused(address, 1), CUMEMPOOL_INVALID_ARGUMENT) << "discarded";
  must(pool.wake().status);
  must(pool.sleep({{{"weights", kOffload}}, {{address + 512, 512}}}).status);
  EXPECT_EQ(refused(address, 512), CUMEMPOOL_OK);
  EXPECT_EQ(refused(address, 513), CUMEMPOOL_INVALID_ARGUMENT) << "a dead range";
  EXPECT_EQ(refused(address + kBytes - 1, 2), CUMEMPOOL_INVALID_ARGUMENT) << "past the end";
  EXPECT_EQ(refused(address + 1024, UINT64_MAX), CUMEMPOOL_INVALID_ARGUMENT) << "wraps";
  EXPECT_STREQ(cumempool_last_error()->operation, "read_backup");
  EXPECT_EQ(cumempool_view_backup(pool.get(), address, 1, 0, nullptr), CUMEMPOOL_INVALID_ARGUMENT);
  must(pool.wake().status);
  must(pool.set_backup("weights", backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, 1)));
  must(pool.sleep("weights", kOffload).status);
  EXPECT_EQ(refused(address, 1), CUMEMPOOL_UNSUPPORTED);
  cumempool_end_backup_view(nullptr);
}

TEST_F(BackupView, RefusesToLookFromInsideATransition) {
  must(pool.sleep("weights", kOffload).status);
  cumempool_status inside = CUMEMPOOL_OK;
  faults.observe([&](const char* entry) {
    if (std::string(entry) == "copy_to_device") inside = refused(address, 1);
  });
  must(pool.wake().status);
  faults.observe(nullptr);
  EXPECT_EQ(inside, CUMEMPOOL_BUSY);
}

TEST_F(BackupView, KeepsItsHostMemoryUntilItEnds) {
  must(pool.sleep("weights", kOffload).status);
  View view(pool.get(), address, kBytes);
  must(view.status());
  must(pool.wake().status);
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, kBytes);
  EXPECT_EQ(pool.release_host_memory(), 0U);
  EXPECT_TRUE(holds_pattern(view.address(), kBytes, 1));
  view.end();
  EXPECT_EQ(pool.release_host_memory(), kBytes);
  EXPECT_EQ(host.counters().registered_bytes, 0U);
}

TEST_F(BackupView, R6_OutlivesTheMemoryItShows) {
  must(pool.sleep("weights", kOffload).status);
  View view(pool.get(), address, kBytes);
  must(view.status());
  must(cumempool_free(address));
  EXPECT_TRUE(holds_pattern(view.address(), kBytes, 1));
  view.end();
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, 0U);
}

TEST_F(BackupView, CloseIsRefusedWhileOneIsOpen) {
  must(pool.sleep("weights", kOffload).status);
  View view(pool.get(), address, kBytes);
  must(view.status());
  must(cumempool_free(address));
  EXPECT_EQ(pool.close(), CUMEMPOOL_IN_USE);
  EXPECT_NE(std::string(cumempool_last_error()->message).find("1 open view(s)"), std::string::npos)
      << cumempool_last_error()->message;
  view.end();
  EXPECT_EQ(pool.close(), CUMEMPOOL_OK);
}

TEST_F(BackupView, CloseByForceLeavesItsBytesUntilItEnds) {
  must(pool.sleep("weights", kOffload).status);
  View view(pool.get(), address, kBytes);
  must(view.status());
  EXPECT_EQ(pool.close(true), CUMEMPOOL_DRIVER_ERROR) << "not everything could be given back";
  EXPECT_EQ(host.counters().registered_bytes, kBytes);
  EXPECT_TRUE(holds_pattern(view.address(), kBytes, 1));
  view.end();
  EXPECT_EQ(pool.close(), CUMEMPOOL_OK);
  EXPECT_EQ(host.counters().registered_bytes, 0U);
}

TEST_F(BackupView, OutlivesTheAllocator) {
  must(pool.sleep("weights", kOffload).status);
  {
    const View view(pool.get(), address, kBytes);
    must(view.status());
    pool.destroy();
    must(cumempool_free(address));
    EXPECT_TRUE(holds_pattern(view.address(), kBytes, 1));
  }
  host.expect_empty();
}

}  // namespace
}  // namespace cumempool::tests
