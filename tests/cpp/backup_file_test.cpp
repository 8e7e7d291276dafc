// The file that backups are written to: how it is made, its room, transfers, and what may go
// wrong with a disk.
#include "backup/file_storage.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "driver/error.hpp"
#include "temporary_directory.hpp"

namespace cumempool::tests {
namespace {

using backup::BackupFile;

constexpr std::size_t kBlock = BackupFile::kBlockBytes;
constexpr std::size_t kMiB = std::size_t{1} << 20;

// Memory that direct I/O takes.
class Pages {
 public:
  explicit Pages(std::size_t bytes, int value = 0)
      : bytes_(bytes),
        data_(static_cast<std::byte*>(std::aligned_alloc(kBlock, bytes)), std::free) {
    std::memset(data(), value, bytes);
  }
  std::byte* data() const { return data_.get(); }
  std::size_t bytes() const { return bytes_; }
  bool operator==(const Pages& other) const {
    return bytes_ == other.bytes_ && std::memcmp(data(), other.data(), bytes_) == 0;
  }

 private:
  std::size_t bytes_;
  std::unique_ptr<std::byte, decltype(&std::free)> data_;
};

Pages numbered(std::size_t bytes, unsigned seed) {
  Pages pages(bytes);
  for (std::size_t i = 0; i < bytes; ++i) {
    pages.data()[i] = static_cast<std::byte>(i * 31 + (i >> 12) + seed);
  }
  return pages;
}

Error error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  return {CUMEMPOOL_OK, "nothing was thrown"};
}

std::uint64_t disk_bytes(const BackupFile& file) {
  struct stat status {};
  if (fstat(file.fd(), &status) != 0) throw std::runtime_error("fstat failed");
  return static_cast<std::uint64_t>(status.st_blocks) * 512;
}

// ---- making -------------------------------------------------------------------------------------

TEST(BackupFileTest, HasNoNameAndEndsWithItsOwner) {
  const TemporaryDirectory directory;
  const std::size_t before = open_descriptors();
  for (const bool unnamed : {true, false}) {
    BackupFile file(directory.path(), {unnamed, true, true});
    EXPECT_TRUE(directory.empty()) << unnamed;
    EXPECT_EQ(fcntl(file.fd(), F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    struct stat status {};
    ASSERT_EQ(fstat(file.fd(), &status), 0);
    EXPECT_EQ(status.st_mode & 0777U, 0600U);
    EXPECT_EQ(open_descriptors(), before + 1);
    EXPECT_EQ(file.directory(), directory.path());
  }
  EXPECT_EQ(open_descriptors(), before);
}

TEST(BackupFileTest, SaysWhyNoneCanBeMade) {
  const TemporaryDirectory directory;
  const std::string plain = directory.path() + "/plain";
  std::ofstream(plain) << "text";
  const std::size_t before = open_descriptors();
  for (const bool unnamed : {true, false}) {
    for (const std::string& wrong : {directory.path() + "/missing", plain, std::string("/proc")}) {
      const Error error = error_of([&] { BackupFile(wrong, {unnamed, true, true}); });
      EXPECT_EQ(error.status, CUMEMPOOL_BACKUP_FAILED) << wrong;
      EXPECT_NE(error.problem.find("'" + wrong + "'"), std::string::npos) << error.message();
      EXPECT_FALSE(error.advice.empty());
    }
  }
  EXPECT_EQ(open_descriptors(), before);
}

// ---- with and without what the file system may refuse -------------------------------------------

class BackupFileWishesTest : public ::testing::TestWithParam<BackupFile::Wishes> {
 protected:
  TemporaryDirectory directory;
  BackupFile file{directory.path(), GetParam()};
};

INSTANTIATE_TEST_SUITE_P(Wishes, BackupFileWishesTest,
                         ::testing::Values(BackupFile::Wishes{true, true, true},
                                           BackupFile::Wishes{false, true, true},
                                           BackupFile::Wishes{true, false, true},
                                           BackupFile::Wishes{true, true, false}));

TEST_P(BackupFileWishesTest, HoldsWhatIsWritten) {
  EXPECT_TRUE(GetParam().direct || !file.direct());
  for (const std::size_t bytes : {kBlock, 3 * kBlock, kMiB, 9 * kMiB + kBlock}) {
    const Pages written = numbered(bytes, 1);
    const std::size_t offset = file.acquire(bytes);
    EXPECT_EQ(offset % kBlock, 0U);
    file.write(offset, written.data(), bytes);
    const Pages read(bytes);
    file.read(offset, read.data(), bytes);
    EXPECT_TRUE(read == written) << bytes;
  }
}

TEST_P(BackupFileWishesTest, RoomIsWholeBlocksAndUsedAgain) {
  const std::size_t first = file.acquire(1);
  const std::size_t second = file.acquire(2 * kBlock + 1);
  const std::size_t third = file.acquire(kBlock);
  EXPECT_EQ(file.held_bytes(), 5 * kBlock);
  EXPECT_EQ(second, first + kBlock);
  EXPECT_EQ(third, second + 3 * kBlock);
  file.release(second, 2 * kBlock + 1);
  EXPECT_EQ(file.held_bytes(), 2 * kBlock);
  EXPECT_EQ(file.acquire(3 * kBlock), second);
  file.release(first, 1);
  file.release(second, 3 * kBlock);
  file.release(third, kBlock);
  EXPECT_EQ(file.held_bytes(), 0U);
  EXPECT_EQ(file.acquire(5 * kBlock), first);
}

TEST_P(BackupFileWishesTest, RoomThatIsReleasedGoesBackToTheDisk) {
  const Pages pages = numbered(4 * kMiB, 1);
  const std::size_t offset = file.acquire(pages.bytes());
  if (GetParam().reserve) {
    EXPECT_GE(disk_bytes(file), pages.bytes());
  }
  file.write(offset, pages.data(), pages.bytes());
  const std::size_t kept = file.acquire(kMiB);
  file.write(kept, pages.data(), kMiB);
  fsync(file.fd());
  EXPECT_GE(disk_bytes(file), 5 * kMiB);
  file.release(offset, pages.bytes());
  EXPECT_LT(disk_bytes(file), 2 * kMiB);
  const Pages read(kMiB);
  file.read(kept, read.data(), kMiB);
  EXPECT_EQ(std::memcmp(read.data(), pages.data(), kMiB), 0);
}

TEST_P(BackupFileWishesTest, AFullDiskIsAnErrorThatHoldsNothing) {
  const std::size_t kept = file.acquire(kMiB);
  {
    const FileSizeLimit limit(2 * kMiB);
    const Error error = error_of([&] { file.acquire(4 * kMiB); });
    EXPECT_EQ(error.status, CUMEMPOOL_BACKUP_FAILED);
    EXPECT_EQ(error.bytes, 4 * kMiB);
    EXPECT_NE(error.problem.find("'" + directory.path() + "'"), std::string::npos);
    EXPECT_NE(error.problem.find("are free there"), std::string::npos) << error.message();
    EXPECT_FALSE(error.advice.empty());
    EXPECT_EQ(file.held_bytes(), kMiB);
    EXPECT_EQ(file.acquire(kMiB), kept + kMiB) << "what fits is still to be had";
  }
  EXPECT_EQ(file.acquire(4 * kMiB), kept + 2 * kMiB) << "and the rest once there is room";
}

TEST_P(BackupFileWishesTest, AWriteThatTheDiskRefusesSaysWhere) {
  const std::size_t offset = file.acquire(4 * kMiB);
  const Pages pages = numbered(4 * kMiB, 1);
  const FileSizeLimit limit(2 * kMiB);
  const Error error = error_of([&] { file.write(offset, pages.data(), pages.bytes()); });
  EXPECT_EQ(error.status, CUMEMPOOL_BACKUP_FAILED);
  EXPECT_NE(error.problem.find("offset " + std::to_string(2 * kMiB)), std::string::npos)
      << error.message();
  EXPECT_EQ(error.bytes, 4 * kMiB);
}

TEST_P(BackupFileWishesTest, AFileThatEndsEarlyIsDamaged) {
  const std::size_t offset = file.acquire(kMiB);
  const Pages pages = numbered(kMiB, 1);
  file.write(offset, pages.data(), kMiB);
  const bool direct = file.direct();
  for (const std::size_t end : {kMiB / 2, kMiB / 2 - 1000, kMiB / 2 - 1024, std::size_t{0}}) {
    ASSERT_EQ(ftruncate(file.fd(), static_cast<off_t>(end)), 0);
    const Pages read(kMiB);
    const Error error = error_of([&] { file.read(offset, read.data(), kMiB); });
    EXPECT_EQ(error.status, CUMEMPOOL_BACKUP_DAMAGED);
    EXPECT_NE(error.problem.find("truncated: it ends at offset " + std::to_string(end)),
              std::string::npos)
        << error.message();
  }
  EXPECT_EQ(file.direct(), direct) << "an end in the middle of a block is no reason to give it up";
}

TEST_P(BackupFileWishesTest, AMappingIsTheFile) {
  file.acquire(kBlock);
  const std::size_t offset = file.acquire(kMiB);
  Pages pages = numbered(kMiB, 1);
  file.write(offset, pages.data(), kMiB);
  for (const std::size_t inside : {std::size_t{0}, std::size_t{100}, kBlock + 16}) {
    const std::shared_ptr<std::byte> mapping = file.map(offset + inside, kMiB - inside);
    EXPECT_EQ(std::memcmp(mapping.get(), pages.data() + inside, kMiB - inside), 0);
    pages.data()[inside] ^= std::byte{1};
    *mapping ^= std::byte{1};
    const Pages read(kMiB);
    file.read(offset, read.data(), kMiB);
    EXPECT_TRUE(read == pages);
  }
}

TEST_P(BackupFileWishesTest, ServesManyThreads) {
  std::vector<std::thread> threads;
  for (unsigned number = 0; number < 6; ++number) {
    threads.emplace_back([this, number] {
      for (unsigned round = 0; round < 20; ++round) {
        const std::size_t bytes = (1 + (number * 7 + round * 3) % 40) * kBlock;
        const std::size_t offset = file.acquire(bytes);
        const Pages written = numbered(bytes, number * 100 + round);
        file.write(offset, written.data(), bytes);
        const Pages read(bytes);
        file.read(offset, read.data(), bytes);
        EXPECT_TRUE(read == written);
        file.release(offset, bytes);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(file.held_bytes(), 0U);
}

// A disk that breaks, or fills up, behind a file that is open.
void put_in_place_of(const BackupFile& file, const char* path, int flags) {
  const int other = open(path, flags | O_CLOEXEC);
  ASSERT_GE(other, 0) << path;
  ASSERT_EQ(dup2(other, file.fd()), file.fd());
  close(other);
}

TEST(BackupFileTest, R4_ADiskThatFailsIsSaidToBeLookedAt) {
  const TemporaryDirectory directory;
  BackupFile file(directory.path());
  const std::size_t offset = file.acquire(kBlock);
  const Pages pages = numbered(kBlock, 1);
  put_in_place_of(file, directory.path().c_str(), O_RDONLY | O_DIRECTORY);
  for (const bool writes : {true, false}) {
    const Error error = error_of([&] {
      if (writes) {
        file.write(offset, pages.data(), kBlock);
      } else {
        file.read(offset, pages.data(), kBlock);
      }
    });
    EXPECT_EQ(error.status, CUMEMPOOL_BACKUP_FAILED);
    EXPECT_EQ(error.bytes, kBlock);
    EXPECT_NE(error.problem.find(writes ? "writing at" : "reading at"), std::string::npos)
        << error.message();
    EXPECT_NE(error.advice.find("look at the disk"), std::string::npos) << error.message();
  }
}

TEST(BackupFileTest, R4_ADiskThatFillsUpIsSaidToNeedRoom) {
  const TemporaryDirectory directory;
  BackupFile file(directory.path(), {true, false, false});
  const std::size_t offset = file.acquire(kBlock);
  put_in_place_of(file, "/dev/full", O_RDWR);
  const Error error = error_of([&] { file.write(offset, numbered(kBlock, 1).data(), kBlock); });
  EXPECT_EQ(error.status, CUMEMPOOL_BACKUP_FAILED);
  EXPECT_NE(error.advice.find("make room"), std::string::npos) << error.message();
}

TEST(BackupFileTest, TransfersThatAreRefusedAsDirectOnesAreMadeThroughTheCache) {
  const TemporaryDirectory directory;
  BackupFile file(directory.path());
  if (!file.direct())
    GTEST_SKIP() << "the file system of the temporary directory takes no O_DIRECT";
  const std::size_t offset = file.acquire(2 * kBlock);
  // Memory that direct I/O does not take, on file systems that look.
  const Pages pages = numbered(3 * kBlock, 1);
  file.write(offset, pages.data() + 1, 2 * kBlock);
  const Pages read(3 * kBlock);
  file.read(offset, read.data() + 1, 2 * kBlock);
  EXPECT_EQ(std::memcmp(read.data() + 1, pages.data() + 1, 2 * kBlock), 0);
}

}  // namespace
}  // namespace cumempool::tests
