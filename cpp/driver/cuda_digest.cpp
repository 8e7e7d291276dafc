// Launching the digest kernel.
#include "driver/cuda_digest.hpp"

#include <algorithm>
#include <array>
#include <climits>

#include "driver/digest.hpp"

namespace cumempool::driver {

const char* const kDigestPtx =
#include "driver/digest_kernel.ptx.inc"
    ;

namespace {

// The kernel takes its parameters as digest_kernel.cu declares them.
static_assert(sizeof(cumempool_extent) == 16 && sizeof(cumempool_digest) == 16);
static_assert(sizeof(DigestKeys) == 136 && alignof(DigestKeys) == 8);

cumempool_result result_of(CUresult result) { return static_cast<cumempool_result>(result); }

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

}  // namespace

cumempool_result submit_digests(const Symbols& cu, CudaKernel& digest, std::uint64_t seed,
                                const cumempool_extent* extents, std::size_t count,
                                cumempool_digest* digests, CUstream stream) {
  CUfunction kernel = nullptr;
  if (count != 0 && !good_arguments(extents, count, digests)) return CUMEMPOOL_RESULT_INVALID_VALUE;
  if (!CudaKernel::supported(cu) || cu.cuPointerGetAttribute == nullptr) {
    return CUMEMPOOL_RESULT_NOT_SUPPORTED;
  }
  if (count == 0) return digest.load(cu, kernel);
  CUdeviceptr from = 0;
  CUdeviceptr to = 0;
  CUresult result = device_address(cu, extents, count * sizeof(*extents), from);
  if (result == CUDA_SUCCESS) result = device_address(cu, digests, count * sizeof(*digests), to);
  if (result != CUDA_SUCCESS) return result_of(result);

  if (const auto loaded = digest.load(cu, kernel)) return loaded;
  DigestKeys keys = digest_keys(seed);
  std::array<void*, 3> parameters{&from, &to, &keys};
  return result_of(cu.cuLaunchKernel(kernel, static_cast<unsigned int>(count), 1, 1, kDigestThreads,
                                     1, 1, 0, stream, parameters.data(), nullptr));
}

}  // namespace cumempool::driver
