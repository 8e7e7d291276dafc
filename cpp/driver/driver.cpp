// Turns results of a driver table into Error, with the name of the call, the memory there was, and
// what to do about it.
#include "driver/driver.hpp"

#include <array>
#include <cstring>

namespace cumempool::driver {
namespace {

struct CallName {
  const char* entry;
  const char* cuda;
};

// The CUDA function that does the work of each entry of the table.
constexpr std::array<CallName, 42> cuda_calls = {{
    {"init", "cuInit"},
    {"driver_version", "cuDriverGetVersion"},
    {"device_count", "cuDeviceGetCount"},
    {"device_name", "cuDeviceGetName"},
    {"device_attribute", "cuDeviceGetAttribute"},
    {"peer_access", "cuDeviceCanAccessPeer"},
    {"memory_info", "cuMemGetInfo"},
    {"context_active", "cuDevicePrimaryCtxGetState"},
    {"context_retain", "cuDevicePrimaryCtxRetain"},
    {"context_release", "cuDevicePrimaryCtxRelease"},
    {"context_enter", "cuCtxPushCurrent"},
    {"context_leave", "cuCtxPopCurrent"},
    {"granularity", "cuMemGetAllocationGranularity"},
    {"reserve", "cuMemAddressReserve"},
    {"unreserve", "cuMemAddressFree"},
    {"create", "cuMemCreate"},
    {"release", "cuMemRelease"},
    {"map", "cuMemMap"},
    {"unmap", "cuMemUnmap"},
    {"set_access", "cuMemSetAccess"},
    {"export_handle", "cuMemExportToShareableHandle"},
    {"import_handle", "cuMemImportFromShareableHandle"},
    {"allocate", "cuMemAlloc"},
    {"deallocate", "cuMemFree"},
    {"host_register", "cuMemHostRegister"},
    {"host_unregister", "cuMemHostUnregister"},
    {"stream_create", "cuStreamCreate"},
    {"stream_destroy", "cuStreamDestroy"},
    {"stream_synchronize", "cuStreamSynchronize"},
    {"stream_is_capturing", "cuStreamIsCapturing"},
    {"event_create", "cuEventCreate"},
    {"event_destroy", "cuEventDestroy"},
    {"event_record", "cuEventRecord"},
    {"event_synchronize", "cuEventSynchronize"},
    {"event_query", "cuEventQuery"},
    {"stream_wait_event", "cuStreamWaitEvent"},
    {"copy_to_host", "cuMemcpyDtoHAsync"},
    {"copy_to_device", "cuMemcpyHtoDAsync"},
    {"copy_on_device", "cuMemcpyDtoDAsync"},
    {"fill", "cuMemsetD8Async"},
    {"digest", "cuLaunchKernel"},
    // The first way that fence() tries.
    {"fence", "cuMemHostRegister"},
}};

std::string call_name(const cumempool_driver& table, const char* call) {
  if (std::strcmp(table.name, "cuda") == 0) {
    for (const CallName& name : cuda_calls) {
      if (std::strcmp(name.entry, call) == 0) {
        return name.cuda;
      }
    }
  }
  return std::string(table.name) + "." + call;
}

bool pins_host_memory(const char* call) {
  return std::strcmp(call, "host_register") == 0 || std::strcmp(call, "fence") == 0;
}

cumempool_status status_of(const char* call, cumempool_result result) {
  if ((result == CUMEMPOOL_RESULT_NOT_SUPPORTED || result == CUMEMPOOL_RESULT_NOT_PERMITTED) &&
      pins_host_memory(call)) {
    return CUMEMPOOL_UNSUPPORTED;
  }
  if (result != CUMEMPOOL_RESULT_OUT_OF_MEMORY) {
    return CUMEMPOOL_DRIVER_ERROR;
  }
  return pins_host_memory(call) ? CUMEMPOOL_OUT_OF_HOST_MEMORY : CUMEMPOOL_OUT_OF_MEMORY;
}

const char* advice_for(const char* call, cumempool_result result) {
  switch (result) {
    case CUMEMPOOL_RESULT_OUT_OF_MEMORY:
      return pins_host_memory(call)
                 ? "Free host memory, raise the locked-memory limit (ulimit -l), or discard tags "
                   "instead of backing them up."
                 : "Put other tags to sleep, free tensors and call torch.cuda.empty_cache(), or "
                   "stop "
                   "other processes that use the device.";
    case CUMEMPOOL_RESULT_DEINITIALIZED:
      return "The CUDA driver is shutting down: call before the process exits.";
    case CUMEMPOOL_RESULT_NOT_INITIALIZED:
      return "The driver was not initialised in this process; after fork, use the spawn start "
             "method.";
    case CUMEMPOOL_RESULT_NO_DEVICE:
    case CUMEMPOOL_RESULT_INVALID_DEVICE:
      return "Check the device number, CUDA_VISIBLE_DEVICES, and what nvidia-smi lists.";
    case CUMEMPOOL_RESULT_INVALID_CONTEXT:
    case 709:  // CUDA_ERROR_CONTEXT_IS_DESTROYED
      return "The device's primary context is not held or was reset: do not reset the device while "
             "allocations live.";
    case CUMEMPOOL_RESULT_NOT_PERMITTED:
    case CUMEMPOOL_RESULT_NOT_SUPPORTED:
      if (std::strcmp(call, "digest") == 0) {
        return "The NVIDIA driver cannot compile the digest kernel for this device: update it, or "
               "go "
               "without comparing contents.";
      }
      if (std::strcmp(call, "host_register") == 0) {
        return "The driver pins no host memory here (confidential computing allows none): back up "
               "to pageable memory (backup='pageable') or a file, or discard.";
      }
      if (std::strcmp(call, "fence") == 0) {
        return "Nothing that was tried waits for the work of this device, so its memory can be "
               "neither put to sleep nor freed: report the device, the driver and this message.";
      }
      return "The device or driver does not grant this kind of memory; cumempool probe says what "
             "it "
             "grants.";
    case CUMEMPOOL_RESULT_OPERATING_SYSTEM:
      return "The operating system refused: check the limits on open files (ulimit -n), locked "
             "memory (ulimit -l) and mappings (vm.max_map_count).";
    case CUMEMPOOL_RESULT_HOST_MEMORY_ALREADY_REGISTERED:
      return "Do not pin memory that cumempool holds with cudaHostRegister.";
    case 214:  // CUDA_ERROR_ECC_UNCORRECTABLE
    case 220:  // CUDA_ERROR_NVLINK_UNCORRECTABLE
      return "The hardware reported an uncorrectable error: see nvidia-smi -q and the kernel log, "
             "and restart the process.";
    case 700:  // CUDA_ERROR_ILLEGAL_ADDRESS
    case 702:  // CUDA_ERROR_LAUNCH_TIMEOUT
    case 710:  // CUDA_ERROR_ASSERT
    case 714:  // CUDA_ERROR_HARDWARE_STACK_ERROR
    case 715:  // CUDA_ERROR_ILLEGAL_INSTRUCTION
    case 716:  // CUDA_ERROR_MISALIGNED_ADDRESS
    case 717:  // CUDA_ERROR_INVALID_ADDRESS_SPACE
    case 718:  // CUDA_ERROR_INVALID_PC
    case 719:  // CUDA_ERROR_LAUNCH_FAILED
      return "A kernel crashed earlier and the context is lost: restart the process, and run with "
             "CUDA_LAUNCH_BLOCKING=1 to find that kernel.";
    case CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED:
    case 901:  // CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    case 906:  // CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
      return "A stream capture is in the way: call again after the capture has ended.";
    default:
      return "Run with CUDA_LAUNCH_BLOCKING=1 to rule out an earlier failure, and report this "
             "message.";
  }
}

// Best effort: a context that is not held, or a failing call, leaves the totals unknown.
void note_free_memory(const cumempool_driver& table, int device, Error& error) {
  cumempool_context_token token{};
  if (device < 0 || table.context_enter(table.self, device, &token) != CUMEMPOOL_RESULT_SUCCESS) {
    return;
  }
  std::uint64_t free_bytes = 0;
  std::uint64_t total_bytes = 0;
  if (table.memory_info(table.self, device, &free_bytes, &total_bytes) ==
      CUMEMPOOL_RESULT_SUCCESS) {
    error.free_bytes = free_bytes;
    error.total_bytes = total_bytes;
  }
  table.context_leave(table.self, &token);
}

Error failure(const cumempool_driver& table, const char* call, cumempool_result result, int device,
              std::uint64_t bytes) {
  Error error(status_of(call, result), "");
  error.driver_call = call_name(table, call);
  error.result = result;
  error.device = device;
  error.bytes = bytes;
  error.advice = advice_for(call, result);
  if (result == CUMEMPOOL_RESULT_OUT_OF_MEMORY) {
    note_free_memory(table, device, error);
  }
  return error;
}

}  // namespace

void check(const cumempool_driver& table, const char* call, cumempool_result result, int device,
           std::uint64_t bytes) {
  if (result != CUMEMPOOL_RESULT_SUCCESS) {
    throw failure(table, call, result, device, bytes);
  }
}

void Driver::init() const { check(*table_, "init", table_->init(table_->self)); }

int Driver::device_count() const {
  int count = 0;
  check(*table_, "device_count", table_->device_count(table_->self, &count));
  return count;
}

std::string Driver::device_name(int device) const {
  std::array<char, 256> name{};
  check(*table_, "device_name", table_->device_name(table_->self, device, name.data(), name.size()),
        device);
  name.back() = '\0';
  return name.data();
}

int Driver::device_attribute(int device, cumempool_device_attribute attribute) const {
  int value = 0;
  check(*table_, "device_attribute",
        table_->device_attribute(table_->self, device, attribute, &value), device);
  return value;
}

bool Driver::peer_access(int device, int peer) const {
  int possible = 0;
  check(*table_, "peer_access", table_->peer_access(table_->self, device, peer, &possible), device);
  return possible != 0;
}

bool Driver::context_active(int device) const {
  int active = 0;
  check(*table_, "context_active", table_->context_active(table_->self, device, &active), device);
  return active != 0;
}

void Driver::memory_info(int device, std::uint64_t& free_bytes, std::uint64_t& total_bytes) const {
  check(*table_, "memory_info",
        table_->memory_info(table_->self, device, &free_bytes, &total_bytes), device);
}

std::size_t Driver::granularity(const cumempool_memory_properties& properties) const {
  std::size_t bytes = 0;
  check(*table_, "granularity", table_->granularity(table_->self, &properties, &bytes),
        properties.device);
  return bytes;
}

cumempool_address Driver::reserve(std::size_t bytes) const {
  cumempool_address address = 0;
  check(*table_, "reserve", table_->reserve(table_->self, bytes, &address), -1, bytes);
  return address;
}

cumempool_physical Driver::create(std::size_t bytes,
                                  const cumempool_memory_properties& properties) const {
  cumempool_physical physical = 0;
  check(*table_, "create", table_->create(table_->self, bytes, &properties, &physical),
        properties.device, bytes);
  return physical;
}

void Driver::map(cumempool_address address, std::size_t bytes, cumempool_physical physical) const {
  check(*table_, "map", table_->map(table_->self, address, bytes, physical), -1, bytes);
}

void Driver::set_access(cumempool_address address, std::size_t bytes,
                        const std::vector<int>& devices, cumempool_access access) const {
  check(*table_, "set_access",
        table_->set_access(table_->self, address, bytes, devices.data(), devices.size(), access),
        devices.empty() ? -1 : devices.front(), bytes);
}

cumempool_address Driver::allocate(int device, std::size_t bytes) const {
  cumempool_address address = 0;
  check(*table_, "allocate", table_->allocate(table_->self, device, bytes, &address), device,
        bytes);
  return address;
}

void Driver::host_register(int device, void* pointer, std::size_t bytes) const {
  check(*table_, "host_register", table_->host_register(table_->self, device, pointer, bytes),
        device, bytes);
}

bool Driver::pin(int device, void* pointer, std::size_t bytes) const {
  const cumempool_result result = table_->host_register(table_->self, device, pointer, bytes);
  if (result == CUMEMPOOL_RESULT_NOT_SUPPORTED || result == CUMEMPOOL_RESULT_NOT_PERMITTED) {
    return false;
  }
  check(*table_, "host_register", result, device, bytes);
  return true;
}

cumempool_stream Driver::stream_create(int device) const {
  cumempool_stream stream = 0;
  check(*table_, "stream_create", table_->stream_create(table_->self, device, &stream), device);
  return stream;
}

void Driver::stream_synchronize(int device, cumempool_stream stream) const {
  check(*table_, "stream_synchronize", table_->stream_synchronize(table_->self, device, stream),
        device);
}

bool Driver::stream_is_capturing(int device, cumempool_stream stream) const {
  int capturing = 0;
  check(*table_, "stream_is_capturing",
        table_->stream_is_capturing(table_->self, device, stream, &capturing), device);
  return capturing != 0;
}

cumempool_event Driver::event_create(int device) const {
  cumempool_event event = 0;
  check(*table_, "event_create", table_->event_create(table_->self, device, &event), device);
  return event;
}

void Driver::event_record(int device, cumempool_event event, cumempool_stream stream) const {
  check(*table_, "event_record", table_->event_record(table_->self, device, event, stream), device);
}

void Driver::event_synchronize(int device, cumempool_event event) const {
  check(*table_, "event_synchronize", table_->event_synchronize(table_->self, device, event),
        device);
}

bool Driver::event_query(int device, cumempool_event event) const {
  const cumempool_result result = table_->event_query(table_->self, device, event);
  if (result == CUMEMPOOL_RESULT_NOT_READY) return false;
  check(*table_, "event_query", result, device);
  return true;
}

void Driver::stream_wait_event(int device, cumempool_stream stream, cumempool_event event) const {
  check(*table_, "stream_wait_event",
        table_->stream_wait_event(table_->self, device, stream, event), device);
}

void Driver::copy_to_host(int device, void* destination, cumempool_address source,
                          std::size_t bytes, cumempool_stream stream) const {
  check(*table_, "copy_to_host",
        table_->copy_to_host(table_->self, device, destination, source, bytes, stream), device,
        bytes);
}

void Driver::copy_to_device(int device, cumempool_address destination, const void* source,
                            std::size_t bytes, cumempool_stream stream) const {
  check(*table_, "copy_to_device",
        table_->copy_to_device(table_->self, device, destination, source, bytes, stream), device,
        bytes);
}

void Driver::copy_on_device(int device, cumempool_address destination, cumempool_address source,
                            std::size_t bytes, cumempool_stream stream) const {
  check(*table_, "copy_on_device",
        table_->copy_on_device(table_->self, device, destination, source, bytes, stream), device,
        bytes);
}

void Driver::fill(int device, cumempool_address destination, std::uint8_t byte, std::size_t bytes,
                  cumempool_stream stream) const {
  check(*table_, "fill", table_->fill(table_->self, device, destination, byte, bytes, stream),
        device, bytes);
}

void Driver::digest(int device, std::uint64_t seed, const cumempool_extent* extents,
                    std::size_t count, cumempool_digest* digests, cumempool_stream stream) const {
  check(*table_, "digest",
        table_->digest(table_->self, device, seed, extents, count, digests, stream), device);
}

void Driver::fence(const std::vector<int>& devices) const {
  check(*table_, "fence", table_->fence(table_->self, devices.data(), devices.size()),
        devices.size() == 1 ? devices.front() : -1);
}

RetainedContext::RetainedContext(Driver driver, int device) : driver_(driver), device_(device) {
  const cumempool_driver& table = driver_.table();
  check(table, "context_retain", table.context_retain(table.self, device_), device_);
}

RetainedContext::~RetainedContext() {
  // Fails only where the driver is gone already, and the context with it.
  const cumempool_driver& table = driver_.table();
  table.context_release(table.self, device_);
}

ContextScope::ContextScope(Driver driver, int device) : driver_(driver) {
  const cumempool_driver& table = driver_.table();
  check(table, "context_enter", table.context_enter(table.self, device, &token_), device);
}

ContextScope::~ContextScope() {
  // Fails only where the driver is gone already; there is nothing to put back then.
  const cumempool_driver& table = driver_.table();
  table.context_leave(table.self, &token_);
}

}  // namespace cumempool::driver
