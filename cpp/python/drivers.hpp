// Drivers as Python sees them: the one of CUDA, simulated ones, and what they say of their devices.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>

#include "cumempool/cumempool.h"
#include "dlpack.hpp"

namespace cumempool::python {

// A driver and how its memory looks to DLPack. Host drivers go with the last user of their memory.
struct Driver {
  const cumempool_driver* table = nullptr;
  DlDeviceType memory = kDlCuda;
  bool owned = false;

  Driver() = default;
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;
  ~Driver();

  // Where its memory is, for DLPack.
  DlDevice place(int device) const { return {memory, memory == kDlCpu ? 0 : device}; }
};
using DriverPointer = std::shared_ptr<Driver>;

DriverPointer open_cuda();
DriverPointer open_host(int devices, std::uint64_t bytes_per_device, std::uint64_t granularity,
                        bool rdma, bool fabric, std::uint32_t fence);

// Bytes, the limit and its file.
std::tuple<std::uint64_t, std::uint64_t, std::string> host_room();

pybind11::dict probe_device(const Driver& driver, int device);
int device_count(const Driver& driver);
bool context_active(const Driver& driver, int device);
int driver_version(const Driver& driver);
// `function` is the address of a C function, as ctypes has it.
void launch(const Driver& driver, int device, std::uintptr_t function, std::uintptr_t argument);

}  // namespace cumempool::python
