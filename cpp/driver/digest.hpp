// The digest of contents on the CPU; digest_definition.hpp defines it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cumempool/driver.h"
#include "driver/digest_definition.hpp"

namespace cumempool::driver {

DigestKeys digest_keys(std::uint64_t seed);

// Computes the digest of bytes that come in parts.
class Digester {
 public:
  explicit Digester(std::uint64_t seed) : keys_(digest_keys(seed)) {}

  // Each part but the last is a multiple of kDigestTileBytes, the last one of
  // CUMEMPOOL_DIGEST_ALIGNMENT. All parts together have at most 2^32 bytes.
  void add(const std::byte* data, std::size_t bytes) noexcept;
  cumempool_digest finish() const noexcept;

 private:
  DigestKeys keys_;
  cumempool_digest sums_{0, 0};  // of level 2
  std::uint64_t bytes_ = 0;
};

// Returns the digest of a multiple of CUMEMPOOL_DIGEST_ALIGNMENT bytes, at most 2^32.
cumempool_digest digest_on_cpu(std::uint64_t seed, const std::byte* data,
                               std::size_t bytes) noexcept;

// Whether digest() takes an extent of this address and size. 0 bytes have no digest.
constexpr bool digest_takes(std::uint64_t address, std::uint64_t bytes) noexcept {
  constexpr std::uint64_t most = std::uint64_t{1} << 32;
  return (address | bytes) % CUMEMPOOL_DIGEST_ALIGNMENT == 0 && bytes != 0 && bytes <= most;
}

// Adds `tiles` whole tiles from `address` on; the first one has the number `tile`. Two functions of
// this type give the same sums.
using DigestTiles = void (*)(const unsigned char* address, std::uint32_t tile, std::size_t tiles,
                             const DigestKeys& keys, cumempool_digest& sums);

// Follows the definition, one unit at a time, on any processor.
void digest_tiles_portable(const unsigned char* address, std::uint32_t tile, std::size_t tiles,
                           const DigestKeys& keys, cumempool_digest& sums);

// Adds two units at a time. Null if this processor has no AVX2.
DigestTiles digest_tiles_avx2() noexcept;

// Prefetches data behind the tile at `address`: its four streams are too short for a CPU to predict
// them. `bytes` remain from `address` on.
inline void digest_prefetch(const unsigned char* address, std::size_t bytes) noexcept {
  constexpr std::size_t ahead = 4096;
  constexpr std::size_t line = 64;
  if (bytes < ahead + std::size_t{2} * kDigestTileBytes) return;
  for (std::size_t i = 0; i < kDigestTileBytes; i += line) __builtin_prefetch(address + ahead + i);
}

}  // namespace cumempool::driver

// In the namespace of the struct, so that lookup finds them from anywhere.
inline bool operator==(const cumempool_digest& a, const cumempool_digest& b) noexcept {
  return a.low == b.low && a.high == b.high;
}
inline bool operator!=(const cumempool_digest& a, const cumempool_digest& b) noexcept {
  return !(a == b);
}
