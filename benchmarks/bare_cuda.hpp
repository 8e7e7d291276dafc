// The driver calls of libcuda that the pool makes, to be made bare beside it on the same kind of
// memory.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>

#include "cumempool/cumempool.h"

namespace bench {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s: %s\n", what, cumempool_last_error()->message);
  std::exit(1);
}

struct Cuda {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  template <typename Function>
  Function* symbol(const char* name) const {
    auto* found = reinterpret_cast<Function*>(dlsym(library, name));
    require(found != nullptr, name);
    return found;
  }
  decltype(::cuMemAddressReserve)* reserve =
      symbol<decltype(::cuMemAddressReserve)>("cuMemAddressReserve");
  decltype(::cuMemCreate)* create = symbol<decltype(::cuMemCreate)>("cuMemCreate");
  decltype(::cuMemMap)* map = symbol<decltype(::cuMemMap)>("cuMemMap");
  decltype(::cuMemSetAccess)* set_access = symbol<decltype(::cuMemSetAccess)>("cuMemSetAccess");
  decltype(::cuMemUnmap)* unmap = symbol<decltype(::cuMemUnmap)>("cuMemUnmap");
  decltype(::cuMemRelease)* release = symbol<decltype(::cuMemRelease)>("cuMemRelease");
  decltype(::cuMemAddressFree)* unreserve =
      symbol<decltype(::cuMemAddressFree)>("cuMemAddressFree");
};

// A pool with one tag, "bench", bound to slot 0, and one small allocation that stays, so that the
// properties of its memory can be read.
class BenchPool {
 public:
  explicit BenchPool(int device) {
    const cumempool_driver* driver = nullptr;
    require(cumempool_cuda_driver(&driver) == CUMEMPOOL_OK, "no CUDA driver");
    cumempool_allocator_options options{};
    options.size = sizeof options;
    require(cumempool_allocator_create(driver, &options, &allocator_) == CUMEMPOOL_OK, "allocator");
    require(cumempool_declare_tag(allocator_, "bench", CUMEMPOOL_ON_SLEEP_UNSET,
                                  CUMEMPOOL_ON_WAKE_UNSET) == CUMEMPOOL_OK,
            "tag");
    require(cumempool_bind_slot(allocator_, "bench", &slot_) == CUMEMPOOL_OK && slot_ == 0, "slot");
    require(cumempool_malloc(allocator_, "bench", device, 1, &kept_) == CUMEMPOOL_OK, "malloc");
  }
  ~BenchPool() {
    cumempool_free(kept_);
    cumempool_unbind_slot(slot_);
    cumempool_allocator_close(allocator_, 0);
    cumempool_allocator_destroy(allocator_);
  }
  BenchPool(const BenchPool&) = delete;
  BenchPool& operator=(const BenchPool&) = delete;

  // What the pool chose on the device.
  CUmemAllocationProp properties(int device) const {
    cumempool_snapshot* snapshot = nullptr;
    require(cumempool_take_snapshot(allocator_, 0, &snapshot) == CUMEMPOOL_OK, "snapshot");
    size_t count = 0;
    const cumempool_tag_stats* tags = cumempool_snapshot_tags(snapshot, &count);
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = device;
    properties.requestedHandleTypes = static_cast<CUmemAllocationHandleType>(tags[0].handle_types);
    properties.allocFlags.gpuDirectRDMACapable = static_cast<unsigned char>(tags[0].rdma);
    cumempool_snapshot_destroy(snapshot);
    return properties;
  }

 private:
  cumempool_allocator* allocator_ = nullptr;
  uint32_t slot_ = 0;
  cumempool_address kept_ = 0;
};

}  // namespace bench
