// The three ways to wait for a device, and the trial that chooses one.
#include "driver/cuda_fence.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <new>
#include <thread>

#include "driver/error.hpp"

namespace cumempool::driver {
namespace {

cumempool_result as_result(CUresult result) { return static_cast<cumempool_result>(result); }

// ---- the ways -----------------------------------------------------------------------------------

// Pins and unpins one page. Both wait for all work in flight on every stream of the device, and in
// RELAXED mode neither touches a capture. Takes no device memory, so it works on a full device.
cumempool_result register_and_unregister(const Symbols& cu) {
  const auto page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  // Each call maps a page of its own, so that threads fencing different devices do not wait for
  // each other.
  void* page =
      mmap(nullptr, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return CUMEMPOOL_RESULT_OPERATING_SYSTEM;
  CUresult result = cu.cuMemHostRegister(page, page_bytes, 0);
  if (result == CUDA_SUCCESS) {
    result = cu.cuMemHostUnregister(page);
    // The driver may still hold the page. Reusing its address would confuse a later pinning.
    if (result != CUDA_SUCCESS) return as_result(result);
  }
  munmap(page, page_bytes);
  return as_result(result);
}

// Documented to wait, but breaks every capture under way. Sees captures that involve the two
// default streams, and no others.
cumempool_result synchronize_context(const Symbols& cu) {
  for (CUstream stream : {CU_STREAM_LEGACY, CU_STREAM_PER_THREAD}) {
    CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
    const CUresult result = cu.cuStreamIsCapturing(stream, &status);
    // IMPLICIT (906): a blocking stream is capturing; asking has not disturbed it.
    const bool capturing = result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT ||
                           (result == CUDA_SUCCESS && status != CU_STREAM_CAPTURE_STATUS_NONE);
    if (capturing) return CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED;
    if (result != CUDA_SUCCESS) return as_result(result);
  }
  return as_result(cu.cuCtxSynchronize());
}

// ---- the trial ----------------------------------------------------------------------------------

constexpr auto kTrialTime = std::chrono::milliseconds(2);

void CUDA_CB take_time(void* done) {
  std::this_thread::sleep_for(kTrialTime);
  static_cast<std::atomic<bool>*>(done)->store(true);
}

// Work of a known length on a stream of its own. Captures of others do not notice it.
class TrialWork {
 public:
  explicit TrialWork(const Symbols& cu)
      : cu_(cu), done_(new(std::nothrow) std::atomic<bool>(false)) {
    if (done_ == nullptr) return;
    result_ = cu_.cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING);
    if (result_ != CUDA_SUCCESS) return;
    created_ = true;
    result_ = cu_.cuLaunchHostFunc(stream_, take_time, done_);
  }
  ~TrialWork() {
    const bool over = !created_ || cu_.cuStreamSynchronize(stream_) == CUDA_SUCCESS;
    if (created_) cu_.cuStreamDestroy(stream_);
    if (over) delete done_;  // otherwise the function may still run
  }
  TrialWork(const TrialWork&) = delete;
  TrialWork& operator=(const TrialWork&) = delete;

  cumempool_result result() const noexcept { return as_result(result_); }
  bool done() const noexcept { return done_->load(); }

 private:
  const Symbols& cu_;
  std::atomic<bool>* done_;
  CUstream stream_ = nullptr;
  bool created_ = false;
  CUresult result_ = CUDA_ERROR_OUT_OF_MEMORY;
};

// If so, cuMemHostRegister pins nothing (cuda.h), and unregistering need not wait.
bool uses_page_tables_of_the_host(const Symbols& cu, CUdevice device) {
  constexpr auto kAttribute = static_cast<CUdevice_attribute>(100);
  int value = 0;
  return cu.cuDeviceGetAttribute(&value, kAttribute, device) == CUDA_SUCCESS && value != 0;
}

}  // namespace

// Allocates and frees a block: cuMemFree waits for all work of the device, and in RELAXED mode both
// calls leave captures intact. Keeps one more block, so that a full device has room for this one.
cumempool_result CudaFence::allocate_and_free(const Symbols& cu) {
  constexpr std::size_t kBytes = 512;
  const std::lock_guard<std::mutex> lock(mutex_);
  CUdeviceptr block = 0;
  if (kept_ == 0) {
    const CUresult kept = cu.cuMemAlloc(&block, kBytes);
    if (kept != CUDA_SUCCESS) return as_result(kept);
    kept_ = block;
  }
  const CUresult result = cu.cuMemAlloc(&block, kBytes);
  return as_result(result == CUDA_SUCCESS ? cu.cuMemFree(block) : result);
}

cumempool_result CudaFence::wait_by(const Symbols& cu, int way) {
  switch (way) {
    case CUMEMPOOL_FENCE_HOST_REGISTRATION:
      return register_and_unregister(cu);
    case CUMEMPOOL_FENCE_ALLOCATION:
      return allocate_and_free(cu);
    case CUMEMPOOL_FENCE_CONTEXT:
      return synchronize_context(cu);
    default:
      return CUMEMPOOL_RESULT_NOT_SUPPORTED;
  }
}

// Tries the ways; the one that it finds has waited for all other work as well. If it cannot try,
// for example because the device has no memory left for a stream, the first way that succeeds
// serves this one call.
cumempool_result CudaFence::choose(const Symbols& cu, CUdevice device) {
  const int first = uses_page_tables_of_the_host(cu, device) ? CUMEMPOOL_FENCE_ALLOCATION
                                                             : CUMEMPOOL_FENCE_HOST_REGISTRATION;
  cumempool_result refused = CUMEMPOOL_RESULT_SUCCESS;  // the last way that could not be tried
  for (int way = first; way <= CUMEMPOOL_FENCE_CONTEXT; ++way) {
    const TrialWork work(cu);
    if (loses_context(work.result())) return work.result();
    const bool tried = work.result() == CUMEMPOOL_RESULT_SUCCESS && !work.done();
    const cumempool_result result = wait_by(cu, way);
    if (loses_context(result) || result == CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED) {
      return result;
    }
    if (result != CUMEMPOOL_RESULT_SUCCESS) {
      refused = result;
    } else if (!tried || work.done()) {
      if (tried) way_ = way;
      return result;
    }
  }
  if (refused != CUMEMPOOL_RESULT_SUCCESS) return refused;
  way_ = CUMEMPOOL_FENCE_NONE;
  return CUMEMPOOL_RESULT_NOT_SUPPORTED;
}

// Chooses again if the driver refuses a way that it accepted at first.
cumempool_result CudaFence::wait(const Symbols& cu, CUdevice device) {
  const int way = way_;
  if (way == CUMEMPOOL_FENCE_UNTRIED) return choose(cu, device);
  const cumempool_result result = wait_by(cu, way);
  const bool final = result == CUMEMPOOL_RESULT_SUCCESS || loses_context(result) ||
                     result == CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED ||
                     way == CUMEMPOOL_FENCE_NONE;
  return final ? result : choose(cu, device);
}

void CudaFence::release(const Symbols& cu) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (kept_ != 0) cu.cuMemFree(kept_);
  kept_ = 0;
}

void CudaFence::forget() {
  const std::lock_guard<std::mutex> lock(mutex_);
  kept_ = 0;
}

}  // namespace cumempool::driver
