// The `cuda` driver: the table of driver.h over libcuda, opened at run time.
#include <memory>
#include <mutex>

#include "driver/builtin.hpp"
#include "driver/cuda_driver.hpp"
#include "driver/error.hpp"

namespace cumempool::driver {
namespace {

// driver.h numbers results and handle types as CUDA does. Older headers lack some of the names.
static_assert(static_cast<int>(CUMEMPOOL_RESULT_OUT_OF_MEMORY) == CUDA_ERROR_OUT_OF_MEMORY);
static_assert(static_cast<int>(CUMEMPOOL_RESULT_INVALID_CONTEXT) == CUDA_ERROR_INVALID_CONTEXT);
static_assert(static_cast<int>(CUMEMPOOL_RESULT_OPERATING_SYSTEM) == CUDA_ERROR_OPERATING_SYSTEM);
static_assert(static_cast<int>(CUMEMPOOL_RESULT_NOT_SUPPORTED) == CUDA_ERROR_NOT_SUPPORTED);
static_assert(static_cast<int>(CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED) ==
              CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
static_assert(static_cast<int>(CUMEMPOOL_HANDLE_POSIX_FD) ==
              CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
static_assert(static_cast<int>(CUMEMPOOL_ACCESS_READ) == CU_MEM_ACCESS_FLAGS_PROT_READ);
static_assert(static_cast<int>(CUMEMPOOL_ACCESS_READ_WRITE) == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
static_assert(sizeof(cumempool_address) == sizeof(CUdeviceptr));
static_assert(sizeof(cumempool_physical) == sizeof(CUmemGenericAllocationHandle));
static_assert(sizeof(cumempool_stream) == sizeof(CUstream));
static_assert(sizeof(CUcontext) == sizeof(std::uint64_t));
#if CUDA_VERSION >= 12030
static_assert(static_cast<int>(CUMEMPOOL_HANDLE_FABRIC) == CU_MEM_HANDLE_TYPE_FABRIC);
static_assert(sizeof(CUmemFabricHandle) == CUMEMPOOL_FABRIC_HANDLE_BYTES);
#endif

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
  driver.table.version = CUMEMPOOL_DRIVER_VERSION;
  driver.table.size = sizeof(cumempool_driver);
  driver.table.name = "cuda";
  driver.table.self = &driver;
  fill_cuda_device_entries(driver.table);
  fill_cuda_memory_entries(driver.table);
  fill_cuda_work_entries(driver.table);
}

std::unique_ptr<CudaDriver> open_driver() {
  auto driver = std::make_unique<CudaDriver>();
  driver->cu = open_libcuda();
  require(driver->cu.cuInit(0), "cuInit");
  list_devices(*driver);
  fill_table(*driver);
  return driver;
}

}  // namespace

const cumempool_driver& cuda_driver() {
  // Never destroyed: the process may free memory at exit, after static destructors have run.
  static auto* const mutex = new std::mutex;
  static CudaDriver* opened = nullptr;
  const std::lock_guard<std::mutex> lock(*mutex);
  if (opened == nullptr) {
    opened = open_driver().release();
  }
  return opened->table;
}

}  // namespace cumempool::driver
