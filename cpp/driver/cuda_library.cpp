// Opens libcuda, and says what to do if that fails.
#include "driver/cuda_library.hpp"

#include <dlfcn.h>

#include <string>

namespace cumempool::driver {
namespace {

#define CUMEMPOOL_TEXT(text) #text
#define CUMEMPOOL_LINKAGE_NAME(symbol) CUMEMPOOL_TEXT(symbol)

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

// cuda.h names only one of the two forms of cuGetProcAddress, depending on its version.
using GetProcAddressV1 = CUresult(CUDAAPI*)(const char*, void**, int, cuuint64_t);
using GetProcAddressV2 = CUresult(CUDAAPI*)(const char*, void**, int, cuuint64_t, int*);

// Looks a symbol up through cuGetProcAddress, which returns exactly the form of that version, or by
// its linkage name if the driver lacks that function.
void* find_symbol(void* library, const char* name, const char* linkage_name, int version) {
  const auto v2 = reinterpret_cast<GetProcAddressV2>(dlsym(library, "cuGetProcAddress_v2"));
  const auto v1 = reinterpret_cast<GetProcAddressV1>(dlsym(library, "cuGetProcAddress"));
  void* address = nullptr;
  CUresult result = CUDA_ERROR_NOT_FOUND;
  if (v2 != nullptr) {
    int status = 0;
    result = v2(name, &address, version, CU_GET_PROC_ADDRESS_DEFAULT, &status);
  } else if (v1 != nullptr) {
    result = v1(name, &address, version, CU_GET_PROC_ADDRESS_DEFAULT);
  }
  const bool found = result == CUDA_SUCCESS && address != nullptr;
  return found ? address : dlsym(library, linkage_name);
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The third argument of CUMEMPOOL_SYMBOL in cuda_symbols.inc.
constexpr bool REQUIRED = true;
constexpr bool OPTIONAL = false;

template <typename Function>
void load(void* library, Function& function, const char* name, const char* linkage_name,
          int version, bool required) {
  function = reinterpret_cast<Function>(find_symbol(library, name, linkage_name, version));
  if (function == nullptr && required) {
    throw unavailable(
        "libcuda.so.1 has no " + std::string(name) + ", which came with CUDA " +
            version_text(version),
        "Install an NVIDIA driver for CUDA 11.8 or later." + std::string(host_driver_advice));
  }
}

Symbols load_symbols(void* library) {
  Symbols cu;
#define CUMEMPOOL_SYMBOL(symbol, version, need) \
  load(library, cu.symbol, #symbol, CUMEMPOOL_LINKAGE_NAME(symbol), version, need);
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
  error.result = static_cast<cumempool_result>(result);
  return error;
}

}  // namespace

Symbols open_libcuda() { return load_symbols(open_library()); }

void require(CUresult result, const char* call) {
  if (result != CUDA_SUCCESS) {
    throw failed_to_open(result, call);
  }
}

}  // namespace cumempool::driver
