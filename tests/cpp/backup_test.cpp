// The contents of one allocation outside of it: the same promises for every tier, and what only
// host memory can do.
#include "backup/backup.hpp"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backup/bounce_buffers.hpp"
#include "backup/copy_queue.hpp"
#include "backup/file_storage.hpp"
#include "backup/host_storage.hpp"
#include "backup/peer_storage.hpp"
#include "fault_driver.hpp"
#include "host_fixture.hpp"
#include "temporary_directory.hpp"
#include "vmm/allocation.hpp"

namespace cumempool::tests {
namespace {

using backup::Backup;
using backup::BackupFile;
using backup::BackupStorage;
using backup::BounceBuffers;
using backup::CopyQueue;
using backup::Extent;
using backup::HostArena;
using backup::HostBudget;
using backup::HostSpan;
using backup::kSliceBytes;
using driver::Driver;
using driver::FaultDriver;

constexpr std::size_t kUnit = 512;
constexpr std::uint64_t kSeed = 5;

class ImageFixture {
 public:
  static constexpr std::size_t kBytes = 4 * kSliceBytes + kGranule;

  ImageFixture() {
    memory.map();
    write(1);
  }
  ~ImageFixture() {
    faults.fail_nothing();
    staged.release();
    pinned.trim(0);
    pageable.trim(0);
  }
  ImageFixture(const ImageFixture&) = delete;
  ImageFixture& operator=(const ImageFixture&) = delete;

  std::unique_ptr<BackupStorage> place(cumempool_backup_tier tier,
                                       const std::vector<Extent>& extents) {
    std::size_t bytes = 0;
    for (const Extent& extent : extents) bytes += extent.bytes;
    switch (tier) {
      case CUMEMPOOL_BACKUP_PAGEABLE:
        return std::make_unique<backup::HostStorage>(pageable, 0);
      case CUMEMPOOL_BACKUP_FILE:
        return std::make_unique<backup::FileStorage>(file, bytes, extents.size(), kSeed);
      case CUMEMPOOL_BACKUP_PEER:
        return std::make_unique<backup::PeerStorage>(peers, cumempool_memory_properties{1, 0, 0, 0},
                                                     kGranule, 0, bytes);
      default:
        return std::make_unique<backup::HostStorage>(pinned, 0);
    }
  }
  std::unique_ptr<Backup> image(cumempool_backup_tier tier, const std::vector<Extent>& extents) {
    return std::make_unique<Backup>(extents, place(tier, extents));
  }

  void write(std::uint32_t seed) { write_pattern(memory.address(), kBytes, seed); }
  bool holds(std::size_t offset, std::size_t bytes, std::uint32_t seed) const {
    return holds_pattern(memory.address(), offset, bytes, seed);
  }
  void wait() {
    staged.finish();
    queue.drain();
  }
  void save(Backup& image) {
    image.save(transfer, memory.address());
    wait();
  }
  void restore(Backup& image) {
    image.restore(transfer, memory.address());
    wait();
  }
  std::uint64_t used() const {
    return pinned.used_bytes() + pageable.used_bytes() + file.held_bytes() + peers.held_bytes();
  }

