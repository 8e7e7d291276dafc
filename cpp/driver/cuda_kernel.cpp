// Loads and unloads a kernel.
#include "driver/cuda_kernel.hpp"

#include <algorithm>
#include <array>
#include <utility>

namespace cumempool::driver {
namespace {

// Whether libcuda says that it has no code for the device and cannot make it. By number, because
// older headers lack some of the names.
bool refuses_code(CUresult result) {
  constexpr std::array<int, 9> refusals{200,   // CUDA_ERROR_INVALID_IMAGE
                                        209,   // CUDA_ERROR_NO_BINARY_FOR_GPU
                                        218,   // CUDA_ERROR_INVALID_PTX
                                        221,   // CUDA_ERROR_JIT_COMPILER_NOT_FOUND
                                        222,   // CUDA_ERROR_UNSUPPORTED_PTX_VERSION
                                        223,   // CUDA_ERROR_JIT_COMPILATION_DISABLED
                                        300,   // CUDA_ERROR_INVALID_SOURCE
                                        500,   // CUDA_ERROR_NOT_FOUND
                                        801};  // CUDA_ERROR_NOT_SUPPORTED
  return std::find(refusals.begin(), refusals.end(), static_cast<int>(result)) != refusals.end();
}

}  // namespace

bool CudaKernel::supported(const Symbols& cu) noexcept {
  return cu.cuModuleLoadDataEx != nullptr && cu.cuModuleGetFunction != nullptr &&
         cu.cuModuleUnload != nullptr && cu.cuLaunchKernel != nullptr;
}

cumempool_result CudaKernel::load(const Symbols& cu, const char* ptx, const char* name,
                                  CUfunction& kernel) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (refused_) return CUMEMPOOL_RESULT_NOT_SUPPORTED;
  if (module_ == nullptr) {
    CUmodule module = nullptr;
    CUfunction function = nullptr;
    CUresult result = cu.cuModuleLoadDataEx(&module, ptx, 0, nullptr, nullptr);
    if (result == CUDA_SUCCESS) {
      result = cu.cuModuleGetFunction(&function, module, name);
      if (result != CUDA_SUCCESS) cu.cuModuleUnload(module);
    }
    refused_ = refuses_code(result);
    if (refused_) return CUMEMPOOL_RESULT_NOT_SUPPORTED;
    if (result != CUDA_SUCCESS) return static_cast<cumempool_result>(result);
    module_ = module;
    kernel_ = function;
  }
  kernel = kernel_;
  return CUMEMPOOL_RESULT_SUCCESS;
}

void CudaKernel::unload(const Symbols& cu) {
  const std::lock_guard<std::mutex> lock(mutex_);
  kernel_ = nullptr;
  // Fails only if the context is lost, and the code with it.
  if (module_ != nullptr) cu.cuModuleUnload(std::exchange(module_, nullptr));
}

void CudaKernel::forget() {
  const std::lock_guard<std::mutex> lock(mutex_);
  kernel_ = nullptr;
  module_ = nullptr;
}

}  // namespace cumempool::driver
