// The digest kernel in one context of the `cuda` driver: PTX that the library carries, compiled by
// libcuda at its first use there.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "cumempool/driver.h"
#include "driver/cuda_library.hpp"

namespace cumempool::driver {

class CudaDigest {
 public:
  // The entry `digest`, in the context that is current. Says NOT_SUPPORTED for good once libcuda
  // could not make code for the device.
  cumempool_result submit(const Symbols& cu, std::uint64_t seed, const cumempool_extent* extents,
                          std::size_t count, cumempool_digest* digests, CUstream stream);

  // Gives the code back, in the context that it was loaded in; none of it runs any more.
  void unload(const Symbols& cu);
  // The same where that context cannot be made current: it is gone, and the code with it.
  void forget();

 private:
  cumempool_result load(const Symbols& cu, CUfunction& kernel);

  std::mutex mutex_;  // guards everything below
  CUmodule module_ = nullptr;
  CUfunction kernel_ = nullptr;
  bool refused_ = false;
};

}  // namespace cumempool::driver
