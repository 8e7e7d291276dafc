// The entries of the `cuda` driver for virtual memory. They need no context.
#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <memory>
#include <new>

#include "driver/cuda_driver.hpp"

namespace cumempool::driver {
namespace {

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

cumempool_result granularity(CudaDriver& driver, const cumempool_memory_properties* properties,
                             std::size_t* bytes) {
  CUmemAllocationProp prop;
  const cumempool_result result = allocation_prop(driver, *properties, prop);
  if (result != CUMEMPOOL_RESULT_SUCCESS) {
    return result;
  }
  return result_of(
      driver.cu.cuMemGetAllocationGranularity(bytes, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
}

// The span of one page directory of the GPU with pages of 2 MiB, from Pascal on. A range that
// begins at such a boundary lies in the fewest directories, and libcuda gives access to it sooner.
constexpr std::size_t kDirectorySpan = std::size_t{512} << 20;

cumempool_result reserve(CudaDriver& driver, std::size_t bytes, cumempool_address* address) {
  CUdeviceptr pointer = 0;
  const std::size_t alignment = bytes >= kDirectorySpan ? kDirectorySpan : 0;
  const CUresult result = driver.cu.cuMemAddressReserve(&pointer, bytes, alignment, 0, 0);
  *address = pointer;
  return result_of(result);
}

cumempool_result unreserve(CudaDriver& driver, cumempool_address address, std::size_t bytes) {
  return result_of(driver.cu.cuMemAddressFree(address, bytes));
}

cumempool_result create(CudaDriver& driver, std::size_t bytes,
                        const cumempool_memory_properties* properties,
                        cumempool_physical* physical) {
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

cumempool_result release(CudaDriver& driver, cumempool_physical physical) {
  return result_of(driver.cu.cuMemRelease(physical));
}

cumempool_result map(CudaDriver& driver, cumempool_address address, std::size_t bytes,
                     cumempool_physical physical) {
  const CUresult result = driver.cu.cuMemMap(address, bytes, 0, physical, 0);
  if (result == CUDA_SUCCESS && !driver.mapped.add(address, bytes)) {
    driver.cu.cuMemUnmap(address, bytes);
    return CUMEMPOOL_RESULT_OUT_OF_MEMORY;
  }
  return result_of(result);
}

cumempool_result unmap(CudaDriver& driver, cumempool_address address, std::size_t bytes) {
  return driver.mapped.remove(address, bytes, [&driver, address, bytes] {
    return result_of(driver.cu.cuMemUnmap(address, bytes));
  });
}

cumempool_result set_access(CudaDriver& driver, cumempool_address address, std::size_t bytes,
                            const int* devices, std::size_t device_count, cumempool_access access) {
  if (access != CUMEMPOOL_ACCESS_READ && access != CUMEMPOOL_ACCESS_READ_WRITE) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  // One call for all devices, so that a failure has no effect. Only more than 16 devices need the
  // heap.
  std::array<CUmemAccessDesc, 16> few{};
  std::unique_ptr<CUmemAccessDesc[]> many;
  CUmemAccessDesc* descriptions = few.data();
  if (device_count > few.size()) {
    many.reset(new (std::nothrow) CUmemAccessDesc[device_count]());
    if (many == nullptr) return CUMEMPOOL_RESULT_OUT_OF_MEMORY;
    descriptions = many.get();
  }
  for (std::size_t i = 0; i < device_count; ++i) {
    const PrimaryContext* found = driver.find(devices[i]);
    if (found == nullptr) {
      return CUMEMPOOL_RESULT_INVALID_DEVICE;
    }
    descriptions[i].location = location_of(found->device);
    descriptions[i].flags = static_cast<CUmemAccess_flags>(access);
  }
  return result_of(driver.cu.cuMemSetAccess(address, bytes, descriptions, device_count));
}

// Sets close-on-exec, which libcuda does not: a started program must not keep the memory. libcuda
// cannot set it when it makes the descriptor, so a program that another thread starts in between
// keeps the memory, unless it is started with its descriptors closed, as `subprocess` does.
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

cumempool_result export_handle(CudaDriver& driver, cumempool_physical physical,
                               std::uint32_t handle_type, void* exported) {
  const Symbols& cu = driver.cu;
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

cumempool_result import_handle(CudaDriver& driver, const void* exported, std::uint32_t handle_type,
                               cumempool_physical* physical) {
  const Symbols& cu = driver.cu;
  if (cu.cuMemImportFromShareableHandle == nullptr) {
    return CUMEMPOOL_RESULT_NOT_SUPPORTED;
  }
  std::array<unsigned char, CUMEMPOOL_FABRIC_HANDLE_BYTES> fabric{};
  void* handle = fabric.data();
  if (handle_type == CUMEMPOOL_HANDLE_POSIX_FD) {
    int fd = -1;
    std::memcpy(&fd, exported, sizeof(fd));
    // CUDA takes the descriptor number itself in place of a pointer.
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

}  // namespace

void fill_cuda_memory_entries(cumempool_driver& table) {
#define CUMEMPOOL_MEMORY_ENTRY(name, function, size) table.name = entry<name>;
#include "driver/entries.inc"
}

}  // namespace cumempool::driver
