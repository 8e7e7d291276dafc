// The `host` driver: the table of driver.h over host memory. It is stricter than libcuda about the
// contract, so that programs can be developed and tested without a GPU.
//
// It differs from a GPU on purpose:
//  - Commands run only when a thread waits for them: stream_synchronize, event_synchronize, fence,
//    deallocate, host_unregister of memory that they use, or a wait for another stream that waits
//    for them (stream_wait_event). event_query runs one command, and says NOT_READY also for the
//    last one. A missing wait fails every time.
//  - Work whose device memory was unmapped, even if mapped again since, breaks the device with 700
//    (CUDA_ERROR_ILLEGAL_ADDRESS) when it runs. So does work that waits for a device that broke.
//    Copies and digests refuse host memory that is not registered, unless the driver was made to
//    pin none. Copies refuse ranges that overlap.
//  - Read-only access is enforced: work that writes is refused or, if access was taken away later,
//    breaks the device. The CPU may write memory that some device may write.
//  - allocate takes whole granules of the budget. Only the bytes asked for may be used, and only by
//    its device.
//  - New memory is not zero. map takes a whole physical handle, inside one reservation.
// Its limits:
//  - A descriptor sent to another process, or duplicated, keeps the pages but not their charge: the
//    budget gets them back once this process has closed the descriptor of export_handle. Memory
//    imported from another process is charged there.
//  - A fabric handle works on this host only, between processes of one user, which may open each
//    other's files. It keeps no memory alive, like a real one.
//  - Each physical handle holds a file descriptor, so RLIMIT_NOFILE limits their number.
//  - The CPU can touch accessible device memory at any time; no fence waits for that.
#include "driver/host_driver.hpp"

#include <unistd.h>

#include <memory>
#include <new>
#include <string>
#include <string_view>

#include "driver/builtin.hpp"
#include "driver/driver.hpp"
#include "driver/error.hpp"
#include "driver/host_devices.hpp"
#include "driver/host_memory.hpp"

namespace cumempool::driver {
namespace {

// Calls a method from the table; nothing is thrown across (C1).
template <typename Call>
cumempool_result without_exceptions(const Call& call) noexcept {
  try {
    return call();
  } catch (const std::bad_alloc&) {
    return CUMEMPOOL_RESULT_OUT_OF_MEMORY;
  }
}

HostDevices& devices_of(void* self) { return *static_cast<HostDevices*>(self); }

// Entries of the table that call the method of the same name.
template <auto Method, typename... Args>
cumempool_result on_devices(void* self, Args... args) noexcept {
  return without_exceptions([&] { return (devices_of(self).*Method)(args...); });
}

template <auto Method, typename... Args>
cumempool_result in_memory(void* self, Args... args) noexcept {
  return without_exceptions([&] { return devices_of(self).template in_memory<Method>(args...); });
}

void fill_table(HostDevices& devices) {
  cumempool_driver& table = devices.table;
  table.version = CUMEMPOOL_DRIVER_VERSION;
  table.size = sizeof(table);
  table.name = "host";
  table.self = &devices;
#define CUMEMPOOL_ENTRY(name, function, size) table.name = on_devices<&HostDevices::name>;
#define CUMEMPOOL_MEMORY_ENTRY(name, function, size) table.name = in_memory<&HostMemory::name>;
#include "driver/entries.inc"
  table.create = on_devices<&HostDevices::create>;  // refuses a device that is lost
}

// Says what is wrong with the options, or "".
std::string problem_with(const cumempool_host_driver_options& options) {
  const auto page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  const std::uint64_t granule = options.granularity;
  if (options.size < sizeof(options)) return "size is not that of cumempool_host_driver_options";
  if (options.device_count < 1 || options.device_count > 64) return "device_count is not 1 to 64";
  if (granule < page || (granule & (granule - 1)) != 0) {
    return "granularity is not a power of two of at least a page (" + format_bytes(page) + ")";
  }
  if (options.bytes_per_device == 0 || options.bytes_per_device % granule != 0) {
    return "bytes_per_device is not a multiple of the granularity (" + format_bytes(granule) + ")";
  }
  constexpr std::uint32_t known = CUMEMPOOL_HANDLE_POSIX_FD | CUMEMPOOL_HANDLE_FABRIC;
  if ((options.handle_types & ~known) != 0) {
    return "handle_types has more than CUMEMPOOL_HANDLE_POSIX_FD and CUMEMPOOL_HANDLE_FABRIC";
  }
  if (options.fence > CUMEMPOOL_FENCE_NONE) return "fence is not a cumempool_fence_way";
  return options.rdma > 1 ? "rdma is not 0 or 1" : "";
}

}  // namespace

const cumempool_driver* make_host_driver(const cumempool_host_driver_options& options) {
  const std::string problem = problem_with(options);
  if (!problem.empty()) {
    Error error(CUMEMPOOL_INVALID_ARGUMENT, "options of the host driver: " + problem);
    error.operation = "making a host driver";
    throw error;
  }
  auto devices = std::make_unique<HostDevices>(options);
  fill_table(*devices);
  return &devices.release()->table;
}

void destroy_host_driver(const cumempool_driver* driver) noexcept {
  if (driver != nullptr) delete &devices_of(driver->self);
}

HostDriverCounters host_driver_counters(const cumempool_driver* driver) {
  return devices_of(driver->self).counters();
}

void host_driver_launch(const cumempool_driver* driver, int device, void (*function)(void*),
                        void* argument) {
  constexpr decltype(driver->fence) fence = on_devices<&HostDevices::fence>;
  if (driver->fence != fence) {
    throw Error(CUMEMPOOL_INVALID_ARGUMENT, "functions are launched on a host driver only");
  }
  check(*driver, "launch", devices_of(driver->self).launch(device, function, argument), device);
}

bool host_driver_set_capturing(const cumempool_driver* driver, int device, cumempool_stream stream,
                               bool capturing) {
  return devices_of(driver->self).set_capturing(device, stream, capturing);
}

bool host_driver_hold_context(const cumempool_driver* driver, int device, bool held) {
  return devices_of(driver->self).hold_context(device, held);
}

void host_driver_set_peer_access(const cumempool_driver* driver, bool possible) {
  devices_of(driver->self).set_peer_access(possible);
}

}  // namespace cumempool::driver
