// The entries of the `cuda` driver for memory of cudaMalloc, host memory, streams, events, copies
// and digests. Each needs the context of its device.
#include <algorithm>
#include <array>
#include <climits>

#include "driver/cuda_driver.hpp"
#include "driver/digest.hpp"
#include "driver/error.hpp"

namespace cumempool::driver {
namespace {

cumempool_result allocate(CudaDriver& driver, int device, std::size_t bytes,
                          cumempool_address* address) {
  CUdeviceptr pointer = 0;
  const CUresult result = driver.cu.cuMemAlloc(&pointer, bytes);
  if (result == CUDA_SUCCESS && !driver.allocated.add(pointer, static_cast<unsigned>(device))) {
    driver.cu.cuMemFree(pointer);
    return CUMEMPOOL_RESULT_OUT_OF_MEMORY;
  }
  *address = pointer;
  return result_of(result);
}

// cuMemFree waits for all work in flight on every stream of the device. In RELAXED mode it leaves
// captures intact.
cumempool_result deallocate(CudaDriver& driver, int device, cumempool_address address) {
  return driver.allocated.remove(address, static_cast<unsigned>(device), [&driver, address] {
    return result_of(driver.cu.cuMemFree(address));
  });
}

cumempool_result host_register(CudaDriver& driver, int /*device*/, void* pointer,
                               std::size_t bytes) {
  // PORTABLE pins for every device. DEVICEMAP lets kernels use the memory, as digest() does.
  return result_of(driver.cu.cuMemHostRegister(
      pointer, bytes, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP));
}

// Fences the other devices first: cuMemHostUnregister waits for the device of the current context
// only, and a copy under way on another device would fault. A device whose context is lost copies
// no more, so a fence that fails for that reason does not keep the memory pinned.
cumempool_result host_unregister(CudaDriver& driver, int device, void* pointer) {
  for (int other = 0; other < driver.device_count; ++other) {
    if (other == device) continue;
    const auto fenced = fence_device(driver, other);
    if (fenced != CUMEMPOOL_RESULT_SUCCESS && !loses_context(fenced)) return fenced;
  }
  return result_of(driver.cu.cuMemHostUnregister(pointer));
}

cumempool_result stream_create(CudaDriver& driver, int /*device*/, cumempool_stream* stream) {
  CUstream created = nullptr;
  const CUresult result = driver.cu.cuStreamCreate(&created, CU_STREAM_NON_BLOCKING);
  *stream = number_of(created);
  return result_of(result);
}

cumempool_result stream_destroy(CudaDriver& driver, int /*device*/, cumempool_stream stream) {
  return result_of(driver.cu.cuStreamDestroy(stream_of(stream)));
}

cumempool_result stream_synchronize(CudaDriver& driver, int /*device*/, cumempool_stream stream) {
  return result_of(driver.cu.cuStreamSynchronize(stream_of(stream)));
}

// The legacy stream cannot be captured; asking about it while another stream captures fails with
// 906.
cumempool_result stream_is_capturing(CudaDriver& driver, int /*device*/, cumempool_stream stream,
                                     int* capturing) {
  if (stream == 0 || stream_of(stream) == CU_STREAM_LEGACY) {
    *capturing = 0;
    return CUMEMPOOL_RESULT_SUCCESS;
  }
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = driver.cu.cuStreamIsCapturing(stream_of(stream), &status);
  *capturing = status != CU_STREAM_CAPTURE_STATUS_NONE ? 1 : 0;
  return result_of(result);
}

// Waits for the event spin: a blocking wait (CU_EVENT_BLOCKING_SYNC) wakes up late between short
// copies.
cumempool_result event_create(CudaDriver& driver, int /*device*/, cumempool_event* event) {
  CUevent created = nullptr;
  const CUresult result = driver.cu.cuEventCreate(&created, CU_EVENT_DISABLE_TIMING);
  *event = number_of(created);
  return result_of(result);
}

cumempool_result event_destroy(CudaDriver& driver, int /*device*/, cumempool_event event) {
  return result_of(driver.cu.cuEventDestroy(event_of(event)));
}

cumempool_result event_record(CudaDriver& driver, int /*device*/, cumempool_event event,
                              cumempool_stream stream) {
  return result_of(driver.cu.cuEventRecord(event_of(event), stream_of(stream)));
}

cumempool_result event_synchronize(CudaDriver& driver, int /*device*/, cumempool_event event) {
  return result_of(driver.cu.cuEventSynchronize(event_of(event)));
}

cumempool_result event_query(CudaDriver& driver, int /*device*/, cumempool_event event) {
  return result_of(driver.cu.cuEventQuery(event_of(event)));
}

cumempool_result stream_wait_event(CudaDriver& driver, int /*device*/, cumempool_stream stream,
                                   cumempool_event event) {
  return result_of(driver.cu.cuStreamWaitEvent(stream_of(stream), event_of(event), 0));
}

cumempool_result copy_to_host(CudaDriver& driver, int /*device*/, void* destination,
                              cumempool_address source, std::size_t bytes,
                              cumempool_stream stream) {
  return result_of(driver.cu.cuMemcpyDtoHAsync(destination, source, bytes, stream_of(stream)));
}

cumempool_result copy_to_device(CudaDriver& driver, int /*device*/, cumempool_address destination,
                                const void* source, std::size_t bytes, cumempool_stream stream) {
  return result_of(driver.cu.cuMemcpyHtoDAsync(destination, source, bytes, stream_of(stream)));
}

cumempool_result copy_on_device(CudaDriver& driver, int /*device*/, cumempool_address destination,
                                cumempool_address source, std::size_t bytes,
                                cumempool_stream stream) {
  const auto distance = destination > source ? destination - source : source - destination;
  if (distance < bytes) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  return result_of(driver.cu.cuMemcpyDtoDAsync(destination, source, bytes, stream_of(stream)));
}

cumempool_result fill(CudaDriver& driver, int /*device*/, cumempool_address destination,
                      std::uint8_t byte, std::size_t bytes, cumempool_stream stream) {
  return result_of(driver.cu.cuMemsetD8Async(destination, byte, bytes, stream_of(stream)));
}

// ---- digests ------------------------------------------------------------------------------------

constexpr const char* kDigestPtx =
#include "driver/digest_kernel.ptx.inc"
    ;

constexpr const char* kDigestName = "cumempool_digest_kernel";

// The parameters of the kernel, as digest_kernel.cu declares them.
static_assert(sizeof(cumempool_extent) == 16 && sizeof(cumempool_digest) == 16);
static_assert(sizeof(DigestKeys) == 136 && alignof(DigestKeys) == 8);

bool good_arguments(const cumempool_extent* extents, std::size_t count,
                    const cumempool_digest* digests) {
  const auto places =
      reinterpret_cast<std::uintptr_t>(extents) | reinterpret_cast<std::uintptr_t>(digests);
  if (extents == nullptr || digests == nullptr || places % alignof(cumempool_extent) != 0 ||
      count > INT_MAX) {
    return false;
  }
  return std::all_of(extents, extents + count, [](const cumempool_extent& extent) {
    return digest_takes(extent.address, extent.bytes);
  });
}

// Finds the device address of a whole range of pinned host memory. libcuda fails the query for
// memory that is not pinned. The kernel would lose the context over such memory.
CUresult device_address(const Symbols& cu, const void* host, std::size_t bytes,
                        CUdeviceptr& address) {
  const auto first = static_cast<CUdeviceptr>(reinterpret_cast<std::uintptr_t>(host));
  CUdeviceptr last = 0;
  CUresult result = cu.cuPointerGetAttribute(&address, CU_POINTER_ATTRIBUTE_DEVICE_POINTER, first);
  if (result == CUDA_SUCCESS) {
    result =
        cu.cuPointerGetAttribute(&last, CU_POINTER_ATTRIBUTE_DEVICE_POINTER, first + bytes - 1);
  }
  const bool apart = result == CUDA_SUCCESS && last - address != bytes - 1;
  return apart ? CUDA_ERROR_INVALID_VALUE : result;
}

cumempool_result digest(CudaDriver& driver, int device, std::uint64_t seed,
                        const cumempool_extent* extents, std::size_t count,
                        cumempool_digest* digests, cumempool_stream stream) {
  const Symbols& cu = driver.cu;
  CudaKernel& code = driver.find(device)->digest;
  CUfunction kernel = nullptr;
  if (count != 0 && !good_arguments(extents, count, digests)) return CUMEMPOOL_RESULT_INVALID_VALUE;
  if (!CudaKernel::supported(cu) || cu.cuPointerGetAttribute == nullptr) {
    return CUMEMPOOL_RESULT_NOT_SUPPORTED;
  }
  if (count == 0) return code.load(cu, kDigestPtx, kDigestName, kernel);
  CUdeviceptr from = 0;
  CUdeviceptr to = 0;
  CUresult result = device_address(cu, extents, count * sizeof(*extents), from);
  if (result == CUDA_SUCCESS) result = device_address(cu, digests, count * sizeof(*digests), to);
  if (result != CUDA_SUCCESS) return result_of(result);

  if (const auto loaded = code.load(cu, kDigestPtx, kDigestName, kernel)) return loaded;
  DigestKeys keys = digest_keys(seed);
  std::array<void*, 3> parameters{&from, &to, &keys};
  return result_of(cu.cuLaunchKernel(kernel, static_cast<unsigned int>(count), 1, 1, kDigestThreads,
                                     1, 1, 0, stream_of(stream), parameters.data(), nullptr));
}

}  // namespace

void fill_cuda_work_entries(cumempool_driver& table) {
#define CUMEMPOOL_WORK_ENTRY(name, function, size) table.name = entry_in_context<name>;
#include "driver/entries.inc"
}

}  // namespace cumempool::driver
