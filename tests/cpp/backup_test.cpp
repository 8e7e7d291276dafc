// The contents of one allocation in host memory: saved in pieces, restored any number of times.
#include "backup/backup.hpp"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "backup/copy_queue.hpp"
#include "driver/fault_driver.hpp"
#include "host_fixture.hpp"
#include "vmm/allocation.hpp"

namespace cumempool::tests {
namespace {

using backup::Backup;
using backup::CopyQueue;
using backup::PinnedArena;
using driver::Driver;
using driver::FaultDriver;

class BackupTest : public ::testing::Test {
 protected:
  static constexpr std::size_t kBytes = 4 * kGranule;

  void SetUp() override {
    memory.map();
    write_pattern(memory.address(), kBytes, 1);
  }
  void TearDown() override { arena.trim(0); }

  Host host;
  FaultDriver faults{host.table()};
  Driver table{faults.table()};
  driver::RetainedContext context{table, 0};
  driver::ContextScope scope{table, 0};
  vmm::Ledger ledger;
  vmm::Allocation memory{table, ledger, {0, 0, 0, 0}, kBytes};
  PinnedArena arena{table, 0};
  CopyQueue queue{table, 0};
};

TEST_F(BackupTest, HoldsTheContentsOnceTheQueueWasWaitedFor) {
  Backup saved(arena);
  saved.save(queue, memory.address(), {{0, kBytes}});
  queue.drain();
  write_pattern(memory.address(), kBytes, 2);
  for (int round = 0; round < 2; ++round) {  // it stays as it is
    write_pattern(memory.address(), kBytes, 2);
    saved.restore(queue, memory.address());
    queue.drain();
    EXPECT_TRUE(holds_pattern(memory.address(), kBytes, 1));
  }
  EXPECT_EQ(saved.bytes(), kBytes);
}

TEST_F(BackupTest, R9_TakesOnlyTheExtentsItWasGiven) {
  Backup saved(arena);
  saved.save(queue, memory.address(), {{0, 100}, {kGranule, 3}, {kBytes - 1, 1}});
  queue.drain();
  EXPECT_EQ(saved.bytes(), 104U);
  EXPECT_EQ(arena.used_bytes(), 104U);
  write_pattern(memory.address(), kBytes, 2);
  saved.restore(queue, memory.address());
  queue.drain();
  EXPECT_TRUE(holds_pattern(memory.address(), 0, 100, 1));
  EXPECT_TRUE(holds_pattern(memory.address(), 100, kGranule - 100, 2));
  EXPECT_TRUE(holds_pattern(memory.address(), kGranule, 3, 1));
  EXPECT_TRUE(holds_pattern(memory.address(), kGranule + 3, kBytes - kGranule - 4, 2));
  EXPECT_TRUE(holds_pattern(memory.address(), kBytes - 1, 1, 1));
}

TEST_F(BackupTest, MayBeScatteredOverManyBlocks) {
  std::vector<backup::HostSpan> holes;
  holes.reserve(3);
  for (int i = 0; i < 3; ++i) holes.push_back(arena.acquire(0, kGranule));
  for (const auto& hole : holes) arena.release(hole);
  ASSERT_EQ(host.counters().registrations, 3U);
  Backup saved(arena);
  saved.save(queue, memory.address(), {{1, kBytes - 1}});
  queue.drain();
  EXPECT_EQ(host.counters().registrations, 4U) << "three blocks that were there, and the rest";
  write_pattern(memory.address(), kBytes, 2);
  saved.restore(queue, memory.address());
  queue.drain();
  EXPECT_TRUE(holds_pattern(memory.address(), 1, kBytes - 1, 1));
}

TEST_F(BackupTest, R13_GivesItsMemoryBackOnceHoweverOftenItMoves) {
  {
    Backup first(arena);
    first.save(queue, memory.address(), {{0, kBytes}});
    queue.drain();
    const Backup second = std::move(first);
    EXPECT_EQ(second.bytes(), kBytes);
    EXPECT_EQ(arena.used_bytes(), kBytes);
  }
  EXPECT_EQ(arena.used_bytes(), 0U);
}

TEST_F(BackupTest, R13_ASaveThatFailsHalfwayGivesItsMemoryBack) {
  for (const char* entry : {"host_register", "copy_to_host"}) {
    {
      Backup saved(arena);
      faults.fail_nth(entry, entry == std::string("copy_to_host") ? 2 : 1,
                      CUMEMPOOL_RESULT_OUT_OF_MEMORY);
      EXPECT_THROW(saved.save(queue, memory.address(), {{0, kGranule}, {2 * kGranule, kGranule}}),
                   Error)
          << entry;
      queue.drain();
    }
    EXPECT_EQ(arena.used_bytes(), 0U) << entry;
  }
}

}  // namespace
}  // namespace cumempool::tests
