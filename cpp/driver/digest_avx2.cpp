// Sums whole tiles with AVX2. Two neighbouring units lie side by side in each of the four rows of
// chunks of a tile. A vector holds two pairs of words of each.
#include "driver/digest.hpp"

#ifdef __x86_64__

#include <immintrin.h>

#include <array>

#define CUMEMPOOL_AVX2 __attribute__((target("avx2")))

namespace cumempool::driver {
namespace {

constexpr std::size_t kRows = 4;
constexpr std::size_t kRowBytes = std::size_t{kDigestUnitsPerTile} * kDigestChunkBytes;
constexpr std::size_t kUnitsAtATime = 2;
constexpr std::size_t kSums = 4;

// Returns a pair of NH keys as the two words to add to two words of a unit.
std::int64_t key_pair(const DigestKeys& keys, std::size_t pair) {
  return static_cast<std::int64_t>(keys.nh[2 * pair] | std::uint64_t{keys.nh[2 * pair + 1]} << 32);
}

CUMEMPOOL_AVX2 inline __m256i load(const unsigned char* address) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(address));
}

// Returns the products of two position keys for the factors of a mix, for two units from `unit` on.
CUMEMPOOL_AVX2 inline __m256i places(const std::uint64_t* keys, std::uint64_t unit) {
  const std::uint64_t place = 2 * unit + 1;
  const auto times = [](std::uint64_t a, std::uint64_t b) {
    return static_cast<std::int64_t>(a * b);
  };
  return _mm256_set_epi64x(times(keys[1], place + 2), times(keys[0], place + 2),
                           times(keys[1], place), times(keys[0], place));
}

// Returns the difference of `places` between two units and the next two.
CUMEMPOOL_AVX2 inline __m256i steps(const std::uint64_t* keys) {
  const auto first = static_cast<std::int64_t>(keys[0] * 2 * kUnitsAtATime);
  const auto second = static_cast<std::int64_t>(keys[1] * 2 * kUnitsAtATime);
  return _mm256_set_epi64x(second, first, second, first);
}

// Adds the mixes of two units; `a` and `b` hold their two factors, each in two parts.
CUMEMPOOL_AVX2 inline std::uint64_t mix_both(__m256i a, __m256i b, __m256i place) {
  const __m256i sums = _mm256_add_epi64(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  alignas(32) std::array<std::uint64_t, 4> factors{};
  _mm256_store_si256(reinterpret_cast<__m256i*>(factors.data()), _mm256_add_epi64(sums, place));
  return digest_mix(factors[0], factors[1]) + digest_mix(factors[2], factors[3]);
}

CUMEMPOOL_AVX2 void add_tiles(const unsigned char* address, std::uint32_t tile, std::size_t tiles,
                              const DigestKeys& keys, cumempool_digest& sums) {
  constexpr std::size_t pairs = 2 * kRows + kSums - 2;
  __m256i key[pairs];
  for (std::size_t pair = 0; pair < pairs; ++pair) {
    const std::int64_t first = key_pair(keys, pair);
    const std::int64_t second = key_pair(keys, pair + 1);
    key[pair] = _mm256_set_epi64x(second, first, second, first);
  }
  const std::uint64_t unit = std::uint64_t{tile} * kDigestUnitsPerTile;
  __m256i low_places = places(keys.position, unit);
  __m256i high_places = places(keys.position + 2, unit);
  const __m256i low_steps = steps(keys.position);
  const __m256i high_steps = steps(keys.position + 2);
  for (std::size_t left = tiles; left != 0; --left, address += kDigestTileBytes) {
    digest_prefetch(address, left * kDigestTileBytes);
    for (std::size_t at = 0; at < kRowBytes; at += kUnitsAtATime * kDigestChunkBytes) {
      __m256i sum[kSums] = {};
#pragma GCC unroll 4
      for (std::size_t row = 0; row < kRows; ++row) {
        const __m256i words = load(address + row * kRowBytes + at);
#pragma GCC unroll 4
        for (std::size_t s = 0; s < kSums; ++s) {
          const __m256i keyed = _mm256_add_epi32(words, key[2 * row + s]);
          const __m256i odd = _mm256_shuffle_epi32(keyed, 0xF5);
          sum[s] = _mm256_add_epi64(sum[s], _mm256_mul_epu32(keyed, odd));
        }
      }
      sums.low += mix_both(sum[0], sum[1], low_places);
      sums.high += mix_both(sum[2], sum[3], high_places);
      low_places = _mm256_add_epi64(low_places, low_steps);
      high_places = _mm256_add_epi64(high_places, high_steps);
    }
  }
}

}  // namespace

DigestTiles digest_tiles_avx2() noexcept {
  return __builtin_cpu_supports("avx2") ? add_tiles : nullptr;
}

}  // namespace cumempool::driver

#else

namespace cumempool::driver {

DigestTiles digest_tiles_avx2() noexcept { return nullptr; }

}  // namespace cumempool::driver

#endif
