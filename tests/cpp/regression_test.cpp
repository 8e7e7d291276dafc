// Defects that were found by fuzzing (tests/fuzz), each as the shortest program that shows it.
#include <cstddef>

#include "host_fixture.hpp"

namespace cumempool::tests {
namespace {

constexpr std::size_t kPage = 4096;

// ---- views --------------------------------------------------------------------------------------

// An allocation asleep, with a backup in several pieces: the room of others that woke.
cumempool_address scattered(const Pool& pool, std::size_t bytes) {
  for (int i = 0; i < 8; ++i) {
    pool.malloc(i % 2 == 0 ? "hole" : "rest", kPage);
    pool.malloc("rest", kPage);
  }
  must(pool.sleep({{{"hole", kOffload}, {"rest", kOffload}}}).status);
  must(pool.wake({{"hole"}}).status);
  const cumempool_address address = pool.malloc("next", bytes);
  write_pattern(address, bytes, 1);
  must(pool.sleep("next", kOffload).status);
  return address;
}

// A later view of all of it has the backup gathered into one piece. What was written through the
// earlier one went into the piece that had been left behind.
TEST(Regression, WhatIsWrittenThroughAViewSurvivesALaterViewOfAScatteredBackup) {
  const Host host(kDeviceGranules, 2, kPage);
  const Pool pool(host);
  const cumempool_address address = scattered(pool, 3 * kPage);
  {
    const View part(pool.get(), address, 8, true);
    must(part.status());
    const View all(pool.get(), address, 3 * kPage);
    must(all.status());
    part.data()[0] = 0xEE;
    EXPECT_EQ(all.data()[0], 0xEE);
  }
  must(pool.wake({{"next"}}).status);
  EXPECT_EQ(bytes_at(address)[0], 0xEE);
  EXPECT_TRUE(holds_pattern(address, 1, 3 * kPage - 1, 1));
}

}  // namespace
}  // namespace cumempool::tests
