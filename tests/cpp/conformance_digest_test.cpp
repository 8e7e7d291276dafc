// The contract of driver.h held to account on any driver, third part: digests (C14). Whatever the
// device computes is compared with the definition on the CPU.
#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>

#include "conformance_fixture.hpp"
#include "driver/digest.hpp"

namespace cumempool::conformance {
namespace {

constexpr std::uint64_t kSeed = 0x0123456789abcdefu;
constexpr std::size_t kTile = 2048;

cumempool_digest on_cpu(const std::uint8_t* data, std::size_t bytes, std::uint64_t seed = kSeed) {
  return driver::digest_on_cpu(seed, reinterpret_cast<const std::byte*>(data), bytes);
}

// Device memory and host memory of the same bytes.
class DigestConformance : public DriverConformance {
 protected:
  void SetUp() override {
    DriverConformance::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    bytes_ = (kBytes + granule() - 1) / granule() * granule();
    block_ = std::make_unique<Block>(table(), bytes_, properties());
    host_ = std::make_unique<HostBuffer>(table(), bytes_);
    write_pattern(host_->data(), bytes_, 14);
    upload(address(), *host_, bytes_);
  }

  void TearDown() override {
    host_.reset();
    block_.reset();
    DriverConformance::TearDown();
  }

  cumempool_address address() const { return block_->address(); }
  std::uint8_t* bytes() const { return host_->data(); }

  // On the device.
  cumempool_digest digest(std::size_t size, std::size_t offset = 0,
                          std::uint64_t seed = kSeed) const {
    return digests_of(table(), seed, {{address() + offset, size}}).front();
  }

  void upload_again() const { upload(address(), *host_, bytes_); }

  static constexpr std::size_t kBytes = (3u << 20) + 4096;

