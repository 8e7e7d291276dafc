// Waits for all work of a device of the `cuda` driver, by the first of three ways that was seen to
// wait on this very device.
#pragma once

#include <cuda.h>

#include <atomic>
#include <mutex>

#include "cumempool/driver.h"
#include "driver/cuda_library.hpp"

namespace cumempool::driver {

class CudaFence {
 public:
  // Waits for the device of the current context. The caller has relaxed the thread's capture mode.
  // The first call tries the ways with work of its own. Returns NOT_SUPPORTED if none of them
  // waits.
  cumempool_result wait(const Symbols& cu, CUdevice device);

  // The way in use: a cumempool_fence_way.
  int way() const noexcept { return way_; }

  // Frees the block that a way keeps, in the context of its allocation. The way stays chosen.
  void release(const Symbols& cu);
  // The same if that context cannot be made current: it is gone, and the block with it.
  void forget();

 private:
  cumempool_result choose(const Symbols& cu, CUdevice device);
  cumempool_result wait_by(const Symbols& cu, int way);
  cumempool_result allocate_and_free(const Symbols& cu);

  std::mutex mutex_;  // guards the choice and the block
  std::atomic<int> way_{CUMEMPOOL_FENCE_UNTRIED};
  CUdeviceptr kept_ = 0;
};

}  // namespace cumempool::driver
