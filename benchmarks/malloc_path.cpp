// What a segment malloc through a slot costs beside the same driver calls made bare: reserve,
// create, map and set access, one size at a time, the two ways taking turns. Prints one JSON
// object.
//
//   malloc_path [DEVICE] [ROUNDS]
#include <algorithm>
#include <vector>

#include "bare_cuda.hpp"

extern "C" void* cumempool_malloc_0(ssize_t bytes, int device, void* stream);
extern "C" void cumempool_free_0(void* address, ssize_t bytes, int device, void* stream);

namespace {

using bench::Clock;
using bench::require;

double microseconds(Clock::time_point start) { return bench::seconds_since(start) * 1e6; }

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct Sample {
  double malloc_us;
  double free_us;
};

Sample bare(const bench::Cuda& cuda, const CUmemAllocationProp& properties, size_t bytes) {
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

void compare(const bench::Cuda& cuda, const CUmemAllocationProp& properties, int device, int rounds,
             size_t bytes, bool last) {
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
  const bench::BenchPool pool(device);
  const CUmemAllocationProp properties = pool.properties(device);
  const bench::Cuda cuda;
  const std::vector<size_t> sizes = {size_t{2} << 20, size_t{20} << 20, size_t{512} << 20};
  std::printf("{\"benchmark\": \"malloc_path\", \"rounds\": %d, \"sizes\": [\n", rounds);
  for (const size_t bytes : sizes) {
    compare(cuda, properties, device, rounds, bytes, bytes == sizes.back());
  }
  std::printf("]}\n");
  return 0;
}
