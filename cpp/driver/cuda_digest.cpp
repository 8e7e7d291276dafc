// Loading and launching the digest kernel.
#include "driver/cuda_digest.hpp"

#include <algorithm>
#include <array>
#include <climits>
#include <utility>

#include "driver/digest.hpp"

namespace cumempool::driver {
namespace {

constexpr const char* kKernelPtx =
#include "driver/digest_kernel.ptx.inc"
    ;
constexpr const char* kKernelName = "cumempool_digest_kernel";

// The kernel takes its parameters as digest_kernel.cu declares them.
static_assert(sizeof(cumempool_extent) == 16 && sizeof(cumempool_digest) == 16);
static_assert(sizeof(DigestKeys) == 136 && alignof(DigestKeys) == 8);

cumempool_result result_of(CUresult result) { return static_cast<cumempool_result>(result); }

// What libcuda says where it has no code for a device and cannot make it; by number, since older
// headers lack some of the names.
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

bool good_arguments(const cumempool_extent* extents, std::size_t count,
                    const cumempool_digest* digests) {
  const auto places =
      reinterpret_cast<std::uintptr_t>(extents) | reinterpret_cast<std::uintptr_t>(digests);
  if (extents == nullptr || digests == nullptr || places % alignof(cumempool_extent) != 0 ||
      count > INT_MAX) {
    return false;
  }
  return std::all_of(extents, extents + count, [](const cumempool_extent& extent) {
    return digest_takes(extent.address, extent.bytes);
  });
}

// Where the device finds a whole range of pinned host memory. libcuda fails the question for memory
// that is not pinned; the kernel would lose the context over it.
CUresult device_address(const Symbols& cu, const void* host, std::size_t bytes,
                        CUdeviceptr& address) {
  const auto first = static_cast<CUdeviceptr>(reinterpret_cast<std::uintptr_t>(host));
  CUdeviceptr last = 0;
  CUresult result = cu.cuPointerGetAttribute(&address, CU_POINTER_ATTRIBUTE_DEVICE_POINTER, first);
  if (result == CUDA_SUCCESS) {
    result =
        cu.cuPointerGetAttribute(&last, CU_POINTER_ATTRIBUTE_DEVICE_POINTER, first + bytes - 1);
  }
  const bool apart = result == CUDA_SUCCESS && last - address != bytes - 1;
  return apart ? CUDA_ERROR_INVALID_VALUE : result;
}

bool can_launch(const Symbols& cu) {
  return cu.cuModuleLoadDataEx != nullptr && cu.cuModuleGetFunction != nullptr &&
         cu.cuModuleUnload != nullptr && cu.cuLaunchKernel != nullptr &&
         cu.cuPointerGetAttribute != nullptr;
}

}  // namespace

cumempool_result CudaDigest::load(const Symbols& cu, CUfunction& kernel) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (refused_) return CUMEMPOOL_RESULT_NOT_SUPPORTED;
  if (module_ == nullptr) {
    CUmodule module = nullptr;
    CUfunction function = nullptr;
    CUresult result = cu.cuModuleLoadDataEx(&module, kKernelPtx, 0, nullptr, nullptr);
    if (result == CUDA_SUCCESS) {
      result = cu.cuModuleGetFunction(&function, module, kKernelName);
      if (result != CUDA_SUCCESS) cu.cuModuleUnload(module);
    }
    refused_ = refuses_code(result);
    if (refused_) return CUMEMPOOL_RESULT_NOT_SUPPORTED;
    if (result != CUDA_SUCCESS) return result_of(result);
    module_ = module;
    kernel_ = function;
  }
  kernel = kernel_;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result CudaDigest::submit(const Symbols& cu, std::uint64_t seed,
                                    const cumempool_extent* extents, std::size_t count,
                                    cumempool_digest* digests, CUstream stream) {
  CUfunction kernel = nullptr;
  if (count != 0 && !good_arguments(extents, count, digests)) return CUMEMPOOL_RESULT_INVALID_VALUE;
  if (!can_launch(cu)) return CUMEMPOOL_RESULT_NOT_SUPPORTED;
  if (count == 0) return load(cu, kernel);
  CUdeviceptr from = 0;
  CUdeviceptr to = 0;
  CUresult result = device_address(cu, extents, count * sizeof(*extents), from);
  if (result == CUDA_SUCCESS) result = device_address(cu, digests, count * sizeof(*digests), to);
  if (result != CUDA_SUCCESS) return result_of(result);

  if (const auto loaded = load(cu, kernel)) return loaded;
  DigestKeys keys = digest_keys(seed);
  std::array<void*, 3> parameters{&from, &to, &keys};
  return result_of(cu.cuLaunchKernel(kernel, static_cast<unsigned int>(count), 1, 1, kDigestThreads,
                                     1, 1, 0, stream, parameters.data(), nullptr));
}

void CudaDigest::unload(const Symbols& cu) {
  const std::lock_guard<std::mutex> lock(mutex_);
  kernel_ = nullptr;
  // Fails only where the context is lost, and the code with it.
  if (module_ != nullptr) cu.cuModuleUnload(std::exchange(module_, nullptr));
}

void CudaDigest::forget() {
  const std::lock_guard<std::mutex> lock(mutex_);
  kernel_ = nullptr;
  module_ = nullptr;
}

}  // namespace cumempool::driver
