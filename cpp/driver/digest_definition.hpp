// The 128-bit digest of contents, defined once for the CPU (digest.cpp) and the GPU
// (digest_kernel.cu).
//
// A keyed hash of two levels; its parts may be computed in any order:
//
//  Key      From a 64-bit seed, splitmix64 makes 22 words of 32 bits (nh), four odd words of 64
//           bits (position) and two more (finish).
//  Layout   The bytes, a multiple of 16 and at most 2^32, are tiles of 2048; zeros pad the last
//  one.
//           A tile is 128 chunks of 16 bytes. Unit l of a tile, l = 0..31, is its chunks l, l+32,
//           l+64 and l+96, read as 16 little-endian words w of 32 bits. Lane l of a warp owns unit
//           l, so the loads of a warp are contiguous.
//  Level 1  NH with Toeplitz keys, as in UMAC (RFC 4418): for s = 0..3,
//           A_s = sum over p = 0..7 of (w[2p] + nh[2(p+s)]) * (w[2p+1] + nh[2(p+s)+1]),
//           additions mod 2^32, products and their sum mod 2^64.
//  Level 2  Unit u, counted over all tiles, adds to two sums mod 2^64, with P = 2u + 1:
//           low  += mix(A_0 + position[0] P, A_1 + position[1] P)
//           high += mix(A_2 + position[2] P, A_3 + position[3] P)
//           mix(x, y) = (high half of x y ^ low half of x y) + (x ^ (y rotated by 32)).
//  Finish   fmix64 of MurmurHash3 over each sum ^ (finish + number of bytes).
//
// Why this form. Two units that differ agree in any one A_s with a probability of at most 2^-32,
// and in A_0 and A_1 together, or in A_2 and A_3, of at most 2^-64: the proven bound of NH. The
// fold of the product is wyhash's `mum`. Position goes into both factors, so that equal units at
// other places, zeros too, add other values. It also keeps an exchange of units from cancelling
// out, even if two units agree in one factor. Folding by ^ instead of + keeps the sums from being
// bilinear in the factors. If a factor is 0, the product forgets the other one, but the term added
// to it does not. If mix is taken for a random function, a lane misses a difference in any set of
// units with probability 2^-64 + 2^-64, and the two lanes, which have different keys, together with
// 2^-126. This is no cryptographic hash: anyone who knows the seed can make collisions.
#pragma once

#include <stdint.h>

#ifdef __CUDA__
#define CUMEMPOOL_DIGEST_FUNCTION __attribute__((device, always_inline)) inline
#else
#include <string.h>
#define CUMEMPOOL_DIGEST_FUNCTION inline
#endif

#include "cumempool/driver.h"

