// The digest on the CPU: its definition by known values and by a second, plain implementation; what
// a GPU would compute of the same source; and that it tells contents apart.
#include "driver/digest.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <set>
#include <vector>

namespace cumempool::driver {
namespace {

using Bytes = std::vector<std::byte>;

Bytes pattern(std::size_t bytes) {
  Bytes data(bytes);
  for (std::size_t i = 0; i < bytes; ++i) {
    data[i] = static_cast<std::byte>(i * i + 3 * i + (i >> 8));
  }
  return data;
}

cumempool_digest digest_of(const Bytes& data, std::uint64_t seed = 1) {
  return digest_on_cpu(seed, data.data(), data.size());
}

// From the words of digest_definition.hpp, one unit after the other, with nothing of its code.
class Reference {
 public:
  explicit Reference(std::uint64_t seed) : state_(seed) {
    for (std::size_t i = 0; i < nh_.size(); i += 2) {
      const std::uint64_t both = next();
      nh_[i] = static_cast<std::uint32_t>(both);
      nh_[i + 1] = static_cast<std::uint32_t>(both >> 32);
    }
    for (auto& key : position_) key = next() | 1;
    for (auto& key : finish_) key = next();
  }

  cumempool_digest of(Bytes data) const {
    const std::uint64_t bytes = data.size();
    data.resize((bytes + 2047) / 2048 * 2048);
    std::array<std::uint64_t, 2> sums{};
    for (std::uint64_t unit = 0; unit < data.size() / 64; ++unit) add(data, unit, sums);
    return {avalanche(sums[0] ^ (finish_[0] + bytes)), avalanche(sums[1] ^ (finish_[1] + bytes))};
  }

 private:
  __extension__ using Wide = unsigned __int128;

