// The digest on the GPU: one block of kDigestThreads threads per extent. scripts/make_digest_ptx.sh
// compiles it to PTX with clang alone, without any header of CUDA.
#include "cumempool/driver.h"
#include "digest_definition.hpp"

namespace {

using cumempool::driver::DigestKeys;

constexpr uint32_t kWarpThreads = 32;
constexpr uint32_t kWarps = cumempool::driver::kDigestThreads / kWarpThreads;

__attribute__((device)) uint64_t from_lane_below(uint64_t value, int distance) {
  const int low = __nvvm_shfl_sync_down_i32(0xffffffffu, static_cast<int>(value), distance, 31);
  const int high =
      __nvvm_shfl_sync_down_i32(0xffffffffu, static_cast<int>(value >> 32), distance, 31);
  return (static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32) | static_cast<uint32_t>(low);
}

// Returns the sum over the warp to lane 0.
__attribute__((device)) cumempool_digest sum_of_warp(cumempool_digest sums) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sums.low += from_lane_below(sums.low, distance);
    sums.high += from_lane_below(sums.high, distance);
  }
  return sums;
}

}  // namespace

// Both arrays are host memory. One thread reads an extent, so that it crosses the bus once.
extern "C" __attribute__((global, launch_bounds(256))) void cumempool_digest_kernel(
    const cumempool_extent* extents, cumempool_digest* digests, const DigestKeys keys) {
  __attribute__((shared)) static cumempool_extent extent;
  __attribute__((shared)) static cumempool_digest of_warp[kWarps];
  const uint32_t block = __nvvm_read_ptx_sreg_ctaid_x();
  const uint32_t thread = __nvvm_read_ptx_sreg_tid_x();
  if (thread == 0) extent = extents[block];
  __syncthreads();

  const auto* data = reinterpret_cast<const unsigned char*>(extent.address);
  const cumempool_digest of_thread =
      cumempool::driver::digest_thread(data, extent.bytes, thread, keys);
  const cumempool_digest summed = sum_of_warp(of_thread);
  if (thread % kWarpThreads == 0) of_warp[thread / kWarpThreads] = summed;
  __syncthreads();

  if (thread == 0) {
    cumempool_digest total = {0, 0};
    for (uint32_t warp = 0; warp < kWarps; ++warp) {
      total.low += of_warp[warp].low;
      total.high += of_warp[warp].high;
    }
    total.low = cumempool::driver::digest_finish(total.low, keys.finish[0], extent.bytes);
    total.high = cumempool::driver::digest_finish(total.high, keys.finish[1], extent.bytes);
    digests[block] = total;
  }
}
