// The entries of the `cuda` driver for devices, their primary contexts, and the fence.
#include <algorithm>
#include <climits>
#include <mutex>

#include "driver/cuda_driver.hpp"
#include "driver/scope_exit.hpp"

namespace cumempool::driver {
namespace {

cumempool_result init(CudaDriver& driver) { return result_of(driver.cu.cuInit(0)); }

cumempool_result driver_version(CudaDriver& driver, int* version) {
  return result_of(driver.cu.cuDriverGetVersion(version));
}

cumempool_result device_count(CudaDriver& driver, int* count) {
  *count = driver.device_count;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result device_name(CudaDriver& driver, int device, char* name, std::size_t bytes) {
  const PrimaryContext* found = driver.find(device);
  if (found == nullptr) {
    return CUMEMPOOL_RESULT_INVALID_DEVICE;
  }
  const int length = static_cast<int>(std::min<std::size_t>(bytes, INT_MAX));
  return result_of(driver.cu.cuDeviceGetName(name, length, found->device));
}

// Attributes by number, because CUDA 11.8 lacks the names of some.
int attribute_number(cumempool_device_attribute attribute) {
  switch (attribute) {
    case CUMEMPOOL_ATTRIBUTE_VIRTUAL_MEMORY:
      return 102;  // VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    case CUMEMPOOL_ATTRIBUTE_POSIX_FD:
      return 103;  // HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
    case CUMEMPOOL_ATTRIBUTE_FABRIC:
      return 128;  // HANDLE_TYPE_FABRIC_SUPPORTED
    case CUMEMPOOL_ATTRIBUTE_RDMA:
      return 110;  // GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED
    case CUMEMPOOL_ATTRIBUTE_COMPUTE_MAJOR:
      return CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
    case CUMEMPOOL_ATTRIBUTE_COMPUTE_MINOR:
      return CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR;
    case CUMEMPOOL_ATTRIBUTE_HOST_NUMA:
      return 134;  // HOST_NUMA_ID
    case CUMEMPOOL_ATTRIBUTE_FENCE:
      break;  // unknown to CUDA
  }
  return -1;
}

cumempool_result device_attribute(CudaDriver& driver, int device,
                                  cumempool_device_attribute attribute, int* value) {
  const PrimaryContext* found = driver.find(device);
  if (found != nullptr && attribute == CUMEMPOOL_ATTRIBUTE_FENCE) {
    *value = found->fence.way();
    return CUMEMPOOL_RESULT_SUCCESS;
  }
  const int number = attribute_number(attribute);
  if (found == nullptr || number < 0) {
    return found == nullptr ? CUMEMPOOL_RESULT_INVALID_DEVICE : CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  const CUresult result =
      driver.cu.cuDeviceGetAttribute(value, static_cast<CUdevice_attribute>(number), found->device);
  // Drivers before 12.3 know neither of these attributes.
  if (result == CUDA_ERROR_INVALID_VALUE &&
      (attribute == CUMEMPOOL_ATTRIBUTE_FABRIC || attribute == CUMEMPOOL_ATTRIBUTE_HOST_NUMA)) {
    *value = attribute == CUMEMPOOL_ATTRIBUTE_FABRIC ? 0 : -1;
    return CUMEMPOOL_RESULT_SUCCESS;
  }
  return result_of(result);
}

// CUDA says that a device is no peer of itself.
cumempool_result peer_access(CudaDriver& driver, int device, int peer, int* possible) {
  const PrimaryContext* found = driver.find(device);
  const PrimaryContext* other = driver.find(peer);
  if (found == nullptr || other == nullptr) {
    return CUMEMPOOL_RESULT_INVALID_DEVICE;
  }
  *possible = 1;
  return found == other
             ? CUMEMPOOL_RESULT_SUCCESS
             : result_of(driver.cu.cuDeviceCanAccessPeer(possible, found->device, other->device));
}

cumempool_result memory_info(CudaDriver& driver, int device, std::uint64_t* free_bytes,
                             std::uint64_t* total_bytes) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  std::size_t free_size = 0;
  std::size_t total_size = 0;
  const CUresult result = driver.cu.cuMemGetInfo(&free_size, &total_size);
  *free_bytes = free_size;
  *total_bytes = total_size;
  return result_of(result);
}

cumempool_result context_active(CudaDriver& driver, int device, int* active) {
  const PrimaryContext* found = driver.find(device);
  if (found == nullptr) {
    return CUMEMPOOL_RESULT_INVALID_DEVICE;
  }
  unsigned int flags = 0;
  return result_of(driver.cu.cuDevicePrimaryCtxGetState(found->device, &flags, active));
}

constexpr std::size_t kAheadBytes = std::size_t{2} << 20;
constexpr std::size_t kAheadAlignment = std::size_t{64} << 30;

// libcuda asks the kernel for addresses if a reservation does not fit into the range that it holds,
// and takes as much as the alignment at once. After a reservation aligned to 64 GiB, later ones
// find addresses without that call, side by side (ADR 24). Nothing depends on it.
CUdeviceptr take_addresses_ahead(const Symbols& cu) {
  CUdeviceptr address = 0;
  const CUresult result = cu.cuMemAddressReserve(&address, kAheadBytes, kAheadAlignment, 0, 0);
  return result == CUDA_SUCCESS ? address : 0;
}

void give_addresses_back(const Symbols& cu, CUdeviceptr& ahead) {
  if (ahead != 0) cu.cuMemAddressFree(ahead, kAheadBytes);
  ahead = 0;
}

// CUDA counts retains as well. The table counts its own, to know the context and when it lets go.
cumempool_result context_retain(CudaDriver& driver, int device) {
  PrimaryContext* found = driver.find(device);
  if (found == nullptr) {
    return CUMEMPOOL_RESULT_INVALID_DEVICE;
  }
  const std::lock_guard<std::mutex> lock(found->mutex);
  if (found->count == 0) {
    CUcontext context = nullptr;
    const CUresult result = driver.cu.cuDevicePrimaryCtxRetain(&context, found->device);
    if (result != CUDA_SUCCESS) {
      return result_of(result);
    }
    found->context.store(context);
    found->ahead = take_addresses_ahead(driver.cu);
  }
  ++found->count;
  return CUMEMPOOL_RESULT_SUCCESS;
}

// Makes `context` current. `pushed` says whether the caller has to pop it later.
CUresult make_current(const Symbols& cu, CUcontext context, bool& pushed) {
  CUcontext current = nullptr;
  pushed = false;
  CUresult result = cu.cuCtxGetCurrent(&current);
  if (result == CUDA_SUCCESS && current != context) {
    result = cu.cuCtxPushCurrent(context);
    pushed = result == CUDA_SUCCESS;
  }
  return result;
}

// In RELAXED mode the calls of this table leave every capture intact, of this and of other threads.
// In the default mode, pinning memory or creating a stream breaks a capture of another thread.
cumempool_result context_enter(CudaDriver& driver, int device, cumempool_context_token* token) {
  const PrimaryContext* found = driver.find(device);
  if (found == nullptr) {
    return CUMEMPOOL_RESULT_INVALID_DEVICE;
  }
  CUcontext context = found->context.load();
  if (context == nullptr) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  CUresult result = driver.cu.cuThreadExchangeStreamCaptureMode(&mode);
  if (result != CUDA_SUCCESS) {
    return result_of(result);
  }
  bool pushed = false;
  result = make_current(driver.cu, context, pushed);
  if (result != CUDA_SUCCESS) {
    driver.cu.cuThreadExchangeStreamCaptureMode(&mode);
    return result_of(result);
  }
  token->context = pushed ? number_of(context) : 0;
  token->capture_mode = static_cast<std::int32_t>(mode);
  token->device = entered_device;
  entered_device = device;
  return CUMEMPOOL_RESULT_SUCCESS;
}

// Undoes both steps, even if undoing the first one fails.
cumempool_result context_leave(CudaDriver& driver, const cumempool_context_token* token) {
  CUresult popped = CUDA_SUCCESS;
  if (token->context != 0) {
    CUcontext context = nullptr;
    popped = driver.cu.cuCtxPopCurrent(&context);
  }
  auto mode = static_cast<CUstreamCaptureMode>(token->capture_mode);
  const CUresult exchanged = driver.cu.cuThreadExchangeStreamCaptureMode(&mode);
  entered_device = token->device;
  return result_of(popped != CUDA_SUCCESS ? popped : exchanged);
}

// Unloads the kernel and frees the block of the fence. The context may live on for others.
void empty_context(CudaDriver& driver, int device, PrimaryContext& context) {
  cumempool_context_token token{};
  if (context_enter(driver, device, &token) != CUMEMPOOL_RESULT_SUCCESS) {
    context.digest.forget();
    context.fence.forget();
    return;
  }
  context.digest.unload(driver.cu);
  context.fence.release(driver.cu);
  context_leave(driver, &token);
}

cumempool_result context_release(CudaDriver& driver, int device) {
  PrimaryContext* found = driver.find(device);
  if (found == nullptr) {
    return CUMEMPOOL_RESULT_INVALID_DEVICE;
  }
  const std::lock_guard<std::mutex> lock(found->mutex);
  if (found->count == 0) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  if (found->count == 1) {
    empty_context(driver, device, *found);
    const CUresult result = driver.cu.cuDevicePrimaryCtxRelease(found->device);
    if (result != CUDA_SUCCESS) {
      return result_of(result);
    }
    found->context.store(nullptr);
    give_addresses_back(driver.cu, found->ahead);
  }
  --found->count;
  return CUMEMPOOL_RESULT_SUCCESS;
}

// Holds the primary context of a device if it is active; else `context` stays null. `counted` says
// whether the table holds the context for another caller as well.
CUresult hold_active_context(const CudaDriver& driver, PrimaryContext& found, CUcontext& context,
                             bool& counted) {
  {
    const std::lock_guard<std::mutex> lock(found.mutex);
    counted = found.count != 0;
    found.count += counted ? 1 : 0;
  }
  if (counted) {
    context = found.context.load();
    return CUDA_SUCCESS;
  }
  unsigned int flags = 0;
  int active = 0;
  const CUresult result = driver.cu.cuDevicePrimaryCtxGetState(found.device, &flags, &active);
  if (result != CUDA_SUCCESS || active == 0) return result;
  return driver.cu.cuDevicePrimaryCtxRetain(&context, found.device);
}

}  // namespace

// Makes the context current meanwhile, with the thread's capture mode relaxed.
cumempool_result fence_device(CudaDriver& driver, int device) {
  const Symbols& cu = driver.cu;
  PrimaryContext& found = *driver.find(device);
  CUcontext context = nullptr;
  bool counted = false;
  CUresult result = hold_active_context(driver, found, context, counted);
  if (context == nullptr) return result_of(result);
  const ScopeExit let_go([&] {
    if (counted) {
      driver.table.context_release(&driver, device);
    } else {
      cu.cuDevicePrimaryCtxRelease(found.device);
    }
  });
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  result = cu.cuThreadExchangeStreamCaptureMode(&mode);
  if (result != CUDA_SUCCESS) return result_of(result);
  result = cu.cuCtxPushCurrent(context);
  cumempool_result fenced = result_of(result);
  if (result == CUDA_SUCCESS) {
    fenced = found.fence.wait(cu, found.device);
    if (!counted) found.fence.release(cu);  // the context may be gone at any time
    CUcontext popped = nullptr;
    cu.cuCtxPopCurrent(&popped);
  }
  cu.cuThreadExchangeStreamCaptureMode(&mode);
  return fenced;
}

namespace {

// Waits for all devices, even if one fails.
cumempool_result fence(CudaDriver& driver, const int* devices, std::size_t count) {
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

}  // namespace

void fill_cuda_device_entries(cumempool_driver& table) {
#define CUMEMPOOL_DEVICE_ENTRY(name, function, size) table.name = entry<name>;
#include "driver/entries.inc"
}

}  // namespace cumempool::driver