  TemporaryDirectory directory;
  Host host{256};
  FaultDriver faults{host.table()};
  Driver table{faults.table()};
  driver::RetainedContext context{table, 0};
  driver::RetainedContext context_of_peer{table, 1};
  driver::ContextScope scope{table, 0};
  vmm::MemoryStats stats;
  vmm::Allocation memory{table, stats, {0, 0, 0, 0}, kBytes};
  HostBudget budget{0};
  HostArena pinned{table, CUMEMPOOL_BACKUP_PINNED, -1, budget};
  HostArena pageable{table, CUMEMPOOL_BACKUP_PAGEABLE, -1, budget};
  BackupFile file{directory.path()};
  backup::PeerMemory peers{table};
  backup::Transfer transfer{table, 0};
  CopyQueue& queue = transfer.queue;
  BounceBuffers& staged = transfer.bounce_buffers;
};

std::string name_of(cumempool_backup_tier tier) {
  switch (tier) {
    case CUMEMPOOL_BACKUP_PAGEABLE:
      return "Pageable";
    case CUMEMPOOL_BACKUP_FILE:
      return "File";
    case CUMEMPOOL_BACKUP_PEER:
      return "Peer";
    default:
      return "Pinned";
  }
}

// ---- every tier --------------------------------------------------------------------------------

class ImageOfAnyTier : public ::testing::TestWithParam<cumempool_backup_tier>,
                       protected ImageFixture {
 protected:
  std::unique_ptr<Backup> image_of(const std::vector<Extent>& extents) {
    return image(GetParam(), extents);
  }
  std::unique_ptr<Backup> whole() { return image_of({{0, kBytes}}); }

  // Three extents with gaps: some slices, part of one, and a slice and a bit more.
  const std::vector<Extent> scattered{
      {0, kUnit}, {kGranule, kSliceBytes + 3 * kUnit}, {kBytes - 2 * kUnit, 2 * kUnit}};
};

TEST_P(ImageOfAnyTier, HoldsTheContentsOnceItWasWaitedFor) {
  const auto saved = whole();
  EXPECT_EQ(saved->tier(), GetParam());
  save(*saved);
  for (int round = 0; round < 2; ++round) {  // it stays as it is
    write(2);
    restore(*saved);
    EXPECT_TRUE(holds(0, kBytes, 1));
  }
  EXPECT_EQ(saved->bytes(), kBytes);
}

TEST_P(ImageOfAnyTier, IsComparedInSlicesThatDoNotCrossExtents) {
  const auto saved = image_of(scattered);
  const auto& slices = saved->slices();
  ASSERT_EQ(slices.size(), 4U);
  EXPECT_EQ(slices[1].offset, kGranule);
  EXPECT_EQ(slices[1].position, kUnit);
  EXPECT_EQ(slices[1].bytes, kSliceBytes);
  EXPECT_EQ(slices[2].offset, kGranule + kSliceBytes);
  EXPECT_EQ(slices[2].bytes, 3 * kUnit);
  EXPECT_EQ(slices[3].position, kSliceBytes + 4 * kUnit);
}

TEST_P(ImageOfAnyTier, R9_TakesOnlyTheExtentsItWasGiven) {
  const auto saved = image_of(scattered);
  save(*saved);
  EXPECT_EQ(saved->bytes(), kSliceBytes + 6 * kUnit);
  write(2);
  restore(*saved);
  EXPECT_TRUE(holds(0, kUnit, 1));
  EXPECT_TRUE(holds(kUnit, kGranule - kUnit, 2));
  EXPECT_TRUE(holds(kGranule, kSliceBytes + 3 * kUnit, 1));
  const std::size_t gap = kGranule + kSliceBytes + 3 * kUnit;
  EXPECT_TRUE(holds(gap, kBytes - 2 * kUnit - gap, 2));
  EXPECT_TRUE(holds(kBytes - 2 * kUnit, 2 * kUnit, 1));
}

TEST_P(ImageOfAnyTier, SavesOnlySlicesWhoseDigestDiffers) {
  const auto saved = whole();
  save(*saved);
  std::vector<cumempool_digest> digests(saved->slices().size(), {1, 1});
  saved->set_digests(digests);
  write(2);
  digests[1].low = 2;  // two neighbours, and the short one at the end
  digests[2].high = 2;
  digests[4] = {2, 2};
  EXPECT_EQ(saved->save_changes(transfer, memory.address(), digests.data()),
            2 * kSliceBytes + kGranule);
  wait();
  write(3);
  restore(*saved);
  EXPECT_TRUE(holds(0, kSliceBytes, 1));
  EXPECT_TRUE(holds(kSliceBytes, 2 * kSliceBytes, 2));
  EXPECT_TRUE(holds(3 * kSliceBytes, kSliceBytes, 1));
  EXPECT_TRUE(holds(4 * kSliceBytes, kGranule, 2));
}

TEST_P(ImageOfAnyTier, ChangedNeighboursInDifferentExtentsAreSavedFromTheirPlaces) {
  const auto saved = image_of(scattered);
  save(*saved);
  saved->set_digests(std::vector<cumempool_digest>(4, {1, 1}));
  write(2);
  const std::vector<cumempool_digest> digests(4, {2, 2});
  EXPECT_EQ(saved->save_changes(transfer, memory.address(), digests.data()), saved->bytes());
  wait();
  write(3);
  restore(*saved);
  EXPECT_TRUE(holds(0, kUnit, 2));
  EXPECT_TRUE(holds(kUnit, kGranule - kUnit, 3));
  EXPECT_TRUE(holds(kGranule, kSliceBytes + 3 * kUnit, 2));
  EXPECT_TRUE(holds(kBytes - 2 * kUnit, 2 * kUnit, 2));
}

TEST_P(ImageOfAnyTier, WithoutAChangeNothingIsCopied) {
  const auto saved = whole();
  save(*saved);
  const std::vector<cumempool_digest> digests(saved->slices().size(), {7, 9});
  saved->set_digests(digests);
  faults.reset_counts();
  EXPECT_EQ(saved->save_changes(transfer, memory.address(), digests.data()), 0U);
  EXPECT_EQ(faults.calls("copy_to_host") + faults.calls("copy_on_device"), 0U);
}

TEST_P(ImageOfAnyTier, ZeroesWhatItDoesNotHold) {
  const auto saved = image_of(scattered);
  save(*saved);
  write(2);
  restore(*saved);
  EXPECT_EQ(saved->zero_rest(queue, memory.address(), kBytes), kBytes - saved->bytes());
  queue.drain();
  EXPECT_TRUE(holds(0, kUnit, 1));
  EXPECT_TRUE(all_are(memory.address() + kUnit, kGranule - kUnit, 0));
  EXPECT_TRUE(holds(kGranule, kSliceBytes + 3 * kUnit, 1));
  const std::size_t gap = kGranule + kSliceBytes + 3 * kUnit;
  EXPECT_TRUE(all_are(memory.address() + gap, kBytes - 2 * kUnit - gap, 0));
  const auto first = image_of({{kUnit, kUnit}});
  save(*first);
  EXPECT_EQ(first->zero_rest(queue, memory.address(), kBytes), kBytes - kUnit);
  queue.drain();
  EXPECT_TRUE(all_are(memory.address(), kUnit, 0));
  EXPECT_TRUE(all_are(memory.address() + 2 * kUnit, kBytes - 2 * kUnit, 0));
}

TEST_P(ImageOfAnyTier, R13_GivesItsRoomBack) {
  {
    const auto saved = whole();
    save(*saved);
    EXPECT_GE(used(), kBytes);
  }
  EXPECT_EQ(used(), 0U);
}

TEST_P(ImageOfAnyTier, R13_ASaveThatFailsHalfwayGivesItsRoomBack) {
  const char* entry = GetParam() == CUMEMPOOL_BACKUP_PEER ? "copy_on_device" : "copy_to_host";
  {
    const auto saved = image_of(scattered);
    faults.fail_nth(entry, 2, 719);
    EXPECT_THROW(saved->save(transfer, memory.address()), Error);
    staged.abandon();
    queue.drain();
  }
  EXPECT_EQ(used(), 0U);
}

TEST_P(ImageOfAnyTier, ShowsItsBytesWhereTheyAreHostMemory) {
  const auto saved = image_of(scattered);
  save(*saved);
  const auto at = [&](std::size_t offset, std::size_t bytes) {
    return saved->view(offset, bytes, false).get();
  };
  if (GetParam() == CUMEMPOOL_BACKUP_PEER) {
    EXPECT_EQ(at(0, 1), nullptr);
    return;
  }
  const backup::BackupStorage::View data = saved->view(kGranule + 5, kSliceBytes, false);
  ASSERT_NE(data, nullptr);
  for (std::size_t i = 0; i < kSliceBytes; i += 1001) {
    ASSERT_EQ(static_cast<std::uint8_t>(data.get()[i]), pattern_byte(kGranule + 5 + i, 1));
  }
  EXPECT_NE(at(0, kUnit), nullptr);
  EXPECT_EQ(at(0, kUnit + 1), nullptr) << "the gap is not in the image";
  EXPECT_EQ(at(kUnit, 1), nullptr);
  EXPECT_EQ(at(kBytes - 1, 2), nullptr);
  for (const std::size_t wraps : {SIZE_MAX, SIZE_MAX - kGranule, SIZE_MAX - kGranule - 4}) {
    EXPECT_EQ(at(kGranule + 5, wraps), nullptr) << wraps;
  }
  EXPECT_EQ(at(SIZE_MAX, 2), nullptr);
  EXPECT_FALSE(saved->lent_for_writing());
}

TEST_P(ImageOfAnyTier, WhatIsWrittenThroughAViewIsRestored) {
  const auto saved = whole();
  save(*saved);
  saved->set_digests(std::vector<cumempool_digest>(saved->slices().size(), {1, 1}));
  const auto data = saved->view(kSliceBytes - 1, 2, true);
  if (GetParam() == CUMEMPOOL_BACKUP_PEER) {
    EXPECT_EQ(data, nullptr);
    EXPECT_FALSE(saved->lent_for_writing());
    EXPECT_FALSE(saved->digests().empty());
    return;
  }
  data.get()[0] = data.get()[1] = std::byte{0xEE};
  EXPECT_TRUE(saved->lent_for_writing());
  EXPECT_TRUE(saved->digests().empty()) << "they no longer tell what it holds";
  restore(*saved);
  EXPECT_TRUE(all_are(memory.address() + kSliceBytes - 1, 2, 0xEE));
  EXPECT_TRUE(holds(0, kSliceBytes - 1, 1));
  EXPECT_TRUE(holds(kSliceBytes + 1, kBytes - kSliceBytes - 1, 1));
}

INSTANTIATE_TEST_SUITE_P(Tiers, ImageOfAnyTier,
                         ::testing::Values(CUMEMPOOL_BACKUP_PINNED, CUMEMPOOL_BACKUP_PAGEABLE,
                                           CUMEMPOOL_BACKUP_FILE, CUMEMPOOL_BACKUP_PEER),
                         [](const auto& tested) { return name_of(tested.param); });

// ---- host memory -------------------------------------------------------------------------------

class ImageInHostMemory : public ::testing::TestWithParam<cumempool_backup_tier>,
                          protected ImageFixture {
 protected:
  HostArena& arena() { return GetParam() == CUMEMPOOL_BACKUP_PINNED ? pinned : pageable; }

  // Leaves free room in pieces of one granule only, but for what is not there yet.
  std::vector<HostSpan> fragment(std::size_t pieces) {
    const backup::ArenaOrder order(arena(), 2 * pieces * kGranule);
    std::vector<HostSpan> all;
    for (std::size_t i = 0; i < 2 * pieces; ++i) all.push_back(arena().acquire(0, kGranule));
    std::vector<HostSpan> kept;
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (i % 2 == 0) {
        arena().release(all[i]);
      } else {
        kept.push_back(all[i]);
      }
    }
    return kept;
  }
  void give(const std::vector<HostSpan>& spans) {
    for (const HostSpan& span : spans) arena().release(span);
  }
};

TEST_P(ImageInHostMemory, MayBeScattered) {
  const auto between = fragment(3);
  {
    const auto saved = image(GetParam(), {{kUnit, kBytes - kUnit}});
    save(*saved);
    write(2);
    restore(*saved);
    EXPECT_TRUE(holds(kUnit, kBytes - kUnit, 1));
    EXPECT_EQ(arena().used_bytes(), kBytes - kUnit + 3 * kGranule);
  }
  give(between);
  EXPECT_EQ(arena().used_bytes(), 0U);
}

TEST_P(ImageInHostMemory, AViewAcrossItsPiecesGathersThemAndOlderViewsStay) {
  const auto between = fragment(3);
  auto saved = image(GetParam(), {{0, kBytes}});
  save(*saved);
  std::byte* const early = saved->view(0, 100, false).get();
  const std::uint64_t before = arena().used_bytes();
  std::byte* const all = saved->view(0, kBytes, false).get();
  ASSERT_NE(all, nullptr);
  EXPECT_NE(all, early);
  EXPECT_EQ(arena().used_bytes(), before + kBytes) << "both are there";
  for (std::size_t i = 0; i < kBytes; ++i) {
    ASSERT_EQ(static_cast<std::uint8_t>(all[i]), pattern_byte(i, 1)) << i;
  }
  EXPECT_EQ(static_cast<std::uint8_t>(early[99]), pattern_byte(99, 1));
  EXPECT_EQ(saved->view(7, 100, false).get(), all + 7) << "it is in one piece from now on";
  write(2);
  restore(*saved);
  EXPECT_TRUE(holds(0, kBytes, 1));
  saved.reset();
  give(between);
  EXPECT_EQ(arena().used_bytes(), 0U);
}

TEST_P(ImageInHostMemory, AnImageThatCannotBeGatheredStaysAsItWas) {
  if (GetParam() == CUMEMPOOL_BACKUP_PAGEABLE) return;  // needs no registration that could fail
  const auto between = fragment(3);
  {
    const auto saved = image(GetParam(), {{0, kBytes}});
    save(*saved);
    faults.fail_nth("host_register", 1, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
    EXPECT_THROW(saved->view(0, kBytes, true), Error);
    EXPECT_FALSE(saved->lent_for_writing());
    write(2);
    restore(*saved);
    EXPECT_TRUE(holds(0, kBytes, 1));
  }
  give(between);
  EXPECT_EQ(arena().used_bytes(), 0U);
}

INSTANTIATE_TEST_SUITE_P(Tiers, ImageInHostMemory,
                         ::testing::Values(CUMEMPOOL_BACKUP_PINNED, CUMEMPOOL_BACKUP_PAGEABLE),
                         [](const auto& tested) { return name_of(tested.param); });

// Larger than a block: copies end at its border, views do not.
TEST(LargeImage, CrossesBlocks) {
  constexpr std::size_t kMiB = std::size_t{1} << 20;
  constexpr std::size_t kLarge = 66 * kMiB;
  const Host host(kLarge / kGranule);
  FaultDriver faults(host.table());
  const Driver table(faults.table());
  const driver::RetainedContext context(table, 0);
  const driver::ContextScope scope(table, 0);
  vmm::MemoryStats stats;
  vmm::Allocation memory(table, stats, {0, 0, 0, 0}, kLarge);
  memory.map();
  write_pattern(memory.address(), kLarge, 1);
  HostBudget budget(0);
  HostArena arena(table, CUMEMPOOL_BACKUP_PINNED, -1, budget);
  backup::Transfer transfer{table, 0};
  CopyQueue& queue = transfer.queue;
  {
    Backup saved({{0, kLarge}}, std::make_unique<backup::HostStorage>(arena, 0));
    saved.save(transfer, memory.address());
    queue.drain();
    EXPECT_EQ(faults.calls("copy_to_host"), 2U) << "one per block";
    write_pattern(memory.address(), kLarge, 3);
    saved.restore(transfer, memory.address());
    queue.drain();
    EXPECT_EQ(faults.calls("copy_to_device"), 2U) << "one per block, before a view joins them";
    EXPECT_TRUE(holds_pattern(memory.address(), kLarge, 1));
    const std::uint64_t used = arena.used_bytes();
    const auto view = saved.view(63 * kMiB, 3 * kMiB, false);
    ASSERT_NE(view, nullptr);
    EXPECT_EQ(arena.used_bytes(), used) << "blocks lie side by side: nothing to gather";
    EXPECT_TRUE(holds_pattern(reinterpret_cast<std::uintptr_t>(view.get()) - 63 * kMiB, 63 * kMiB,
                              3 * kMiB, 1));
    write_pattern(memory.address(), kLarge, 2);
    // As a program copies: in one call.
    queue.to_device(memory.address() + 63 * kMiB, view.get(), 3 * kMiB);
    queue.drain();
    EXPECT_TRUE(holds_pattern(memory.address(), 63 * kMiB, 3 * kMiB, 1));
    saved.restore(transfer, memory.address());
    queue.drain();
    EXPECT_TRUE(holds_pattern(memory.address(), kLarge, 1));
  }
  EXPECT_EQ(arena.trim(0), kLarge);
}

// ---- memory of a peer --------------------------------------------------------------------------

class ImageOnAPeer : public ::testing::Test, protected ImageFixture {};

TEST_F(ImageOnAPeer, R13_WhatTheDriverDoesNotTakeBackIsLeakedAndTriedOnceMore) {
  for (const char* entry : {"unmap", "release", "unreserve"}) {
    faults.fail_nth(entry, 1, 719);
    image(CUMEMPOOL_BACKUP_PEER, {{0, kBytes}}).reset();
    EXPECT_FALSE(peers.empty()) << entry;
    EXPECT_EQ(peers.leaked_bytes(), kBytes) << entry;
    peers.release_leaked();
    EXPECT_TRUE(peers.empty()) << entry;
    EXPECT_EQ(peers.leaked_bytes(), 0U) << entry;
    EXPECT_EQ(host.counters().charged_bytes, kBytes) << entry << ": the allocation's own";
    EXPECT_EQ(host.counters().reserved_bytes, kBytes) << entry;
  }
}

TEST_F(ImageOnAPeer, R13_MemoryThatCannotBeReachedIsGivenBack) {
  faults.fail_nth("set_access", 1, 719);
  faults.fail_nth("unmap", 1, 719, FaultDriver::Repeat::kFromThenOn);
  EXPECT_THROW(image(CUMEMPOOL_BACKUP_PEER, {{0, kBytes}}), Error);
  faults.fail_nothing();
  EXPECT_FALSE(peers.empty());
  peers.release_leaked();
  EXPECT_TRUE(peers.empty());
}

}  // namespace
}  // namespace cumempool::tests