 private:
  std::size_t bytes_ = 0;
  std::unique_ptr<Block> block_;
  std::unique_ptr<HostBuffer> host_;
};

INSTANTIATE_TEST_SUITE_P(Host, DigestConformance, ::testing::ValuesIn(host_drivers()),
                         name_of_driver);
INSTANTIATE_TEST_SUITE_P(Gpu, DigestConformance, ::testing::ValuesIn(cuda_drivers()),
                         name_of_driver);

TEST_P(DigestConformance, C14_DigestsAreThoseOfTheDefinition) {
  std::vector<cumempool_extent> extents;
  for (const std::size_t size :
       {std::size_t{16}, std::size_t{32}, std::size_t{496}, std::size_t{512}, std::size_t{528},
        std::size_t{1040}, kTile - 16, kTile, kTile + 16, 2 * kTile, 8 * kTile - 16, 8 * kTile,
        8 * kTile + 16, 9 * kTile + 1024, std::size_t{65536}, std::size_t{1} << 20,
        (std::size_t{3} << 20) + 48}) {
    extents.push_back({address(), size});
  }
  const auto digests = digests_of(table(), kSeed, extents);
  for (std::size_t i = 0; i < extents.size(); ++i) {
    EXPECT_EQ(digests[i], on_cpu(bytes(), extents[i].bytes)) << extents[i].bytes << " bytes";
    EXPECT_EQ(digest(extents[i].bytes), digests[i]) << "alone";
  }
}

TEST_P(DigestConformance, C14_ExtentsBeginAtMultiplesOfSixteen) {
  for (const std::size_t offset :
       {std::size_t{16}, std::size_t{48}, kTile + 16, std::size_t{4080}}) {
    EXPECT_EQ(digest(100'000, offset), on_cpu(bytes() + offset, 100'000)) << offset;
  }
}

TEST_P(DigestConformance, C14_ManyExtentsAtATime) {
  constexpr std::size_t size = 704;
  std::vector<cumempool_extent> extents;
  for (std::size_t i = 0; i < 4096; ++i) extents.push_back({address() + i * size, size});
  const auto digests = digests_of(table(), kSeed, extents);
  std::size_t good = 0;
  for (std::size_t i = 0; i < extents.size(); ++i) {
    if (digests[i] == on_cpu(bytes() + i * size, size)) ++good;
  }
  EXPECT_EQ(good, extents.size());
}

TEST_P(DigestConformance, C14_SameBytesElsewhereHaveTheSameDigest) {
  const cumempool_address there = address() + (2u << 20);
  must(
      CALL(table(), copy_on_device, 0, there, address(), std::size_t{1} << 20, cumempool_stream{0}),
      "copy_on_device");
  EXPECT_EQ(digest(1u << 20, 2u << 20), digest(1u << 20));
}

TEST_P(DigestConformance, C14_OneFlippedBitShows) {
  constexpr std::size_t size = 1u << 20;
  const cumempool_digest before = digest(size);
  for (const std::size_t byte : {std::size_t{0}, std::size_t{3}, size / 2 + 5, size - 1}) {
    bytes()[byte] ^= 0x80u;
    upload_again();
    const cumempool_digest after = digest(size);
    EXPECT_NE(after.low, before.low) << byte;
    EXPECT_NE(after.high, before.high) << byte;
    EXPECT_EQ(after, on_cpu(bytes(), size)) << byte;
    bytes()[byte] ^= 0x80u;
  }
  upload_again();
  EXPECT_EQ(digest(size), before);
}

TEST_P(DigestConformance, C14_ExchangedPartsShow) {
  constexpr std::size_t size = 1u << 20;
  const cumempool_digest before = digest(size);
  // Words, chunks, tiles, and large parts.
  for (const std::size_t part : {std::size_t{4}, std::size_t{16}, kTile, size / 4}) {
    std::swap_ranges(bytes(), bytes() + part, bytes() + size / 2);
    upload_again();
    EXPECT_NE(digest(size), before) << part;
    EXPECT_EQ(digest(size), on_cpu(bytes(), size)) << part;
    std::swap_ranges(bytes(), bytes() + part, bytes() + size / 2);
  }
}

TEST_P(DigestConformance, C14_ZerosOfDifferentLengthsDiffer) {
  std::memset(bytes(), 0, kBytes);
  upload_again();
  std::vector<cumempool_extent> extents;
  for (std::size_t size = 16; size <= 2 * kTile + 64; size += 16) {
    extents.push_back({address(), size});
  }
  const auto digests = digests_of(table(), kSeed, extents);
  for (std::size_t i = 0; i < digests.size(); ++i) {
    EXPECT_EQ(digests[i], on_cpu(bytes(), extents[i].bytes)) << extents[i].bytes;
    for (std::size_t j = 0; j < i; ++j) EXPECT_NE(digests[i], digests[j]);
  }
}

TEST_P(DigestConformance, C14_TheSeedIsTheKey) {
  const cumempool_digest other = digest(65536, 0, kSeed + 1);
  EXPECT_NE(other, digest(65536));
  EXPECT_EQ(other, on_cpu(bytes(), 65536, kSeed + 1));
  EXPECT_EQ(digest(65536, 0, 0), on_cpu(bytes(), 65536, 0));
}

TEST_P(DigestConformance, C9_DigestsAreCommandsOfTheirStream) {
  const Stream stream(table());
  const HostBuffer arrays(table(), 4096);
  auto* const extent = reinterpret_cast<cumempool_extent*>(arrays.data());
  auto* const results = reinterpret_cast<cumempool_digest*>(extent + 1);
  constexpr std::size_t size = 1u << 20;
  *extent = {address(), size};
  for (std::uint8_t round = 0; round < 3; ++round) {
    must(CALL(table(), fill, 0, address(), round, size, stream.get()), "fill");
    must(CALL(table(), digest, 0, kSeed, extent, std::size_t{1}, results + round, stream.get()),
         "digest");
  }
  must(CALL(table(), stream_synchronize, 0, stream.get()), "stream_synchronize");
  for (std::uint8_t round = 0; round < 3; ++round) {
    std::memset(bytes(), round, size);
    EXPECT_EQ(results[round], on_cpu(bytes(), size)) << int{round};
  }
}

TEST_P(DigestConformance, C14_NoExtentsNeedNoArrays) {
  EXPECT_EQ(CALL(table(), digest, 0, kSeed, nullptr, std::size_t{0}, nullptr, cumempool_stream{0}),
            CUMEMPOOL_RESULT_SUCCESS);
}

TEST_P(DigestConformance, C14_ExtentsThatAreNoMultiplesOfSixteenAreRefused) {
  const HostBuffer arrays(table(), 4096);
  auto* const extents = reinterpret_cast<cumempool_extent*>(arrays.data());
  auto* const results = reinterpret_cast<cumempool_digest*>(extents + 2);
  const auto result_of = [&](cumempool_extent second) {
    extents[0] = {address(), 4096};
    extents[1] = second;
    return CALL(table(), digest, 0, kSeed, extents, std::size_t{2}, results, cumempool_stream{0});
  };
  EXPECT_EQ(result_of({address() + 8, 32}), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(result_of({address(), 24}), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(result_of({address(), 0}), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(result_of({address(), (std::uint64_t{1} << 32) + 16}), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(result_of({address(), 32}), CUMEMPOOL_RESULT_SUCCESS);
  must(CALL(table(), stream_synchronize, 0, cumempool_stream{0}), "stream_synchronize");
  EXPECT_EQ(results[1], on_cpu(bytes(), 32));
}

TEST_P(DigestConformance, C14_ArraysLieInRegisteredMemory) {
  const HostBuffer arrays(table(), 8192);
  const HostBuffer plain(table(), 4096, /*registered=*/false);
  auto* const extents = reinterpret_cast<cumempool_extent*>(arrays.data());
  auto* const results = reinterpret_cast<cumempool_digest*>(arrays.data() + 4096);
  auto* const plain_extents = reinterpret_cast<cumempool_extent*>(plain.data());
  auto* const plain_results = reinterpret_cast<cumempool_digest*>(plain.data());
  *extents = *plain_extents = {address(), 4096};
  const auto result_of = [&](const cumempool_extent* from, cumempool_digest* to) {
    return CALL(table(), digest, 0, kSeed, from, std::size_t{1}, to, cumempool_stream{0});
  };
  EXPECT_NE(result_of(plain_extents, results), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_NE(result_of(extents, plain_results), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_NE(result_of(nullptr, results), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_NE(result_of(extents, nullptr), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(result_of(extents, results), CUMEMPOOL_RESULT_SUCCESS);
  must(fence(table(), 0), "fence");
  EXPECT_EQ(*results, on_cpu(bytes(), 4096));
}

TEST_P(DigestConformance, C9_UnregisteringWaitsForTheDigestsThatUseIt) {
  const HostBuffer arrays(table(), 4096, /*registered=*/false);
  const Stream stream(table());
  must(CALL(table(), host_register, 0, arrays.data(), std::size_t{4096}), "host_register");
  auto* const extent = reinterpret_cast<cumempool_extent*>(arrays.data());
  auto* const result = reinterpret_cast<cumempool_digest*>(extent + 1);
  *extent = {address(), 1u << 20};
  must(CALL(table(), digest, 0, kSeed, extent, std::size_t{1}, result, stream.get()), "digest");
  must(CALL(table(), host_unregister, 0, arrays.data()), "host_unregister");
  EXPECT_EQ(*result, on_cpu(bytes(), 1u << 20));
}

TEST_P(DigestConformance, C2_ThreadsAskForTheirFirstDigestAtTheSameTime) {
  std::vector<cumempool_digest> found(4);
  std::vector<std::thread> threads;
  threads.reserve(found.size());
  for (auto& result : found) {
    threads.emplace_back([&] {
      try {
        const Inside inside(table());
        const Stream stream(table());
        result = digests_of(table(), kSeed, {{address(), 1u << 20}}, stream.get()).front();
      } catch (const std::runtime_error& error) {
        ADD_FAILURE() << error.what();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& result : found) EXPECT_EQ(result, on_cpu(bytes(), 1u << 20));
}

}  // namespace
}  // namespace cumempool::conformance
