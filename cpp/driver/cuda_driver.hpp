// Shared by the files of the `cuda` driver: its devices, and conversions between the numbers of the
// table and CUDA's handles.
#pragma once

#include <cuda.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "cumempool/driver.h"
#include "driver/cuda_fence.hpp"
#include "driver/cuda_kernel.hpp"
#include "driver/cuda_library.hpp"

namespace cumempool::driver {

// Addresses that the table holds, each with a second number that a caller must repeat: the bytes of
// a mapping, the device of an allocation. libcuda unmaps several ranges at once and even none, and
// frees memory that others have allocated. The contract takes exactly one pair (C6), so that a
// mistake shows at once.
class ExactPairs {
 public:
  // Returns false, without effect, if there is no host memory for one more.
  bool add(cumempool_address address, std::uint64_t with) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      pairs_.insert_or_assign(pairs_.end(), address, with);  // addresses mostly ascend
      return true;
    } catch (const std::bad_alloc&) {
      return false;
    }
  }

  // Forgets the pair if `give_back` succeeds, and keeps it otherwise. Fails with INVALID_VALUE,
  // without the call, unless it holds exactly this pair. Holds no lock during the call.
  template <typename GiveBack>
  cumempool_result remove(cumempool_address address, std::uint64_t with, GiveBack give_back) {
    std::map<cumempool_address, std::uint64_t>::node_type pair;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = pairs_.find(address);
      if (found == pairs_.end() || found->second != with) {
        return CUMEMPOOL_RESULT_INVALID_VALUE;
      }
      pair = pairs_.extract(found);
    }
    const cumempool_result result = give_back();
    if (result != CUMEMPOOL_RESULT_SUCCESS) {
      const std::lock_guard<std::mutex> lock(mutex_);
      pairs_.insert(std::move(pair));
    }
    return result;
  }

 private:
  std::mutex mutex_;
  std::map<cumempool_address, std::uint64_t> pairs_;
};

// A device and its primary context, while a caller of the table holds it.
struct PrimaryContext {
  CUdevice device = 0;
  std::mutex mutex;  // guards the count, and changes of the context
  int count = 0;
  std::atomic<CUcontext> context{nullptr};
  CUdeviceptr ahead = 0;  // a reservation that has libcuda hold addresses ready, or 0
  CudaKernel digest;
  CudaFence fence;
};

struct CudaDriver {
  Symbols cu;
  int device_count = 0;
  std::unique_ptr<PrimaryContext[]> devices;
  ExactPairs mapped;     // address, bytes
  ExactPairs allocated;  // address, device
  cumempool_driver table{};

  PrimaryContext* find(int device) const {
    return device >= 0 && device < device_count ? &devices[static_cast<std::size_t>(device)]
                                                : nullptr;
  }
};

// The device of this thread's innermost context_enter, or -1 (C3).
inline thread_local int entered_device = -1;

inline CudaDriver& driver_of(void* self) { return *static_cast<CudaDriver*>(self); }

inline cumempool_result result_of(CUresult result) { return static_cast<cumempool_result>(result); }

// The table carries CUDA's handles as numbers, so that its header needs none of CUDA's types.
template <typename Pointer>
Pointer pointer_of(std::uint64_t number) {
  return reinterpret_cast<Pointer>(number);  // NOLINT(performance-no-int-to-ptr)
}

inline CUstream stream_of(cumempool_stream stream) { return pointer_of<CUstream>(stream); }

inline CUevent event_of(cumempool_event event) { return pointer_of<CUevent>(event); }

template <typename Handle>
std::uint64_t number_of(Handle handle) {
  return static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(handle));
}

inline bool inside(int device) { return device >= 0 && entered_device == device; }

// Waits for all work of a device; returns at once if its primary context is not active (C10).
cumempool_result fence_device(CudaDriver& driver, int device);

// The entry of the table that calls the function of the same name.
template <auto Function, typename... Args>
cumempool_result entry(void* self, Args... args) {
  return Function(driver_of(self), args...);
}

// The same for a function that needs context_enter of its device (C3).
template <auto Function, typename... Args>
cumempool_result entry_in_context(void* self, int device, Args... args) {
  return inside(device) ? Function(driver_of(self), device, args...)
                        : CUMEMPOOL_RESULT_INVALID_CONTEXT;
}

// Each sets the entries of one family (entries.inc).
void fill_cuda_device_entries(cumempool_driver& table);
void fill_cuda_memory_entries(cumempool_driver& table);
void fill_cuda_work_entries(cumempool_driver& table);

}  // namespace cumempool::driver
