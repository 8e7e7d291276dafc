// The digest kernel of the `cuda` driver; digest_kernel.cu has its source.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "cumempool/driver.h"
#include "driver/cuda_kernel.hpp"
#include "driver/cuda_library.hpp"

namespace cumempool::driver {

extern const char* const kDigestPtx;
constexpr const char* kDigestKernelName = "cumempool_digest_kernel";

// The entry `digest`, in the context that is current and that `digest` belongs to.
cumempool_result submit_digests(const Symbols& cu, CudaKernel& digest, std::uint64_t seed,
                                const cumempool_extent* extents, std::size_t count,
                                cumempool_digest* digests, CUstream stream);

}  // namespace cumempool::driver
