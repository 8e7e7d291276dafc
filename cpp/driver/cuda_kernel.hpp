// One kernel in one context of the `cuda` driver. libcuda compiles its PTX, which the library
// carries, at the first use there.
#pragma once

#include <cuda.h>

#include <mutex>

#include "cumempool/driver.h"
#include "driver/cuda_library.hpp"

namespace cumempool::driver {

class CudaKernel {
 public:
  // Whether this libcuda has the functions that kernels need.
  static bool supported(const Symbols& cu) noexcept;

  // Compiles the kernel `name` of the PTX for the current context, once. Needs supported(). Returns
  // NOT_SUPPORTED for good after libcuda has refused to compile for the device.
  cumempool_result load(const Symbols& cu, const char* ptx, const char* name, CUfunction& kernel);

  // Unloads the code in the context that loaded it. None of it may be running.
  void unload(const Symbols& cu);
  // The same if that context cannot be made current: it is gone, and the code with it.
  void forget();

 private:
  std::mutex mutex_;  // guards everything below
  CUmodule module_ = nullptr;
  CUfunction kernel_ = nullptr;
  bool refused_ = false;
};

}  // namespace cumempool::driver
