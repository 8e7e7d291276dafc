// Turns a failed driver call into an Error that names the call, the free memory, and the remedy.
#include "driver/driver.hpp"

#include <pthread.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <mutex>

namespace cumempool::driver {
namespace {

// Returns the CUDA function behind an entry of the table; null for other names.
const char* cuda_function(const char* call) {
#define CUMEMPOOL_ENTRY(name, function, size) \
  if (std::strcmp(call, #name) == 0) return #function;
#include "driver/entries.inc"
  return nullptr;
}

std::string call_name(const cumempool_driver& table, const char* call) {
  const char* function = std::strcmp(table.name, "cuda") == 0 ? cuda_function(call) : nullptr;
  if (function != nullptr) return function;
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
                   "stop other processes that use the device.";
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
               "go without comparing contents.";
      }
      if (std::strcmp(call, "host_register") == 0) {
        return "The driver pins no host memory here (confidential computing allows none): back up "
               "to pageable memory (backup='pageable') or a file, or discard.";
      }
      if (std::strcmp(call, "fence") == 0) {
        return "No known call waits for the work of this device, so its memory can be neither put "
               "to sleep nor freed: report the device, the driver and this message.";
      }
      return "The device or driver does not grant this kind of memory; cumempool probe lists the "
             "kinds that it grants.";
    case CUMEMPOOL_RESULT_OPERATING_SYSTEM:
      return "The operating system refused: check the limits on open files (ulimit -n), locked "
             "memory (ulimit -l) and mappings (vm.max_map_count).";
    case CUMEMPOOL_RESULT_HOST_MEMORY_ALREADY_REGISTERED:
      return "Do not pin memory that cumempool holds with cudaHostRegister.";
    case 214:  // CUDA_ERROR_ECC_UNCORRECTABLE
    case 220:  // CUDA_ERROR_NVLINK_UNCORRECTABLE
      return "The hardware reported an uncorrectable error: see nvidia-smi -q and the kernel log, "
             "and restart the process.";
    case CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED:
    case 901:  // CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    case 906:  // CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
      return "A stream capture is in the way: call again after the capture has ended.";
    default:
      if (loses_context(result)) {
        return "A kernel crashed earlier and the context is lost: restart the process, and run "
               "with CUDA_LAUNCH_BLOCKING=1 to find that kernel.";
      }
      return "Run with CUDA_LAUNCH_BLOCKING=1 to rule out an earlier failure, and report this "
             "message.";
  }
}

// Best effort: the totals stay unknown if the context is not held or a call fails.
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

// The list has all entries of the table, in order; they are its last members and only functions.
constexpr std::size_t entry_offsets[] = {
#define CUMEMPOOL_ENTRY(name, function, size) offsetof(cumempool_driver, name),
#include "driver/entries.inc"
};

constexpr bool every_entry_is_listed() {
  std::size_t expected = offsetof(cumempool_driver, init);
  for (const std::size_t offset : entry_offsets) {
    if (offset != expected) return false;
    expected += sizeof(cumempool_driver::init);
  }
  return expected == sizeof(cumempool_driver);
}

static_assert(every_entry_is_listed(), "entries.inc and cumempool_driver differ");

}  // namespace

void check(const cumempool_driver& table, const char* call, cumempool_result result, int device,
           std::uint64_t bytes) {
  if (result != CUMEMPOOL_RESULT_SUCCESS) fail(table, call, result, device, bytes);
}

void fail(const cumempool_driver& table, const char* call, cumempool_result result, int device,
          std::uint64_t bytes) {
  throw failure(table, call, result, device, bytes);
}

std::string Driver::device_name(int device) const {
  std::array<char, 256> name{};
  device_name(device, name.data(), name.size());
  name.back() = '\0';
  return name.data();
}

void Driver::set_access(cumempool_address address, std::size_t bytes,
                        const std::vector<int>& devices, cumempool_access access) const {
  check(*table_, "set_access",
        table_->set_access(table_->self, address, bytes, devices.data(), devices.size(), access),
        devices.empty() ? -1 : devices.front(), bytes);
}

void Driver::fence(const std::vector<int>& devices) const {
  check(*table_, "fence", table_->fence(table_->self, devices.data(), devices.size()),
        devices.size() == 1 ? devices.front() : -1);
}

bool Driver::pin(int device, void* pointer, std::size_t bytes) const {
  const cumempool_result result = table_->host_register(table_->self, device, pointer, bytes);
  if (result == CUMEMPOOL_RESULT_NOT_SUPPORTED || result == CUMEMPOOL_RESULT_NOT_PERMITTED) {
    return false;
  }
  check(*table_, "host_register", result, device, bytes);
  return true;
}

bool Driver::event_query(int device, cumempool_event event) const {
  const cumempool_result result = table_->event_query(table_->self, device, event);
  if (result == CUMEMPOOL_RESULT_NOT_READY) return false;
  check(*table_, "event_query", result, device);
  return true;
}

RetainedContext::RetainedContext(Driver driver, int device) : driver_(driver), device_(device) {
  const cumempool_driver& table = driver_.table();
  check(table, "context_retain", table.context_retain(table.self, device_), device_);
}

RetainedContext::~RetainedContext() {
  // Fails only if the driver is gone already, and the context with it.
  const cumempool_driver& table = driver_.table();
  table.context_release(table.self, device_);
}

ContextScope::ContextScope(Driver driver, int device) : driver_(driver) {
  const cumempool_driver& table = driver_.table();
  check(table, "context_enter", table.context_enter(table.self, device, &token_), device);
}

ContextScope::~ContextScope() {
  // Fails only if the driver is gone already; then there is nothing to restore.
  const cumempool_driver& table = driver_.table();
  table.context_leave(table.self, &token_);
}

namespace {

std::atomic<bool> forked{false};

}  // namespace

void watch_forks() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { forked = true; }); });
}

bool in_forked_child() noexcept { return forked; }

}  // namespace cumempool::driver
