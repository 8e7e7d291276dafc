// The `cuda` driver: the table of driver.h over libcuda, which is opened at run time. The only file
// that includes <cuda.h>; it takes the headers of CUDA 11.8 and later.
#include <cuda.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>

#include "driver/builtin.hpp"
#include "driver/error.hpp"
#include "driver/mapped_ranges.hpp"

namespace cumempool::driver {
namespace {

// driver.h numbers results and handle types as CUDA does; older headers lack some of the names.
static_assert(static_cast<int>(CUMEMPOOL_RESULT_OUT_OF_MEMORY) == CUDA_ERROR_OUT_OF_MEMORY);
static_assert(static_cast<int>(CUMEMPOOL_RESULT_INVALID_CONTEXT) == CUDA_ERROR_INVALID_CONTEXT);
static_assert(static_cast<int>(CUMEMPOOL_RESULT_OPERATING_SYSTEM) == CUDA_ERROR_OPERATING_SYSTEM);
static_assert(static_cast<int>(CUMEMPOOL_RESULT_NOT_SUPPORTED) == CUDA_ERROR_NOT_SUPPORTED);
static_assert(static_cast<int>(CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED) ==
              CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
static_assert(static_cast<int>(CUMEMPOOL_HANDLE_POSIX_FD) ==
              CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
static_assert(sizeof(cumempool_address) == sizeof(CUdeviceptr));
static_assert(sizeof(cumempool_physical) == sizeof(CUmemGenericAllocationHandle));
static_assert(sizeof(cumempool_stream) == sizeof(CUstream));
static_assert(sizeof(CUcontext) == sizeof(std::uint64_t));
#if CUDA_VERSION >= 12030
static_assert(static_cast<int>(CUMEMPOOL_HANDLE_FABRIC) == CU_MEM_HANDLE_TYPE_FABRIC);
static_assert(sizeof(CUmemFabricHandle) == CUMEMPOOL_FABRIC_HANDLE_BYTES);
#endif

// cuda.h defines names such as cuMemGetInfo as macros for the current form (cuMemGetInfo_v2). So a
// member named by the macro has the type, and LINKAGE_NAME the name, of just that form.
struct Symbols {
#define CUMEMPOOL_SYMBOL(symbol, version, need) \
  decltype(&::symbol) symbol = nullptr;  // NOLINT(bugprone-macro-parentheses): a member's name
#include "driver/cuda_symbols.inc"
#undef CUMEMPOOL_SYMBOL
};
#define CUMEMPOOL_TEXT(text) #text
#define CUMEMPOOL_LINKAGE_NAME(symbol) CUMEMPOOL_TEXT(symbol)

// A device's primary context, while anyone holds it.
struct PrimaryContext {
  CUdevice device = 0;
  std::mutex mutex;  // guards the count, and the context's change with it
  int count = 0;
  std::atomic<CUcontext> context{nullptr};
};

struct CudaDriver {
  Symbols cu;
  int device_count = 0;
  std::unique_ptr<PrimaryContext[]> devices;
  MappedRanges mapped;
  cumempool_driver table{};

  PrimaryContext* find(int device) const {
    return device >= 0 && device < device_count ? &devices[static_cast<std::size_t>(device)]
                                                : nullptr;
  }
};

// The device whose context_enter this thread is inside, or -1 (C3).
thread_local int entered_device = -1;

CudaDriver& driver_of(void* self) { return *static_cast<CudaDriver*>(self); }

cumempool_result result_of(CUresult result) { return static_cast<cumempool_result>(result); }

// The table carries CUDA's handles as numbers, so that its header needs none of CUDA's types.
template <typename Pointer>
Pointer pointer_of(std::uint64_t number) {
  return reinterpret_cast<Pointer>(number);  // NOLINT(performance-no-int-to-ptr)
}

CUstream stream_of(cumempool_stream stream) { return pointer_of<CUstream>(stream); }

CUevent event_of(cumempool_event event) { return pointer_of<CUevent>(event); }

template <typename Handle>
std::uint64_t number_of(Handle handle) {
  return static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(handle));
}

bool inside(int device) { return device >= 0 && entered_device == device; }

// ---- the driver, its devices and its contexts
// ------------------------------------------------------

cumempool_result init(void* self) { return result_of(driver_of(self).cu.cuInit(0)); }

cumempool_result driver_version(void* self, int* version) {
  return result_of(driver_of(self).cu.cuDriverGetVersion(version));
}

cumempool_result device_count(void* self, int* count) {
  *count = driver_of(self).device_count;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result device_name(void* self, int device, char* name, std::size_t bytes) {
  const CudaDriver& driver = driver_of(self);
  const PrimaryContext* found = driver.find(device);
  if (found == nullptr) {
    return CUMEMPOOL_RESULT_INVALID_DEVICE;
  }
  const int length = static_cast<int>(std::min<std::size_t>(bytes, INT_MAX));
  return result_of(driver.cu.cuDeviceGetName(name, length, found->device));
}

// By number: CUDA 11.8 lacks the names of some.
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
  }
  return -1;
}

cumempool_result device_attribute(void* self, int device, cumempool_device_attribute attribute,
                                  int* value) {
  const CudaDriver& driver = driver_of(self);
  const PrimaryContext* found = driver.find(device);
  const int number = attribute_number(attribute);
  if (found == nullptr || number < 0) {
    return found == nullptr ? CUMEMPOOL_RESULT_INVALID_DEVICE : CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  const CUresult result =
      driver.cu.cuDeviceGetAttribute(value, static_cast<CUdevice_attribute>(number), found->device);
  if (result == CUDA_ERROR_INVALID_VALUE && attribute == CUMEMPOOL_ATTRIBUTE_FABRIC) {
    *value = 0;  // a driver from before 12.3 does not know the question
    return CUMEMPOOL_RESULT_SUCCESS;
  }
  return result_of(result);
}

cumempool_result memory_info(void* self, int device, std::uint64_t* free_bytes,
                             std::uint64_t* total_bytes) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  std::size_t free_size = 0;
  std::size_t total_size = 0;
  const CUresult result = driver_of(self).cu.cuMemGetInfo(&free_size, &total_size);
  *free_bytes = free_size;
  *total_bytes = total_size;
  return result_of(result);
}

cumempool_result context_active(void* self, int device, int* active) {
  const CudaDriver& driver = driver_of(self);
  const PrimaryContext* found = driver.find(device);
  if (found == nullptr) {
    return CUMEMPOOL_RESULT_INVALID_DEVICE;
  }
  unsigned int flags = 0;
  return result_of(driver.cu.cuDevicePrimaryCtxGetState(found->device, &flags, active));
}

// CUDA counts retains as well. Ours is kept to know the context, and when it is no longer ours.
cumempool_result context_retain(void* self, int device) {
  CudaDriver& driver = driver_of(self);
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
  }
  ++found->count;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result context_release(void* self, int device) {
  CudaDriver& driver = driver_of(self);
  PrimaryContext* found = driver.find(device);
  if (found == nullptr) {
    return CUMEMPOOL_RESULT_INVALID_DEVICE;
  }
  const std::lock_guard<std::mutex> lock(found->mutex);
  if (found->count == 0) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  if (found->count == 1) {
    const CUresult result = driver.cu.cuDevicePrimaryCtxRelease(found->device);
    if (result != CUDA_SUCCESS) {
      return result_of(result);
    }
    found->context.store(nullptr);
  }
  --found->count;
  return CUMEMPOOL_RESULT_SUCCESS;
}

// Makes `context` current where it is not; `pushed` says whether there is one to pop later.
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

// In RELAXED mode the calls of this table leave every capture, of this and of other threads,
// intact; in the default mode pinning memory or making a stream would break a capture of another
// thread.
cumempool_result context_enter(void* self, int device, cumempool_context_token* token) {
  const CudaDriver& driver = driver_of(self);
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

// Undoes both, even where undoing the first fails.
cumempool_result context_leave(void* self, const cumempool_context_token* token) {
  const CudaDriver& driver = driver_of(self);
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

// ---- virtual memory: needs no context
// --------------------------------------------------------------

CUmemLocation location_of(CUdevice device) {
  CUmemLocation location{};
  location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  location.id = device;
  return location;
}

cumempool_result allocation_prop(const CudaDriver& driver,
                                 const cumempool_memory_properties& properties,
                                 CUmemAllocationProp& prop) {
  const PrimaryContext* found = driver.find(properties.device);
  if (found == nullptr) {
    return CUMEMPOOL_RESULT_INVALID_DEVICE;
  }
  prop = {};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location = location_of(found->device);
  prop.requestedHandleTypes = static_cast<CUmemAllocationHandleType>(properties.handle_types);
  prop.allocFlags.gpuDirectRDMACapable = properties.rdma != 0 ? 1 : 0;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result granularity(void* self, const cumempool_memory_properties* properties,
                             std::size_t* bytes) {
  const CudaDriver& driver = driver_of(self);
  CUmemAllocationProp prop;
  const cumempool_result result = allocation_prop(driver, *properties, prop);
  if (result != CUMEMPOOL_RESULT_SUCCESS) {
    return result;
  }
  return result_of(
      driver.cu.cuMemGetAllocationGranularity(bytes, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
}

cumempool_result reserve(void* self, std::size_t bytes, cumempool_address* address) {
  CUdeviceptr pointer = 0;
  const CUresult result = driver_of(self).cu.cuMemAddressReserve(&pointer, bytes, 0, 0, 0);
  *address = pointer;
  return result_of(result);
}

cumempool_result unreserve(void* self, cumempool_address address, std::size_t bytes) {
  return result_of(driver_of(self).cu.cuMemAddressFree(address, bytes));
}

cumempool_result create(void* self, std::size_t bytes,
                        const cumempool_memory_properties* properties,
                        cumempool_physical* physical) {
  const CudaDriver& driver = driver_of(self);
  CUmemAllocationProp prop;
  const cumempool_result result = allocation_prop(driver, *properties, prop);
  if (result != CUMEMPOOL_RESULT_SUCCESS) {
    return result;
  }
  CUmemGenericAllocationHandle handle = 0;
  const CUresult created = driver.cu.cuMemCreate(&handle, bytes, &prop, 0);
  *physical = handle;
  return result_of(created);
}

cumempool_result release(void* self, cumempool_physical physical) {
  return result_of(driver_of(self).cu.cuMemRelease(physical));
}

cumempool_result map(void* self, cumempool_address address, std::size_t bytes,
                     cumempool_physical physical) {
  CudaDriver& driver = driver_of(self);
  const CUresult result = driver.cu.cuMemMap(address, bytes, 0, physical, 0);
  if (result == CUDA_SUCCESS && !driver.mapped.add(address, bytes)) {
    driver.cu.cuMemUnmap(address, bytes);
    return CUMEMPOOL_RESULT_OUT_OF_MEMORY;
  }
  return result_of(result);
}

cumempool_result unmap(void* self, cumempool_address address, std::size_t bytes) {
  CudaDriver& driver = driver_of(self);
  return driver.mapped.remove(address, bytes, [&driver, address, bytes] {
    return result_of(driver.cu.cuMemUnmap(address, bytes));
  });
}

cumempool_result set_access(void* self, cumempool_address address, std::size_t bytes,
                            const int* devices, std::size_t device_count) {
  const CudaDriver& driver = driver_of(self);
  std::array<CUmemAccessDesc, 64> access{};
  if (device_count > access.size()) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  for (std::size_t i = 0; i < device_count; ++i) {
    const PrimaryContext* found = driver.find(devices[i]);
    if (found == nullptr) {
      return CUMEMPOOL_RESULT_INVALID_DEVICE;
    }
    access[i].location = location_of(found->device);
    access[i].flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  }
  return result_of(driver.cu.cuMemSetAccess(address, bytes, access.data(), device_count));
}

// The driver's descriptor does not say close-on-exec; a started program must not keep the memory.
cumempool_result export_fd(const Symbols& cu, cumempool_physical physical, void* exported) {
  int fd = -1;
  const CUresult result =
      cu.cuMemExportToShareableHandle(&fd, physical, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  if (result != CUDA_SUCCESS) {
    return result_of(result);
  }
  if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) {
    close(fd);
    return CUMEMPOOL_RESULT_OPERATING_SYSTEM;
  }
  std::memcpy(exported, &fd, sizeof(fd));
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result export_handle(void* self, cumempool_physical physical, std::uint32_t handle_type,
                               void* exported) {
  const Symbols& cu = driver_of(self).cu;
  if (cu.cuMemExportToShareableHandle == nullptr) {
    return CUMEMPOOL_RESULT_NOT_SUPPORTED;
  }
  if (handle_type == CUMEMPOOL_HANDLE_POSIX_FD) {
    return export_fd(cu, physical, exported);
  }
  if (handle_type != CUMEMPOOL_HANDLE_FABRIC) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  return result_of(cu.cuMemExportToShareableHandle(
      exported, physical, static_cast<CUmemAllocationHandleType>(CUMEMPOOL_HANDLE_FABRIC), 0));
}

cumempool_result import_handle(void* self, const void* exported, std::uint32_t handle_type,
                               cumempool_physical* physical) {
  const Symbols& cu = driver_of(self).cu;
  if (cu.cuMemImportFromShareableHandle == nullptr) {
    return CUMEMPOOL_RESULT_NOT_SUPPORTED;
  }
  std::array<unsigned char, CUMEMPOOL_FABRIC_HANDLE_BYTES> fabric{};
  void* handle = fabric.data();
  if (handle_type == CUMEMPOOL_HANDLE_POSIX_FD) {
    int fd = -1;
    std::memcpy(&fd, exported, sizeof(fd));
    // CUDA takes the number itself in place of a pointer.
    handle = pointer_of<void*>(static_cast<std::uint64_t>(fd));
  } else if (handle_type == CUMEMPOOL_HANDLE_FABRIC) {
    std::memcpy(fabric.data(), exported, fabric.size());
  } else {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  CUmemGenericAllocationHandle imported = 0;
  const CUresult result = cu.cuMemImportFromShareableHandle(
      &imported, handle, static_cast<CUmemAllocationHandleType>(handle_type));
  *physical = imported;
  return result_of(result);
}

// ---- host memory, streams, events, copies: need a context
// ------------------------------------------

cumempool_result host_register(void* self, int device, void* pointer, std::size_t bytes) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  return result_of(
      driver_of(self).cu.cuMemHostRegister(pointer, bytes, CU_MEMHOSTREGISTER_PORTABLE));
}

cumempool_result host_unregister(void* self, int device, void* pointer) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  return result_of(driver_of(self).cu.cuMemHostUnregister(pointer));
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

cumempool_result fill(void* self, int device, cumempool_address destination, std::uint8_t byte,
                      std::size_t bytes, cumempool_stream stream) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  return result_of(driver_of(self).cu.cuMemsetD8Async(destination, byte, bytes, stream_of(stream)));
}

// Pins and unpins one page. Both wait for all work in flight on every stream of the device, and in
// RELAXED mode neither touches a capture; cuCtxSynchronize and cuCtxRecordEvent would break every
// capture under way, in any mode. It takes no device memory, so it works on a full device.
cumempool_result fence(void* self, int device) {
  if (!inside(device)) {
    return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  }
  const Symbols& cu = driver_of(self).cu;
  const auto page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  // A page of its own for each call: threads that fence different devices do not wait for each
  // other.
  void* page =
      mmap(nullptr, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) {
    return CUMEMPOOL_RESULT_OPERATING_SYSTEM;
  }
  CUresult result = cu.cuMemHostRegister(page, page_bytes, 0);
  if (result == CUDA_SUCCESS) {
    result = cu.cuMemHostUnregister(page);
    if (result != CUDA_SUCCESS) {
      // The driver may still hold the page; giving its address away would confuse a later pinning.
      return result_of(result);
    }
  }
  munmap(page, page_bytes);
  return result_of(result);
}

// ---- opening libcuda
// -------------------------------------------------------------------------------

constexpr const char* host_driver_advice =
    " To try cumempool without a GPU, ask for driver='host' (CUMEMPOOL_DRIVER=host).";

[[nodiscard]] Error unavailable(const std::string& problem, const std::string& advice) {
  Error error(CUMEMPOOL_UNAVAILABLE, problem);
  error.operation = "opening the CUDA driver";
  error.advice = advice;
  return error;
}

void* open_library() {
  // Never closed: libcuda runs threads and exit handlers of its own.
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    throw unavailable(
        std::string("libcuda.so.1 cannot be opened (") +
            (reason != nullptr ? reason : "no reason given") + ")",
        std::string("Install the NVIDIA driver, or start the container with its GPUs "
                    "(docker run --gpus all); LD_LIBRARY_PATH must lead to libcuda.so.1.") +
            host_driver_advice);
  }
  return library;
}

// How symbols are asked for: through cuGetProcAddress where the driver has it, which gives just the
// form that is named by its version, else by linkage name.
class SymbolSource {
 public:
  explicit SymbolSource(void* library) : library_(library) {
    // The bootstrap is typed here: cuda.h names only one of the two forms, depending on its
    // version.
    v2_ = reinterpret_cast<GetProcAddressV2>(dlsym(library, "cuGetProcAddress_v2"));
    v1_ = reinterpret_cast<GetProcAddressV1>(dlsym(library, "cuGetProcAddress"));
  }

  void* find(const char* name, const char* linkage_name, int version) const {
    void* address = nullptr;
    if (v2_ != nullptr) {
      int status = 0;
      if (v2_(name, &address, version, CU_GET_PROC_ADDRESS_DEFAULT, &status) == CUDA_SUCCESS &&
          address != nullptr) {
        return address;
      }
    } else if (v1_ != nullptr &&
               v1_(name, &address, version, CU_GET_PROC_ADDRESS_DEFAULT) == CUDA_SUCCESS &&
               address != nullptr) {
      return address;
    }
    return dlsym(library_, linkage_name);
  }

 private:
  using GetProcAddressV1 = CUresult(CUDAAPI*)(const char*, void**, int, cuuint64_t);
  using GetProcAddressV2 = CUresult(CUDAAPI*)(const char*, void**, int, cuuint64_t, int*);
  void* library_;
  GetProcAddressV1 v1_ = nullptr;
  GetProcAddressV2 v2_ = nullptr;
};

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

enum class Need { REQUIRED, OPTIONAL };

template <typename Function>
void load(const SymbolSource& source, Function& function, const char* name,
          const char* linkage_name, int version, Need need) {
  function = reinterpret_cast<Function>(source.find(name, linkage_name, version));
  if (function == nullptr && need == Need::REQUIRED) {
    throw unavailable(
        "libcuda.so.1 has no " + std::string(name) + ", which came with CUDA " +
            version_text(version),
        "Install an NVIDIA driver for CUDA 11.8 or later." + std::string(host_driver_advice));
  }
}

Symbols load_symbols(const SymbolSource& source) {
  Symbols cu;
#define CUMEMPOOL_SYMBOL(symbol, version, need) \
  load(source, cu.symbol, #symbol, CUMEMPOOL_LINKAGE_NAME(symbol), version, Need::need);
#include "driver/cuda_symbols.inc"
#undef CUMEMPOOL_SYMBOL
  return cu;
}

std::string init_advice(CUresult result) {
  switch (static_cast<int>(result)) {
    case 34:  // CUDA_ERROR_STUB_LIBRARY
      return "The toolkit's stub of libcuda was opened: take its stubs folder out of "
             "LD_LIBRARY_PATH.";
    case CUDA_ERROR_NO_DEVICE:
      return std::string("Check CUDA_VISIBLE_DEVICES and what nvidia-smi lists.") +
             host_driver_advice;
    case 802:  // CUDA_ERROR_SYSTEM_NOT_READY
      return "Start nvidia-fabricmanager (systems with NVSwitch need it) and try again.";
    case 803:  // CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
      return "libcuda and the kernel module differ in version: reboot after the driver update, or "
             "start the container again.";
    case CUDA_ERROR_NOT_INITIALIZED:
      return "Was the process forked after CUDA was used? Use the spawn start method.";
    default:
      return std::string(
                 "Check nvidia-smi, the device files /dev/nvidia*, and that the module "
                 "nvidia_uvm is loaded.") +
             host_driver_advice;
  }
}

Error failed_to_open(CUresult result, const char* call) {
  Error error = unavailable("", init_advice(result));
  error.driver_call = call;
  error.result = result_of(result);
  return error;
}

void require(CUresult result, const char* call) {
  if (result != CUDA_SUCCESS) {
    throw failed_to_open(result, call);
  }
}

void list_devices(CudaDriver& driver) {
  require(driver.cu.cuDeviceGetCount(&driver.device_count), "cuDeviceGetCount");
  driver.devices =
      std::make_unique<PrimaryContext[]>(static_cast<std::size_t>(driver.device_count));
  for (int i = 0; i < driver.device_count; ++i) {
    require(driver.cu.cuDeviceGet(&driver.devices[static_cast<std::size_t>(i)].device, i),
            "cuDeviceGet");
  }
}

void fill_table(CudaDriver& driver) {
  cumempool_driver& table = driver.table;
  table.version = CUMEMPOOL_DRIVER_VERSION;
  table.size = sizeof(cumempool_driver);
  table.name = "cuda";
  table.self = &driver;
  table.init = init;
  table.driver_version = driver_version;
  table.device_count = device_count;
  table.device_name = device_name;
  table.device_attribute = device_attribute;
  table.memory_info = memory_info;
  table.context_active = context_active;
  table.context_retain = context_retain;
  table.context_release = context_release;
  table.context_enter = context_enter;
  table.context_leave = context_leave;
  table.granularity = granularity;
  table.reserve = reserve;
  table.unreserve = unreserve;
  table.create = create;
  table.release = release;
  table.map = map;
  table.unmap = unmap;
  table.set_access = set_access;
  table.export_handle = export_handle;
  table.import_handle = import_handle;
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
  table.copy_to_host = copy_to_host;
  table.copy_to_device = copy_to_device;
  table.fill = fill;
  table.fence = fence;
}

std::unique_ptr<CudaDriver> open_driver() {
  auto driver = std::make_unique<CudaDriver>();
  driver->cu = load_symbols(SymbolSource(open_library()));
  require(driver->cu.cuInit(0), "cuInit");
  list_devices(*driver);
  fill_table(*driver);
  return driver;
}

}  // namespace

const cumempool_driver& cuda_driver() {
  // Never destroyed: frees may come while the process exits, after static destructors have run.
  static auto* const mutex = new std::mutex;
  static CudaDriver* opened = nullptr;
  const std::lock_guard<std::mutex> lock(*mutex);
  if (opened == nullptr) {
    opened = open_driver().release();
  }
  return opened->table;
}

}  // namespace cumempool::driver
