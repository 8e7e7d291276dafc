// Drivers as Python objects: the CUDA driver, simulated ones, and queries of their devices.
#include "drivers.hpp"

#include <limits>

#include "errors.hpp"
#include "records.hpp"

namespace py = pybind11;

namespace cumempool::python {

DriverObject::~DriverObject() {
  if (!owned) return;
  const Unlocked unlocked;  // unmapping all its memory takes time
  cumempool_host_driver_destroy(table);
}

DriverPointer open_cuda() {
  auto driver = std::make_shared<DriverObject>();
  call([&] { return cumempool_cuda_driver(&driver->table); });
  return driver;
}

DriverPointer open_host(int devices, std::uint64_t bytes_per_device, std::uint64_t granularity,
                        bool rdma, bool fabric, std::uint32_t fence) {
  cumempool_host_driver_options options{};
  options.size = sizeof options;
  options.device_count = devices;
  options.bytes_per_device = bytes_per_device;
  options.granularity = granularity;
  options.handle_types = CUMEMPOOL_HANDLE_POSIX_FD;
  if (fabric) options.handle_types |= CUMEMPOOL_HANDLE_FABRIC;
  options.rdma = rdma ? 1 : 0;
  options.fence = fence;
  auto driver = std::make_shared<DriverObject>();
  call([&] { return cumempool_host_driver_create(&options, &driver->table); });
  driver->memory = kDlCpu;
  driver->owned = true;
  return driver;
}

std::tuple<std::uint64_t, std::uint64_t, std::string> host_room() {
  cumempool_host_memory memory{};
  memory.size = sizeof memory;
  call([&] { return cumempool_host_room(&memory); });
  const bool known = memory.free_bytes != std::numeric_limits<std::uint64_t>::max();
  return {known ? memory.free_bytes : 0, memory.limit_bytes, memory.source};
}

py::dict probe_device(const DriverObject& driver, int device) {
  cumempool_device_probe probe{};
  probe.size = sizeof probe;
  call([&] { return cumempool_probe_device(driver.table, device, &probe); });
  return fields_of(probe);
}

int device_count(const DriverObject& driver) {
  int count = 0;
  const auto* table = driver.table;
  return table->device_count(table->self, &count) == CUMEMPOOL_RESULT_SUCCESS ? count : 0;
}

bool context_active(const DriverObject& driver, int device) {
  int active = 0;
  const auto* table = driver.table;
  return table->context_active(table->self, device, &active) == CUMEMPOOL_RESULT_SUCCESS &&
         active != 0;
}

int driver_version(const DriverObject& driver) {
  int version = 0;
  const auto* table = driver.table;
  return table->driver_version(table->self, &version) == CUMEMPOOL_RESULT_SUCCESS ? version : 0;
}

void launch(const DriverObject& driver, int device, std::uintptr_t function,
            std::uintptr_t argument) {
  auto* const called =
      reinterpret_cast<void (*)(void*)>(function);  // NOLINT(performance-no-int-to-ptr)
  call([&] {
    return cumempool_host_driver_launch(
        driver.table, device, called,
        reinterpret_cast<void*>(argument));  // NOLINT(performance-no-int-to-ptr)
  });
}

}  // namespace cumempool::python
