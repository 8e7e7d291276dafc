// The entries of the `cuda` driver for ordinary device memory, host memory, streams, events, copies
// and digests; each needs its device's context.
#include <mutex>

#include "driver/cuda_state.hpp"
#include "driver/error.hpp"

namespace cumempool::driver {
namespace {

// Holds the primary context of a device that anybody in the process uses; none where nobody does.
class ActiveContext {
 public:
  ActiveContext(CudaDriver& driver, int device) : driver_(driver), device_(device) {
    PrimaryContext& found = *driver.find(device);
    {
      const std::lock_guard<std::mutex> lock(found.mutex);
      counted_ = found.count != 0;
      found.count += counted_ ? 1 : 0;
    }
    if (counted_) {
      context_ = found.context.load();
      return;
    }
    unsigned int flags = 0;
    int active = 0;
    result_ = driver.cu.cuDevicePrimaryCtxGetState(found.device, &flags, &active);
    if (result_ == CUDA_SUCCESS && active != 0) {
      result_ = driver.cu.cuDevicePrimaryCtxRetain(&context_, found.device);
    }
  }
  ~ActiveContext() {
    if (counted_) {
      driver_.table.context_release(&driver_, device_);
    } else if (context_ != nullptr) {
      driver_.cu.cuDevicePrimaryCtxRelease(driver_.find(device_)->device);
    }
  }
  ActiveContext(const ActiveContext&) = delete;
  ActiveContext& operator=(const ActiveContext&) = delete;

  CUcontext get() const noexcept { return context_; }
  CUresult result() const noexcept { return result_; }
  // Whether the table holds it for somebody else as well.
  bool counted() const noexcept { return counted_; }

 private:
  CudaDriver& driver_;
  int device_;
  bool counted_ = false;
  CUcontext context_ = nullptr;
  CUresult result_ = CUDA_SUCCESS;
};

// Waits for a device that anybody in the process uses. Its context is current meanwhile, and the
// thread's capture mode is the relaxed one.
cumempool_result fence_device(CudaDriver& driver, int device) {
  const Symbols& cu = driver.cu;
  const ActiveContext active(driver, device);
  if (active.get() == nullptr) return result_of(active.result());
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  CUresult result = cu.cuThreadExchangeStreamCaptureMode(&mode);
  if (result != CUDA_SUCCESS) return result_of(result);
  result = cu.cuCtxPushCurrent(active.get());
  cumempool_result fenced = result_of(result);
  if (result == CUDA_SUCCESS) {
    PrimaryContext& found = *driver.find(device);
    fenced = found.fence.wait(cu, found.device);
    if (!active.counted()) found.fence.release(cu);  // the context may be gone at any time
    CUcontext popped = nullptr;
    cu.cuCtxPopCurrent(&popped);
  }
  cu.cuThreadExchangeStreamCaptureMode(&mode);
  return fenced;
}

// One device that fails keeps none of the others from being waited for.
cumempool_result fence(void* self, const int* devices, std::size_t count) {
  CudaDriver& driver = driver_of(self);
  for (std::size_t i = 0; i < count; ++i) {
    if (driver.find(devices[i]) == nullptr) return CUMEMPOOL_RESULT_INVALID_DEVICE;
  }
  cumempool_result first = CUMEMPOOL_RESULT_SUCCESS;
  for (std::size_t i = 0; i < count; ++i) {
    const auto result = fence_device(driver, devices[i]);
    if (first == CUMEMPOOL_RESULT_SUCCESS) first = result;
  }
  return first;
}

cumempool_result allocate(void* self, int device, std::size_t bytes, cumempool_address* address) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  CudaDriver& driver = driver_of(self);
  CUdeviceptr pointer = 0;
  const CUresult result = driver.cu.cuMemAlloc(&pointer, bytes);
  if (result == CUDA_SUCCESS && !driver.allocated.add(pointer, static_cast<unsigned>(device))) {
    driver.cu.cuMemFree(pointer);
    return CUMEMPOOL_RESULT_OUT_OF_MEMORY;
  }
  *address = pointer;
  return result_of(result);
}

// cuMemFree waits for all work in flight on every stream of the device; in RELAXED mode, it leaves
// captures intact.
cumempool_result deallocate(void* self, int device, cumempool_address address) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  CudaDriver& driver = driver_of(self);
  return driver.allocated.remove(address, static_cast<unsigned>(device), [&driver, address] {
    return result_of(driver.cu.cuMemFree(address));
  });
}

cumempool_result host_register(void* self, int device, void* pointer, std::size_t bytes) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  // PORTABLE pins for every device; DEVICEMAP lets kernels use it, as digest() does.
  return result_of(driver_of(self).cu.cuMemHostRegister(
      pointer, bytes, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP));
}

// cuMemHostUnregister waits for the device of the current context only, and a copy of another one
// that is under way would fault. A device that cannot be waited for is lost and copies no more: it
// keeps nobody's memory pinned.
cumempool_result host_unregister(void* self, int device, void* pointer) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  CudaDriver& driver = driver_of(self);
  for (int other = 0; other < driver.device_count; ++other) {
    if (other == device) continue;
    const auto fenced = fence_device(driver, other);
    if (fenced != CUMEMPOOL_RESULT_SUCCESS && !loses_context(fenced)) return fenced;
  }
  return result_of(driver.cu.cuMemHostUnregister(pointer));
}

