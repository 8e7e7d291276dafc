// One kernel in one context of the `cuda` driver: PTX that the library carries, compiled by libcuda
// at its first use there.
#pragma once

#include <cuda.h>

#include <mutex>

#include "cumempool/driver.h"
#include "driver/cuda_library.hpp"

namespace cumempool::driver {

class CudaKernel {
 public:
  // Whether this libcuda has the calls that kernels need.
  static bool supported(const Symbols& cu) noexcept;

  // Compiles the kernel `name` of the PTX for the context that is current, once; for a libcuda that
  // supports kernels. Says NOT_SUPPORTED for good once libcuda could not make code for the device.
  cumempool_result load(const Symbols& cu, const char* ptx, const char* name, CUfunction& kernel);

  // Gives the code back, in the context that it was loaded in; none of it runs any more.
  void unload(const Symbols& cu);
  // The same where that context cannot be made current: it is gone, and the code with it.
  void forget();

 private:
  std::mutex mutex_;  // guards everything below
  CUmodule module_ = nullptr;
  CUfunction kernel_ = nullptr;
  bool refused_ = false;
};

}  // namespace cumempool::driver