  std::uint64_t next() {
    state_ += 0x9e3779b97f4a7c15u;
    std::uint64_t hash = (state_ ^ (state_ >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    return hash ^ (hash >> 31);
  }

  static std::uint64_t avalanche(std::uint64_t hash) {
    hash = (hash ^ (hash >> 33)) * 0xff51afd7ed558ccdu;
    hash = (hash ^ (hash >> 33)) * 0xc4ceb9fe1a85ec53u;
    return hash ^ (hash >> 33);
  }

  static std::uint64_t mix(std::uint64_t x, std::uint64_t y) {
    const Wide product = static_cast<Wide>(x) * y;
    const auto fold = static_cast<std::uint64_t>(product >> 64 ^ product);
    return fold + (x ^ (y << 32 | y >> 32));
  }

  void add(const Bytes& data, std::uint64_t unit, std::array<std::uint64_t, 2>& sums) const {
    std::array<std::uint32_t, 16> words{};
    for (std::size_t chunk = 0; chunk < 4; ++chunk) {
      const std::uint64_t at = unit / 32 * 2048 + (unit % 32 + 32 * chunk) * 16;
      std::memcpy(&words[4 * chunk], &data[at], 16);
    }
    std::array<std::uint64_t, 4> factors{};
    for (std::size_t s = 0; s < 4; ++s) {
      std::uint64_t sum = position_[s] * (2 * unit + 1);
      for (std::size_t p = 0; p < 8; ++p) {
        const std::uint32_t even = words[2 * p] + nh_[2 * (p + s)];
        const std::uint32_t odd = words[2 * p + 1] + nh_[2 * (p + s) + 1];
        sum += std::uint64_t{even} * odd;
      }
      factors[s] = sum;
    }
    sums[0] += mix(factors[0], factors[1]);
    sums[1] += mix(factors[2], factors[3]);
  }

  std::uint64_t state_;
  std::array<std::uint32_t, 22> nh_{};
  std::array<std::uint64_t, 4> position_{};
  std::array<std::uint64_t, 2> finish_{};
};

TEST(Digest, HasTheValuesThatWereWrittenDown) {
  struct Known {
    std::uint64_t seed;
    std::size_t bytes;
    cumempool_digest digest;
  };
  // From an implementation in Python. A digest may be kept in a file: these never change.
  const std::array<Known, 5> known{{
      {0x0u, 16, {0x3b8ae3b4ceea0fbdu, 0xb289e54967575af9u}},
      {0x0u, 2048, {0xb633575e0cc37b30u, 0x1d4a84dd9b9353adu}},
      {0x1u, 2064, {0x8e5289a610ef2096u, 0x16aa55c40c262d14u}},
      {0x1u, 65536, {0x2bef4efd5478c444u, 0x744295a98996e129u}},
      {0xfedcba9876543210u, 10000, {0x221f331dabd4cf05u, 0x9a2e62ea9f0a6f73u}},
  }};
  for (const Known& value : known) {
    EXPECT_EQ(digest_of(pattern(value.bytes), value.seed), value.digest) << value.bytes;
  }
}

TEST(Digest, IsWhatTheDefinitionSays) {
  for (const std::size_t bytes : {0u, 16u, 48u, 496u, 512u, 528u, 1536u, 1552u, 2032u, 2048u, 2064u,
                                  4096u, 65536u - 16u, 65536u, 200'000u}) {
    for (const std::uint64_t seed : {std::uint64_t{0}, std::uint64_t{42}, ~std::uint64_t{0}}) {
      EXPECT_EQ(digest_of(pattern(bytes), seed), Reference(seed).of(pattern(bytes))) << bytes;
    }
  }
}

TEST(Digest, PartsGiveTheDigestOfTheWhole) {
  const Bytes data = pattern(10 * 2048 + 80);
  for (const std::size_t tiles : {1u, 3u, 10u}) {
    Digester digester(1);
    std::size_t done = 0;
    for (; data.size() - done > tiles * 2048; done += tiles * 2048) {
      digester.add(data.data() + done, tiles * 2048);
    }
    digester.add(data.data() + done, data.size() - done);
    EXPECT_EQ(digester.finish(), digest_of(data)) << tiles;
  }
}

// The threads of the kernel, one after the other: all but its shuffles and its launch.
TEST(Digest, ThreadsOfTheKernelAddUpToTheDigest) {
  const DigestKeys keys = digest_keys(1);
  for (const std::size_t bytes : {16u, 512u, 2032u, 2048u, 2064u, 7 * 2048u + 16u, 8 * 2048u,
                                  8 * 2048u + 16u, 9 * 2048u - 16u, 1u << 20, (3u << 20) + 48u}) {
    const Bytes data = pattern(bytes);
    const auto* address = reinterpret_cast<const unsigned char*>(data.data());
    cumempool_digest sums{0, 0};
    for (std::uint32_t thread = 0; thread < kDigestThreads; ++thread) {
      const cumempool_digest part = digest_thread(address, bytes, thread, keys);
      sums.low += part.low;
      sums.high += part.high;
    }
    const cumempool_digest total{digest_finish(sums.low, keys.finish[0], bytes),
                                 digest_finish(sums.high, keys.finish[1], bytes)};
    EXPECT_EQ(total, digest_of(data)) << bytes;
  }
}

TEST(Digest, Avx2GivesTheSumsOfAnyProcessor) {
  const DigestTiles avx2 = digest_tiles_avx2();
  if (avx2 == nullptr) GTEST_SKIP() << "this processor has no AVX2";
  constexpr std::size_t most = 7;
  const Bytes data = pattern(most * kDigestTileBytes);
  const auto* address = reinterpret_cast<const unsigned char*>(data.data());
  constexpr std::uint32_t last_tile = (std::uint64_t{1} << 32) / kDigestTileBytes - most;
  for (const std::uint64_t seed : {std::uint64_t{0}, std::uint64_t{42}, ~std::uint64_t{0}}) {
    const DigestKeys keys = digest_keys(seed);
    for (std::size_t tiles = 0; tiles <= most; ++tiles) {
      for (const std::uint32_t tile : {0u, 1u, 511u, last_tile}) {
        cumempool_digest expected{seed, 1};
        cumempool_digest sums{seed, 1};
        digest_tiles_portable(address, tile, tiles, keys, expected);
        avx2(address, tile, tiles, keys, sums);
        EXPECT_EQ(sums.low, expected.low) << tiles << " from " << tile;
        EXPECT_EQ(sums.high, expected.high) << tiles << " from " << tile;
      }
    }
  }
}

TEST(Digest, AddressesNeedNoAlignmentOnTheCpu) {
  const Bytes data = pattern(5000);
  Bytes shifted(data.size() + 1);
  std::copy(data.begin(), data.end(), shifted.begin() + 1);
  EXPECT_EQ(digest_on_cpu(1, shifted.data() + 1, 4992), digest_on_cpu(1, data.data(), 4992));
}

TEST(Digest, TakesMultiplesOfSixteenUpToFourGiB) {
  EXPECT_TRUE(digest_takes(0, 16));
  EXPECT_TRUE(digest_takes(4096, std::uint64_t{1} << 32));
  EXPECT_FALSE(digest_takes(4096, (std::uint64_t{1} << 32) + 16));
  EXPECT_FALSE(digest_takes(4096, 0));
  EXPECT_FALSE(digest_takes(4096, 24));
  EXPECT_FALSE(digest_takes(4104, 16));
}

int bits_that_differ(std::uint64_t a, std::uint64_t b) { return __builtin_popcountll(a ^ b); }

TEST(Digest, EveryBitOfTheContentsChangesHalfOfEachHalf) {
  Bytes data = pattern(2 * 2048 + 32);
  const cumempool_digest before = digest_of(data);
  int low = 0;
  int high = 0;
  const std::size_t bits = 8 * data.size();
  for (std::size_t bit = 0; bit < bits; ++bit) {
    const auto mask = static_cast<std::byte>(1u << bit % 8);
    data[bit / 8] ^= mask;
    const cumempool_digest after = digest_of(data);
    data[bit / 8] ^= mask;
    // 64 fair coins leave 8 to 56 all of the 33,000 times, but for one time in a million.
    EXPECT_NEAR(bits_that_differ(before.low, after.low), 32, 24) << bit;
    EXPECT_NEAR(bits_that_differ(before.high, after.high), 32, 24) << bit;
    low += bits_that_differ(before.low, after.low);
    high += bits_that_differ(before.high, after.high);
  }
  const double flips = static_cast<double>(bits) * 64;
  EXPECT_NEAR(low / flips, 0.5, 0.005);
  EXPECT_NEAR(high / flips, 0.5, 0.005);
}

TEST(Digest, ExchangedPartsOfAnySizeShow) {
  const Bytes data = pattern(32768);
  const cumempool_digest before = digest_of(data);
  for (const std::size_t part : {4u, 8u, 16u, 64u, 512u, 2048u, 4096u, 16384u}) {
    for (const std::size_t distance :
         {part, std::size_t{512}, std::size_t{2048}, std::size_t{16384}}) {
      if (distance < part || part + distance > data.size()) continue;
      Bytes other = data;
      std::swap_ranges(other.begin(), other.begin() + static_cast<std::ptrdiff_t>(part),
                       other.begin() + static_cast<std::ptrdiff_t>(distance));
      const cumempool_digest after = digest_of(other);
      EXPECT_NE(after.low, before.low) << part << " at a distance of " << distance;
      EXPECT_NE(after.high, before.high) << part << " at a distance of " << distance;
    }
  }
}

// A unit is its lane's chunks; two of a tile change places, and one moves to the next tile.
TEST(Digest, ExchangedUnitsShow) {
  const Bytes data = pattern(4096);
  const auto exchange = [&](std::size_t first, std::size_t second) {
    Bytes other = data;
    for (std::size_t chunk = 0; chunk < 4; ++chunk) {
      std::swap_ranges(other.begin() + static_cast<std::ptrdiff_t>(first + 512 * chunk),
                       other.begin() + static_cast<std::ptrdiff_t>(first + 512 * chunk + 16),
                       other.begin() + static_cast<std::ptrdiff_t>(second + 512 * chunk));
    }
    return digest_of(other);
  };
  EXPECT_NE(exchange(0, 16).low, digest_of(data).low);
  EXPECT_NE(exchange(0, 16).high, digest_of(data).high);
  EXPECT_NE(exchange(32, 2048 + 32).low, digest_of(data).low);
  EXPECT_NE(exchange(32, 2048 + 32).high, digest_of(data).high);
}

TEST(Digest, RepeatedContentsDifferByWhereTheyAre) {
  std::set<std::uint64_t> lows;
  std::set<std::uint64_t> highs;
  constexpr std::size_t places = 512;
  for (std::size_t place = 0; place < places; ++place) {
    Bytes data(places * 16);
    std::fill_n(data.begin() + static_cast<std::ptrdiff_t>(16 * place), 16, std::byte{7});
    const cumempool_digest found = digest_of(data);
    lows.insert(found.low);
    highs.insert(found.high);
  }
  EXPECT_EQ(lows.size(), places);
  EXPECT_EQ(highs.size(), places);
}

TEST(Digest, RunsOfOneByteDifferByTheirLength) {
  for (const int byte : {0, 0xff}) {
    std::set<std::uint64_t> lows;
    std::set<std::uint64_t> highs;
    const Bytes data(10240, static_cast<std::byte>(byte));
    for (std::size_t bytes = 0; bytes <= data.size(); bytes += 16) {
      const cumempool_digest found = digest_on_cpu(1, data.data(), bytes);
      lows.insert(found.low);
      highs.insert(found.high);
    }
    EXPECT_EQ(lows.size(), data.size() / 16 + 1) << byte;
    EXPECT_EQ(highs.size(), data.size() / 16 + 1) << byte;
  }
}

TEST(Digest, NeighbouringSeedsHaveNothingInCommon) {
  const Bytes data = pattern(2048);
  std::set<std::uint64_t> halves;
  for (std::uint64_t seed = 0; seed < 1000; ++seed) {
    const cumempool_digest found = digest_of(data, seed);
    halves.insert(found.low);
    halves.insert(found.high);
  }
  EXPECT_EQ(halves.size(), 2000u);
}

// Keys that are 0 leave the contents alone in NH, so that contents can be chosen against them; the
// part added to the product keeps what the other factor says.
TEST(Digest, AFactorOfZeroDoesNotHideTheOther) {
  EXPECT_NE(digest_mix(0, 1), digest_mix(0, 2));
  EXPECT_NE(digest_mix(1, 0), digest_mix(2, 0));
  EXPECT_NE(digest_mix(0, 1), digest_mix(1, 0));
}

std::ptrdiff_t count_different(std::vector<std::uint64_t> values) {
  std::sort(values.begin(), values.end());
  return std::unique(values.begin(), values.end()) - values.begin();
}

// 2^20 contents that a weak hash confuses: counters, sparse and shifted bits.
TEST(Digest, DigestsOfAMillionSmallContentsLookRandom) {
  constexpr std::uint32_t count = 1u << 20;
  // Low, high, and the four halves of these.
  std::array<std::vector<std::uint64_t>, 6> parts;
  std::array<std::array<std::uint64_t, 64>, 2> ones{};
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::array<std::uint32_t, 8> words{i, 0, 0, i % 3, 0, i << 12, i / 1024, 0};
    const cumempool_digest found =
        digest_on_cpu(1, reinterpret_cast<const std::byte*>(words.data()), sizeof(words));
    const std::array<std::uint64_t, 6> values{found.low,        found.high,      found.low >> 32,
                                              found.high >> 32, found.low << 32, found.high << 32};
    for (std::size_t part = 0; part < parts.size(); ++part) parts[part].push_back(values[part]);
    for (std::size_t bit = 0; bit < 64; ++bit) {
      ones[0][bit] += found.low >> bit & 1;
      ones[1][bit] += found.high >> bit & 1;
    }
  }
  EXPECT_EQ(count_different(parts[0]), count);
  EXPECT_EQ(count_different(parts[1]), count);
  for (std::size_t part = 2; part < parts.size(); ++part) {
    // Of 2^20 random numbers of 32 bits, 128 agree with another one; within six deviations.
    EXPECT_NEAR(static_cast<double>(count - count_different(parts[part])), 128, 6 * 11.4);
  }
  for (const auto& ones_of_half : ones) {
    for (const std::uint64_t of_bit : ones_of_half) {
      // Six standard deviations of a fair coin, which are 512.
      EXPECT_NEAR(static_cast<double>(of_bit), count / 2.0, 6 * 512.0);
    }
  }
}

}  // namespace
}  // namespace cumempool::driver