// In the functions below, `sums` holds the two sums of level 2 in a cumempool_digest, which
// digest_finish() turns into the digest.
namespace cumempool::driver {

enum : uint32_t {
  kDigestChunkBytes = 16,
  kDigestTileBytes = 2048,
  kDigestUnitsPerTile = 32,
  kDigestUnitWords = 16,
  kDigestThreads = 256  // GPU threads per extent
};

struct DigestKeys {
  uint64_t position[4];
  uint64_t finish[2];
  uint32_t nh[22];
};

CUMEMPOOL_DIGEST_FUNCTION uint64_t digest_fold(uint64_t x, uint64_t y) {
#ifdef __CUDA__
  return __nvvm_mulhi_ull(x, y) ^ (x * y);
#else
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(x) * y;
  return static_cast<uint64_t>(product >> 64) ^ static_cast<uint64_t>(product);
#endif
}

CUMEMPOOL_DIGEST_FUNCTION uint64_t digest_mix(uint64_t x, uint64_t y) {
  return digest_fold(x, y) + (x ^ ((y << 32) | (y >> 32)));
}

// Returns sum + key * position, in two multiplications of 32 bits on a GPU.
CUMEMPOOL_DIGEST_FUNCTION uint64_t digest_place(uint64_t sum, uint64_t key, uint32_t position) {
  const uint64_t low = static_cast<uint64_t>(static_cast<uint32_t>(key)) * position + sum;
  return low + (static_cast<uint64_t>(static_cast<uint32_t>(key >> 32) * position) << 32);
}

// Adds unit number `unit` with these words.
CUMEMPOOL_DIGEST_FUNCTION void digest_unit(const uint32_t* words, uint32_t unit,
                                           const DigestKeys& keys, cumempool_digest& sums) {
  uint64_t a[4] = {0, 0, 0, 0};
#pragma GCC unroll 8
  for (uint64_t p = 0; p < kDigestUnitWords / 2; ++p) {
#pragma GCC unroll 4
    for (uint64_t s = 0; s < 4; ++s) {
      const uint32_t even = words[2 * p] + keys.nh[2 * (p + s)];
      const uint32_t odd = words[2 * p + 1] + keys.nh[2 * (p + s) + 1];
      a[s] += static_cast<uint64_t>(even) * odd;
    }
  }
  const uint32_t place = 2 * unit + 1;
  sums.low += digest_mix(digest_place(a[0], keys.position[0], place),
                         digest_place(a[1], keys.position[1], place));
  sums.high += digest_mix(digest_place(a[2], keys.position[2], place),
                          digest_place(a[3], keys.position[3], place));
}

// Reads a chunk as four words.
CUMEMPOOL_DIGEST_FUNCTION void digest_load(const unsigned char* address, uint32_t* words) {
#ifdef __CUDA__
  // Through the read-only path. Not volatile, so that several loads are under way at a time.
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
      : "l"((const __attribute__((address_space(1))) unsigned char*)address));
#else
  memcpy(words, address, kDigestChunkBytes);
#endif
}

// Adds unit `lane` of tile `tile`. The tile begins at `address` and has `bytes` bytes before its
// padding.
CUMEMPOOL_DIGEST_FUNCTION void digest_lane(const unsigned char* address, uint32_t bytes,
                                           uint32_t tile, uint32_t lane, const DigestKeys& keys,
                                           cumempool_digest& sums) {
  uint32_t words[kDigestUnitWords] = {};
#pragma GCC unroll 4
  for (uint32_t c = 0; c < 4; ++c) {
    const uint32_t offset = (lane + c * kDigestUnitsPerTile) * kDigestChunkBytes;
    if (offset < bytes) digest_load(address + offset, &words[size_t{4} * c]);
  }
  digest_unit(words, tile * kDigestUnitsPerTile + lane, keys, sums);
}

// Returns the sums of GPU thread `thread` of kDigestThreads for an extent: its lane of every eighth
// tile.
CUMEMPOOL_DIGEST_FUNCTION cumempool_digest digest_thread(const unsigned char* address,
                                                         uint64_t bytes, uint32_t thread,
                                                         const DigestKeys& keys) {
  constexpr uint32_t warps = kDigestThreads / kDigestUnitsPerTile;
  const uint32_t lane = thread % kDigestUnitsPerTile;
  const auto whole_tiles = static_cast<uint32_t>(bytes / kDigestTileBytes);
  const auto rest = static_cast<uint32_t>(bytes % kDigestTileBytes);
  cumempool_digest sums = {0, 0};
  uint32_t tile = thread / kDigestUnitsPerTile;
  for (; tile < whole_tiles; tile += warps) {
    digest_lane(address + static_cast<uint64_t>(tile) * kDigestTileBytes, kDigestTileBytes, tile,
                lane, keys, sums);
  }
  if (tile == whole_tiles && rest != 0) {
    digest_lane(address + static_cast<uint64_t>(tile) * kDigestTileBytes, rest, tile, lane, keys,
                sums);
  }
  return sums;
}

CUMEMPOOL_DIGEST_FUNCTION uint64_t digest_finish(uint64_t sum, uint64_t key, uint64_t bytes) {
  uint64_t hash = sum ^ (key + bytes);
  hash = (hash ^ (hash >> 33)) * 0xff51afd7ed558ccdu;
  hash = (hash ^ (hash >> 33)) * 0xc4ceb9fe1a85ec53u;
  return hash ^ (hash >> 33);
}

}  // namespace cumempool::driver
