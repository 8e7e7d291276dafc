// What a segment malloc through a slot costs beside the same driver calls made bare: reserve,
// create, map and set access, one size at a time, the two ways taking turns. Prints one JSON
// object.
//
//   malloc_path [DEVICE] [ROUNDS]
#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cumempool/cumempool.h"

extern "C" void* cumempool_malloc_0(ssize_t bytes, int device, void* stream);
extern "C" void cumempool_free_0(void* address, ssize_t bytes, int device, void* stream);

namespace {

using Clock = std::chrono::steady_clock;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "malloc_path: %s: %s\n", what, cumempool_last_error()->message);
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

double microseconds(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// The properties that the pool chose, so that both ways make the same memory.
CUmemAllocationProp properties_of(cumempool_allocator* allocator, int device) {
  cumempool_snapshot* snapshot = nullptr;
  require(cumempool_take_snapshot(allocator, 0, &snapshot) == CUMEMPOOL_OK, "snapshot");
  size_t count = 0;
  const cumempool_tag_stats* tags = cumempool_snapshot_tags(snapshot, &count);
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
  properties.requestedHandleTypes = static_cast<CUmemAllocationHandleType>(tags[0].handle_types);
  properties.allocFlags.gpuDirectRDMACapable = static_cast<unsigned char>(tags[0].rdma);
  cumempool_snapshot_destroy(snapshot);
  return properties;
}

struct Sample {
  double malloc_us;
  double free_us;
};

Sample bare(const Cuda& cuda, const CUmemAllocationProp& properties, size_t bytes) {
  CUdeviceptr address = 0;
  CUmemGenericAllocationHandle handle = 0;
  CUmemAccessDesc access{properties.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  Clock::time_point start = Clock::now();
  int result = cuda.reserve(&address, bytes, 0, 0, 0);
  result |= cuda.create(&handle, bytes, &properties, 0);
  result |= cuda.map(address, bytes, 0, handle, 0);
  result |= cuda.set_access(address, bytes, &access, 1);
  Sample sample{microseconds(start), 0};
  start = Clock::now();
  result |= cuda.unmap(address, bytes);
  result |= cuda.release(handle);
  result |= cuda.unreserve(address, bytes);
  sample.free_us = microseconds(start);
  require(result == 0, "a bare driver call failed");
  return sample;
}

Sample pooled(size_t bytes, int device) {
  Clock::time_point start = Clock::now();
  void* address = cumempool_malloc_0(static_cast<ssize_t>(bytes), device, nullptr);
  Sample sample{microseconds(start), 0};
  require(address != nullptr, "malloc through the slot failed");
  start = Clock::now();
  cumempool_free_0(address, static_cast<ssize_t>(bytes), device, nullptr);
  sample.free_us = microseconds(start);
  return sample;
}

void compare(const Cuda& cuda, cumempool_allocator* allocator, int device, int rounds, size_t bytes,
             bool last) {
  const CUmemAllocationProp properties = properties_of(allocator, device);
  std::vector<double> bare_malloc, bare_free, pool_malloc, pool_free;
  for (int round = -10; round < rounds; ++round) {
    const Sample ours = round % 2 == 0 ? pooled(bytes, device) : Sample{};
    const Sample theirs = bare(cuda, properties, bytes);
    const Sample mine = round % 2 == 0 ? ours : pooled(bytes, device);
    if (round < 0) continue;  // warm-up
    bare_malloc.push_back(theirs.malloc_us);
    bare_free.push_back(theirs.free_us);
    pool_malloc.push_back(mine.malloc_us);
    pool_free.push_back(mine.free_us);
  }
  std::printf(
      "  {\"bytes\": %zu, \"bare_malloc_us\": %.2f, \"pool_malloc_us\": %.2f, \"malloc_ratio\": "
      "%.3f, "
      "\"bare_free_us\": %.2f, \"pool_free_us\": %.2f}%s\n",
      bytes, median(bare_malloc), median(pool_malloc), median(pool_malloc) / median(bare_malloc),
      median(bare_free), median(pool_free), last ? "" : ",");
}

}  // namespace

int main(int argc, char** argv) {
  const int device = argc > 1 ? std::atoi(argv[1]) : 0;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 300;
  const cumempool_driver* driver = nullptr;
  require(cumempool_cuda_driver(&driver) == CUMEMPOOL_OK, "no CUDA driver");
  cumempool_allocator_options options{};
  options.size = sizeof options;
  cumempool_allocator* allocator = nullptr;
  require(cumempool_allocator_create(driver, &options, &allocator) == CUMEMPOOL_OK, "allocator");
  require(cumempool_declare_tag(allocator, "bench", CUMEMPOOL_ON_SLEEP_UNSET,
                                CUMEMPOOL_ON_WAKE_UNSET) == CUMEMPOOL_OK,
          "tag");
  uint32_t slot = 0;
  require(cumempool_bind_slot(allocator, "bench", &slot) == CUMEMPOOL_OK && slot == 0, "slot");
  // One allocation stays, so that the properties can be read.
  cumempool_address kept = 0;
  require(cumempool_malloc(allocator, "bench", device, 1, &kept) == CUMEMPOOL_OK, "malloc");

  const Cuda cuda;
  const std::vector<size_t> sizes = {size_t{2} << 20, size_t{20} << 20, size_t{512} << 20};
  std::printf("{\"benchmark\": \"malloc_path\", \"rounds\": %d, \"sizes\": [\n", rounds);
  for (const size_t bytes : sizes) {
    compare(cuda, allocator, device, rounds, bytes, bytes == sizes.back());
  }
  std::printf("]}\n");
  cumempool_free(kept);
  cumempool_unbind_slot(slot);
  cumempool_allocator_close(allocator, 0);
  cumempool_allocator_destroy(allocator);
  return 0;
}
