// Memory touched by several threads: order, completeness, early ends.
#include "backup/host_pages.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <vector>

namespace cumempool::backup {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kRange = 64 * kPage;

class FirstTouchTest : public ::testing::Test {
 protected:
  void SetUp() override {
    void* mapped =
        mmap(nullptr, kRange * kRanges, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(mapped, MAP_FAILED);
    memory_ = static_cast<std::byte*>(mapped);
    for (std::size_t i = 0; i < kRanges; ++i) ranges_.push_back({memory_ + i * kRange, kRange});
  }
  void TearDown() override { munmap(memory_, kRange * kRanges); }

  std::size_t resident_pages(std::size_t index) const {
    std::vector<unsigned char> pages(kRange / kPage);
    EXPECT_EQ(mincore(ranges_[index].data, kRange, pages.data()), 0);
    std::size_t count = 0;
    for (const unsigned char page : pages) count += page & 1U;
    return count;
  }

  static constexpr std::size_t kRanges = 40;
  std::byte* memory_ = nullptr;
  std::vector<HostSpan> ranges_;
};

TEST_F(FirstTouchTest, WaitReturnsWhenTheRangeIsResident) {
  for (const unsigned threads : {0U, 1U, 4U, 100U}) {
    madvise(memory_, kRange * kRanges, MADV_DONTNEED);
    FirstTouch touch(ranges_, threads);
    for (std::size_t i = 0; i < kRanges; ++i) {
      touch.wait(i);
      EXPECT_EQ(resident_pages(i), kRange / kPage) << threads << " threads, range " << i;
    }
  }
}

TEST_F(FirstTouchTest, WithoutThreadsOnlyWhatIsWaitedForIsTouched) {
  FirstTouch touch(ranges_, 0);
  touch.wait(2);
  EXPECT_EQ(resident_pages(2), kRange / kPage);
  EXPECT_EQ(resident_pages(3), 0U);
}

TEST_F(FirstTouchTest, StopsWhereThereIsNoRoomAndSaysSo) {
  for (const unsigned threads : {0U, 1U, 4U}) {
    madvise(memory_, kRange * kRanges, MADV_DONTNEED);
    int asked = 0;
    FirstTouch touch(ranges_, threads, [&asked] { return ++asked <= 3; });
    EXPECT_FALSE(touch.wait(kRanges - 1));
    std::size_t touched = 0;
    for (std::size_t i = 0; i < kRanges; ++i) touched += resident_pages(i) != 0 ? 1U : 0U;
    EXPECT_LE(touched, 3U) << threads << " threads";
  }
}

TEST_F(FirstTouchTest, EndsEarlyWhenNobodyWaits) {
  for (int i = 0; i < 50; ++i) {
    const FirstTouch touch(ranges_, 4);
  }
  const FirstTouch nothing({}, 4);
  EXPECT_GE(FirstTouch::default_threads(), 1U);
  EXPECT_LE(FirstTouch::default_threads(), 16U);
}

}  // namespace
}  // namespace cumempool::backup
