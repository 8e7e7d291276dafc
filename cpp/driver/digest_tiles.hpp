// Whole tiles of a digest on the CPU, in two ways that give the same sums.
#pragma once

#include <cstddef>
#include <cstdint>

#include "driver/digest_definition.hpp"

namespace cumempool::driver {

// Adds `tiles` whole tiles that begin at `address`, the first of which has the number `tile`.
using DigestTiles = void (*)(const unsigned char* address, std::uint32_t tile, std::size_t tiles,
                             const DigestKeys& keys, DigestSums& sums);

// As the definition has it, one unit at a time, on any processor.
void digest_tiles_portable(const unsigned char* address, std::uint32_t tile, std::size_t tiles,
                           const DigestKeys& keys, DigestSums& sums);

// Two units at a time; null where this processor has no AVX2.
DigestTiles digest_tiles_avx2() noexcept;

// Asks for what follows the tile at `address`: its four streams are too short for a CPU to see
// them coming. `bytes` is how many there are from `address` on.
inline void digest_prefetch(const unsigned char* address, std::size_t bytes) noexcept {
  constexpr std::size_t ahead = 4096;
  constexpr std::size_t line = 64;
  if (bytes < ahead + std::size_t{2} * kDigestTileBytes) return;
  for (std::size_t i = 0; i < kDigestTileBytes; i += line) __builtin_prefetch(address + ahead + i);
}

}  // namespace cumempool::driver