cumempool_result stream_create(void* self, int device, cumempool_stream* stream) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  CUstream created = nullptr;
  const CUresult result = driver_of(self).cu.cuStreamCreate(&created, CU_STREAM_NON_BLOCKING);
  *stream = number_of(created);
  return result_of(result);
}

cumempool_result stream_destroy(void* self, int device, cumempool_stream stream) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  return result_of(driver_of(self).cu.cuStreamDestroy(stream_of(stream)));
}

cumempool_result stream_synchronize(void* self, int device, cumempool_stream stream) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  return result_of(driver_of(self).cu.cuStreamSynchronize(stream_of(stream)));
}

// The legacy stream cannot be captured; asking about it while another stream is fails with 906.
cumempool_result stream_is_capturing(void* self, int device, cumempool_stream stream,
                                     int* capturing) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  if (stream == 0 || stream_of(stream) == CU_STREAM_LEGACY) {
    *capturing = 0;
    return CUMEMPOOL_RESULT_SUCCESS;
  }
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = driver_of(self).cu.cuStreamIsCapturing(stream_of(stream), &status);
  *capturing = status != CU_STREAM_CAPTURE_STATUS_NONE ? 1 : 0;
  return result_of(result);
}

// Waiting spins: a blocking wait (CU_EVENT_BLOCKING_SYNC) wakes up late between short copies.
cumempool_result event_create(void* self, int device, cumempool_event* event) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  CUevent created = nullptr;
  const CUresult result = driver_of(self).cu.cuEventCreate(&created, CU_EVENT_DISABLE_TIMING);
  *event = number_of(created);
  return result_of(result);
}

cumempool_result event_destroy(void* self, int device, cumempool_event event) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  return result_of(driver_of(self).cu.cuEventDestroy(event_of(event)));
}

cumempool_result event_record(void* self, int device, cumempool_event event,
                              cumempool_stream stream) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  return result_of(driver_of(self).cu.cuEventRecord(event_of(event), stream_of(stream)));
}

cumempool_result event_synchronize(void* self, int device, cumempool_event event) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  return result_of(driver_of(self).cu.cuEventSynchronize(event_of(event)));
}

cumempool_result event_query(void* self, int device, cumempool_event event) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  return result_of(driver_of(self).cu.cuEventQuery(event_of(event)));
}

cumempool_result stream_wait_event(void* self, int device, cumempool_stream stream,
                                   cumempool_event event) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  return result_of(driver_of(self).cu.cuStreamWaitEvent(stream_of(stream), event_of(event), 0));
}

cumempool_result copy_to_host(void* self, int device, void* destination, cumempool_address source,
                              std::size_t bytes, cumempool_stream stream) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  return result_of(
      driver_of(self).cu.cuMemcpyDtoHAsync(destination, source, bytes, stream_of(stream)));
}

cumempool_result copy_to_device(void* self, int device, cumempool_address destination,
                                const void* source, std::size_t bytes, cumempool_stream stream) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  return result_of(
      driver_of(self).cu.cuMemcpyHtoDAsync(destination, source, bytes, stream_of(stream)));
}

cumempool_result copy_on_device(void* self, int device, cumempool_address destination,
                                cumempool_address source, std::size_t bytes,
                                cumempool_stream stream) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  const auto distance = destination > source ? destination - source : source - destination;
  if (distance < bytes) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  return result_of(
      driver_of(self).cu.cuMemcpyDtoDAsync(destination, source, bytes, stream_of(stream)));
}

cumempool_result fill(void* self, int device, cumempool_address destination, std::uint8_t byte,
                      std::size_t bytes, cumempool_stream stream) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  return result_of(driver_of(self).cu.cuMemsetD8Async(destination, byte, bytes, stream_of(stream)));
}

cumempool_result digest(void* self, int device, std::uint64_t seed, const cumempool_extent* extents,
                        std::size_t count, cumempool_digest* digests, cumempool_stream stream) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  CudaDriver& driver = driver_of(self);
  return driver.find(device)->digest.submit(driver.cu, seed, extents, count, digests,
                                            stream_of(stream));
}

}  // namespace

void fill_cuda_work_entries(cumempool_driver& table) {
  table.allocate = allocate;
  table.deallocate = deallocate;
  table.host_register = host_register;
  table.host_unregister = host_unregister;
  table.stream_create = stream_create;
  table.stream_destroy = stream_destroy;
  table.stream_synchronize = stream_synchronize;
  table.stream_is_capturing = stream_is_capturing;
  table.event_create = event_create;
  table.event_destroy = event_destroy;
  table.event_record = event_record;
  table.event_synchronize = event_synchronize;
  table.event_query = event_query;
  table.stream_wait_event = stream_wait_event;
  table.copy_to_host = copy_to_host;
  table.copy_to_device = copy_to_device;
  table.copy_on_device = copy_on_device;
  table.fill = fill;
  table.digest = digest;
  table.fence = fence;
}

}  // namespace cumempool::driver
