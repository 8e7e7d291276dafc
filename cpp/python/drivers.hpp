// Drivers as Python objects: the CUDA driver, simulated ones, and queries of their devices.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>

#include "cumempool/cumempool.h"
#include "dlpack.hpp"

namespace cumempool::python {

// A driver and the DLPack device type of its memory. A host driver goes with the last user of its
// memory.
struct DriverObject {
  const cumempool_driver* table = nullptr;
  std::int32_t memory = kDlCuda;
  bool owned = false;

  DriverObject() = default;
  DriverObject(const DriverObject&) = delete;
  DriverObject& operator=(const DriverObject&) = delete;
  ~DriverObject();

  // The DLPack device number of its memory.
  std::int32_t device_id(int device) const { return memory == kDlCpu ? 0 : device; }
};
using DriverPointer = std::shared_ptr<DriverObject>;

DriverPointer open_cuda();
DriverPointer open_host(int devices, std::uint64_t bytes_per_device, std::uint64_t granularity,
                        bool rdma, bool fabric, std::uint32_t fence);

// Free bytes of host memory (0 if unknown), the limit, and the file that says so.
std::tuple<std::uint64_t, std::uint64_t, std::string> host_room();

pybind11::dict probe_device(const DriverObject& driver, int device);
int device_count(const DriverObject& driver);
bool context_active(const DriverObject& driver, int device);
int driver_version(const DriverObject& driver);
// `function` is the address of a C function, as ctypes gives it.
void launch(const DriverObject& driver, int device, std::uintptr_t function,
            std::uintptr_t argument);

}  // namespace cumempool::python
