// A backup in a file: contents of any layout, checked on the way back, and views of it.
#include "backup/file_storage.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backup/bounce_buffers.hpp"
#include "backup/copy_queue.hpp"
#include "conformance_fixture.hpp"
#include "fault_driver.hpp"
#include "host_fixture.hpp"
#include "temporary_directory.hpp"

namespace cumempool::tests {
namespace {

using backup::BackupFile;
using backup::FileStorage;
using backup::kSliceBytes;

constexpr std::size_t kBlock = BackupFile::kBlockBytes;
constexpr std::uint64_t kSeed = 42;

// Extents of an image that lie behind one another in device memory, with a hole after each.
struct Layout {
  std::vector<std::size_t> sizes;
  static constexpr std::size_t kHole = 256;

  std::size_t position(std::size_t extent) const {
    std::size_t sum = 0;
    for (std::size_t i = 0; i < extent; ++i) sum += sizes[i];
    return sum;
  }
  std::size_t offset(std::size_t extent) const { return position(extent) + extent * kHole; }
  std::size_t bytes() const { return position(sizes.size()); }
};

class FileStorageTest : public ::testing::Test {
 protected:
  static constexpr std::size_t kMemory = 24 * kSliceBytes;

  void save_all(FileStorage& place, const Layout& all) {
    for (std::size_t i = 0; i < all.sizes.size(); ++i) {
      place.save(transfer, all.position(i), memory.address() + all.offset(i), all.sizes[i]);
    }
    staged.finish();
  }
  void load_all(FileStorage& place, const Layout& all) {
    for (std::size_t i = 0; i < all.sizes.size(); ++i) {
      place.load(transfer, all.position(i), memory.address() + all.offset(i), all.sizes[i]);
    }
    staged.finish();
    queue.drain();
  }
  void write(std::uint32_t seed) { write_pattern(memory.address(), kMemory, seed); }
  // Whether the extents hold what write(seed) wrote, and the holes what write(other) did.
  bool holds(const Layout& all, std::uint32_t seed, std::uint32_t other) {
    for (std::size_t i = 0; i < all.sizes.size(); ++i) {
      const std::size_t end = all.offset(i) + all.sizes[i];
      if (!holds_pattern(memory.address(), all.offset(i), all.sizes[i], seed)) return false;
      if (!holds_pattern(memory.address(), end, Layout::kHole, other)) return false;
    }
    return true;
  }
  Error error_of(const std::function<void()>& call) {
    try {
      call();
    } catch (const Error& error) {
      staged.abandon();
      return error;
    }
    return {CUMEMPOOL_OK, "nothing was thrown"};
  }

