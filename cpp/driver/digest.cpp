// The digest of contents on the CPU.
#include "driver/digest.hpp"

#include <iterator>

namespace cumempool::driver {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the digest reads little-endian words");

// Returns the n-th output of splitmix64, counted from 1.
std::uint64_t splitmix64(std::uint64_t seed, std::uint64_t n) {
  std::uint64_t hash = seed + n * 0x9e3779b97f4a7c15u;
  hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
  hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
  return hash ^ (hash >> 31);
}

// Returns the fastest function for this processor.
DigestTiles digest_tiles() noexcept {
  static const DigestTiles fast = digest_tiles_avx2();
  return fast != nullptr ? fast : digest_tiles_portable;
}

}  // namespace

DigestKeys digest_keys(std::uint64_t seed) {
  DigestKeys keys{};
  std::uint64_t n = 0;
  for (std::size_t i = 0; i < std::size(keys.nh); i += 2) {
    const std::uint64_t both = splitmix64(seed, ++n);
    keys.nh[i] = static_cast<std::uint32_t>(both);
    keys.nh[i + 1] = static_cast<std::uint32_t>(both >> 32);
  }
  for (std::uint64_t& key : keys.position) key = splitmix64(seed, ++n) | 1;
  for (std::uint64_t& key : keys.finish) key = splitmix64(seed, ++n);
  return keys;
}

void digest_tiles_portable(const unsigned char* address, std::uint32_t tile, std::size_t tiles,
                           const DigestKeys& keys, cumempool_digest& sums) {
  for (; tiles != 0; --tiles, ++tile, address += kDigestTileBytes) {
    digest_prefetch(address, tiles * kDigestTileBytes);
    for (std::uint32_t lane = 0; lane < kDigestUnitsPerTile; ++lane) {
      digest_lane(address, kDigestTileBytes, tile, lane, keys, sums);
    }
  }
}

void Digester::add(const std::byte* data, std::size_t bytes) noexcept {
  const auto* address = reinterpret_cast<const unsigned char*>(data);
  const auto tile = static_cast<std::uint32_t>(bytes_ / kDigestTileBytes);
  const std::size_t tiles = bytes / kDigestTileBytes;
  const auto rest = static_cast<std::uint32_t>(bytes % kDigestTileBytes);
  bytes_ += bytes;
  digest_tiles()(address, tile, tiles, keys_, sums_);
  if (rest == 0) return;
  for (std::uint32_t lane = 0; lane < kDigestUnitsPerTile; ++lane) {
    digest_lane(address + tiles * kDigestTileBytes, rest, tile + static_cast<std::uint32_t>(tiles),
                lane, keys_, sums_);
  }
}

cumempool_digest Digester::finish() const noexcept {
  return {digest_finish(sums_.low, keys_.finish[0], bytes_),
          digest_finish(sums_.high, keys_.finish[1], bytes_)};
}

cumempool_digest digest_on_cpu(std::uint64_t seed, const std::byte* data,
                               std::size_t bytes) noexcept {
  Digester digester(seed);
  digester.add(data, bytes);
  return digester.finish();
}

}  // namespace cumempool::driver