  Host host{kMemory / kGranule};
  driver::Driver table{host.table()};
  driver::RetainedContext context{table, 0};
  driver::ContextScope scope{table, 0};
  conformance::Block memory{table.table(), kMemory, {0, 0, 0, 0}};
  backup::Transfer transfer{table, 0, 3};
  backup::CopyQueue& queue = transfer.queue;
  backup::BounceBuffers& staged = transfer.bounce_buffers;
  TemporaryDirectory directory;
  BackupFile file{directory.path()};
  const Layout layout{{16, 512, kBlock, kSliceBytes, kSliceBytes + 512, 9 * kSliceBytes + 1040,
                       3 * kSliceBytes, kBlock + 16, kSliceBytes - 16}};
};

TEST_F(FileStorageTest, HoldsExtentsOfAnySizeAndStaysAsItIs) {
  FileStorage place(file, layout.bytes(), layout.sizes.size(), kSeed);
  EXPECT_EQ(place.tier(), CUMEMPOOL_BACKUP_FILE);
  write(1);
  save_all(place, layout);
  for (int round = 0; round < 2; ++round) {
    write(2);
    load_all(place, layout);
    EXPECT_TRUE(holds(layout, 1, 2));
  }
}

TEST_F(FileStorageTest, SlicesCanBeSavedAgainAndLoadedAlone) {
  const Layout one{{16, 9 * kSliceBytes + 1040, 512}};
  FileStorage place(file, one.bytes(), one.sizes.size(), kSeed);
  write(1);
  save_all(place, one);
  write(3);
  const cumempool_address start = memory.address() + one.offset(1);
  place.save(transfer, 16 + 2 * kSliceBytes, start + 2 * kSliceBytes, 3 * kSliceBytes);
  place.save(transfer, 16 + 8 * kSliceBytes, start + 8 * kSliceBytes, kSliceBytes + 1040);
  staged.finish();
  write(2);
  load_all(place, one);
  const auto slices_hold = [&](std::size_t first, std::size_t bytes, std::uint32_t seed) {
    return holds_pattern(memory.address(), one.offset(1) + first * kSliceBytes, bytes, seed);
  };
  EXPECT_TRUE(slices_hold(0, 2 * kSliceBytes, 1));
  EXPECT_TRUE(slices_hold(2, 3 * kSliceBytes, 3));
  EXPECT_TRUE(slices_hold(5, 3 * kSliceBytes, 1));
  EXPECT_TRUE(slices_hold(8, kSliceBytes + 1040, 3));
  write(2);
  place.load(transfer, 16 + 4 * kSliceBytes, start + 4 * kSliceBytes, kSliceBytes);
  staged.finish();
  queue.drain();
  EXPECT_TRUE(slices_hold(3, kSliceBytes, 2));
  EXPECT_TRUE(slices_hold(4, kSliceBytes, 3));
  EXPECT_TRUE(slices_hold(5, kSliceBytes, 2));
}

TEST_F(FileStorageTest, GrowsBySeveralSavesOfOneExtent) {
  const std::size_t bytes = 5 * kSliceBytes + 528;
  FileStorage place(file, bytes, 1, kSeed);
  write(1);
  place.save(transfer, 0, memory.address(), 2 * kSliceBytes);
  staged.finish();  // the next one writes part of it again
  place.save(transfer, kSliceBytes, memory.address() + kSliceBytes, bytes - kSliceBytes);
  staged.finish();
  write(2);
  load_all(place, {{bytes}});
  EXPECT_TRUE(holds_pattern(memory.address(), bytes, 1));
}

TEST_F(FileStorageTest, ASliceIsTheLeastThatItTakes) {
  FileStorage place(file, 2 * kSliceBytes, 1, kSeed);
  save_all(place, {{2 * kSliceBytes}});
  const auto load = [&](std::size_t position, std::size_t bytes) {
    return error_of([&] { place.load(transfer, position, memory.address(), bytes); }).status;
  };
  EXPECT_EQ(load(16, kSliceBytes), CUMEMPOOL_INTERNAL);
  EXPECT_EQ(load(0, 16), CUMEMPOOL_INTERNAL);
  EXPECT_EQ(load(kSliceBytes, 2 * kSliceBytes), CUMEMPOOL_INTERNAL);
  const auto grow = [&] { place.save(transfer, 2 * kSliceBytes, memory.address(), kSliceBytes); };
  EXPECT_EQ(error_of(grow).status, CUMEMPOOL_INTERNAL) << "past the room that it asked for";
}

TEST_F(FileStorageTest, R13_RoomInTheFileIsHeldAsLongAsThePlace) {
  {
    const FileStorage place(file, layout.bytes(), layout.sizes.size(), kSeed);
    const std::size_t most =
        BackupFile::whole_blocks(layout.bytes()) + layout.sizes.size() * kBlock;
    EXPECT_GE(file.held_bytes(), layout.bytes());
    EXPECT_LE(file.held_bytes(), most);
  }
  EXPECT_EQ(file.held_bytes(), 0U);
}

// ---- damage -------------------------------------------------------------------------------------

TEST_F(FileStorageTest, R4_AnAlteredByteIsFoundWhereverItIs) {
  FileStorage place(file, layout.bytes(), layout.sizes.size(), kSeed);
  write(1);
  save_all(place, layout);
  for (std::size_t extent = 0; extent < layout.sizes.size(); ++extent) {
    const std::size_t position = layout.position(extent) + layout.sizes[extent] - 1;
    const auto altered = place.view(position, 1, false);
    ASSERT_NE(altered, nullptr);
    *altered ^= std::byte{4};
    write(2);
    const Error error = error_of([&] { load_all(place, layout); });
    EXPECT_EQ(error.status, CUMEMPOOL_BACKUP_DAMAGED) << extent;
    EXPECT_NE(error.problem.find("'" + directory.path() + "'"), std::string::npos);
    EXPECT_NE(error.problem.find("at offset "), std::string::npos);
    EXPECT_NE(error.advice.find("stays asleep"), std::string::npos);
    EXPECT_GT(error.bytes, 0U);
    *altered ^= std::byte{4};
  }
  write(2);
  load_all(place, layout);
  EXPECT_TRUE(holds(layout, 1, 2)) << "the place is as it was";
}

TEST_F(FileStorageTest, R4_ATruncatedFileIsFound) {
  FileStorage place(file, layout.bytes(), layout.sizes.size(), kSeed);
  save_all(place, layout);
  ASSERT_EQ(ftruncate(file.fd(), static_cast<off_t>(5 * kSliceBytes)), 0);
  const Error error = error_of([&] { load_all(place, layout); });
  EXPECT_EQ(error.status, CUMEMPOOL_BACKUP_DAMAGED);
  EXPECT_NE(error.problem.find("truncated"), std::string::npos) << error.message();
}

TEST_F(FileStorageTest, R4_ASaveThatFailedIsNotTakenForABackup) {
  const Layout one{{12 * kSliceBytes}};
  FileStorage place(file, one.bytes(), 1, kSeed);
  write(1);
  save_all(place, one);
  write(3);
  {
    const FileSizeLimit full(10 * kSliceBytes);
    const Error error = error_of([&] { save_all(place, one); });
    EXPECT_EQ(error.status, CUMEMPOOL_BACKUP_FAILED);
  }
  write(2);
  const Error error = error_of([&] { load_all(place, one); });
  EXPECT_EQ(error.status, CUMEMPOOL_BACKUP_DAMAGED);
  EXPECT_NE(error.problem.find("never written to the end"), std::string::npos) << error.message();
  write(3);
  save_all(place, one);
  write(2);
  load_all(place, one);
  EXPECT_TRUE(holds_pattern(memory.address(), one.bytes(), 3)) << "saved over, it is good again";
}

TEST_F(FileStorageTest, R4_AFullDiskIsMetBeforeAnythingIsCopied) {
  const FileSizeLimit full(kSliceBytes);
  const Error error = error_of([&] { FileStorage(file, 8 * kSliceBytes, 1, kSeed); });
  EXPECT_EQ(error.status, CUMEMPOOL_BACKUP_FAILED);
  EXPECT_EQ(file.held_bytes(), 0U);
}

// ---- views --------------------------------------------------------------------------------------

TEST_F(FileStorageTest, AViewIsTheContents) {
  FileStorage place(file, layout.bytes(), layout.sizes.size(), kSeed);
  write(1);
  save_all(place, layout);
  for (std::size_t i = 0; i < layout.sizes.size(); ++i) {
    for (const std::size_t skipped : {std::size_t{0}, layout.sizes[i] / 2}) {
      const std::size_t bytes = layout.sizes[i] - skipped;
      const auto data = place.view(layout.position(i) + skipped, bytes, false);
      ASSERT_NE(data, nullptr);
      const auto* expected = bytes_at(memory.address() + layout.offset(i) + skipped);
      EXPECT_EQ(std::memcmp(data.get(), expected, bytes), 0) << i;
    }
  }
}

TEST_F(FileStorageTest, TheFileIsMappedWhileAViewOfItLives) {
  auto place = std::make_unique<FileStorage>(file, layout.bytes(), layout.sizes.size(), kSeed);
  write(1);
  save_all(*place, layout);
  const auto mapped = [this] {
    std::ifstream maps("/proc/self/maps");
    struct stat status {};
    EXPECT_EQ(fstat(file.fd(), &status), 0);
    const std::string inode = " " + std::to_string(status.st_ino) + " ";
    std::size_t count = 0;
    for (std::string line; std::getline(maps, line);)
      count += line.find(inode) != std::string::npos;
    return count;
  };
  EXPECT_EQ(mapped(), 0U);
  auto first = place->view(layout.position(0), 1, false);
  auto second = place->view(layout.position(1), 1, false);
  EXPECT_EQ(mapped(), 1U) << "they share it";
  first.reset();
  EXPECT_EQ(mapped(), 1U);
  EXPECT_EQ(std::to_integer<std::uint8_t>(*second), *bytes_at(memory.address() + layout.offset(1)));
  second.reset();
  EXPECT_EQ(mapped(), 0U) << "what is written directly from now on has no old pages beneath it";
  second = place->view(layout.position(1), 1, false);
  EXPECT_EQ(mapped(), 1U);
  place.reset();
  EXPECT_EQ(mapped(), 1U) << "the place does not take it from under a view";
  second.reset();
  EXPECT_EQ(mapped(), 0U);
}

TEST_F(FileStorageTest, ThereIsNoViewAcrossAGapOrPastTheEnd) {
  const Layout two{{kBlock, 16, kBlock}};
  FileStorage place(file, two.bytes(), two.sizes.size(), kSeed);
  EXPECT_EQ(place.view(0, 16, false), nullptr) << "nothing was saved";
  save_all(place, two);
  EXPECT_NE(place.view(0, kBlock + 16, false), nullptr) << "no gap follows a whole block";
  EXPECT_EQ(place.view(kBlock, 32, false), nullptr);
  EXPECT_EQ(place.view(0, two.bytes(), false), nullptr);
  EXPECT_EQ(place.view(two.bytes() - 16, 32, false), nullptr);
  EXPECT_EQ(place.view(two.bytes(), 16, false), nullptr);
}

TEST_F(FileStorageTest, WhatIsWrittenThroughAViewComesBack) {
  FileStorage place(file, layout.bytes(), layout.sizes.size(), kSeed);
  write(1);
  save_all(place, layout);
  const auto view = place.view(layout.position(5), layout.sizes[5], true);
  ASSERT_NE(view, nullptr);
  std::memset(view.get(), 7, layout.sizes[5]);
  load_all(place, layout);
  EXPECT_TRUE(all_are(memory.address() + layout.offset(5), layout.sizes[5], 7));
  EXPECT_TRUE(holds_pattern(memory.address(), layout.offset(4), layout.sizes[4], 1));
  EXPECT_TRUE(holds_pattern(memory.address(), layout.offset(6), layout.sizes[6], 1));
}

TEST_F(FileStorageTest, WorksWithoutDirectTransfersAndReservedRoom) {
  BackupFile plain(directory.path(), {false, false, false});
  FileStorage place(plain, layout.bytes(), layout.sizes.size(), kSeed);
  write(1);
  save_all(place, layout);
  write(2);
  load_all(place, layout);
  EXPECT_TRUE(holds(layout, 1, 2));
}

}  // namespace
}  // namespace cumempool::tests
