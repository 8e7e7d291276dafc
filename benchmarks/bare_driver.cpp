// Gives device memory back and takes it again with bare driver calls: what a discard and the wake
// after it cost without a pool. Allocations keep their address ranges and are of the pool's kind.
//
//   bare_driver COUNTxBYTES[,COUNTxBYTES...] [DEVICE]
//
// Starts with nothing mapped. Each line of its input, "discard" (unmap and release, allocation by
// allocation) or "remap" (create, map, set access), is answered with one line of JSON.
#include <cinttypes>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "bare_cuda.hpp"

namespace {

using bench::require;

std::vector<size_t> parse_sizes(const char* text) {
  std::vector<size_t> sizes;
  while (*text != '\0') {
    unsigned long long count = 0, bytes = 0;
    int read = 0;
    require(std::sscanf(text, "%llux%llu%n", &count, &bytes, &read) == 2, "COUNTxBYTES expected");
    sizes.insert(sizes.end(), count, bytes);
    text += read;
    if (*text == ',') ++text;
  }
  return sizes;
}

class BareMemory {
 public:
  BareMemory(const std::vector<size_t>& sizes, const CUmemAllocationProp& properties)
      : properties_(properties), access_{properties.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE} {
    for (const size_t bytes : sizes) {
      Part part{0, bytes, 0};
      require(cuda_.reserve(&part.address, bytes, 0, 0, 0) == CUDA_SUCCESS, "reserve");
      parts_.push_back(part);
    }
  }
  ~BareMemory() {
    if (mapped_) discard();
    for (const Part& part : parts_) cuda_.unreserve(part.address, part.bytes);
  }
  BareMemory(const BareMemory&) = delete;
  BareMemory& operator=(const BareMemory&) = delete;

  double discard() {
    require(mapped_, "nothing is mapped");
    int result = 0;
    const auto start = bench::Clock::now();
    for (const Part& part : parts_) {
      result |= cuda_.unmap(part.address, part.bytes);
      result |= cuda_.release(part.handle);
    }
    const double seconds = bench::seconds_since(start);
    require(result == 0, "unmap or release failed");
    mapped_ = false;
    return seconds;
  }

  double remap() {
    require(!mapped_, "it is mapped already");
    int result = 0;
    const auto start = bench::Clock::now();
    for (Part& part : parts_) {
      result |= cuda_.create(&part.handle, part.bytes, &properties_, 0);
      result |= cuda_.map(part.address, part.bytes, 0, part.handle, 0);
      result |= cuda_.set_access(part.address, part.bytes, &access_, 1);
    }
    const double seconds = bench::seconds_since(start);
    require(result == 0, "create, map or set access failed");
    mapped_ = true;
    return seconds;
  }

 private:
  struct Part {
    CUdeviceptr address;
    size_t bytes;
    CUmemGenericAllocationHandle handle;
  };
  const bench::Cuda cuda_;
  const CUmemAllocationProp properties_;
  const CUmemAccessDesc access_;
  std::vector<Part> parts_;
  bool mapped_ = false;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: bare_driver COUNTxBYTES[,COUNTxBYTES...] [DEVICE]\n");
    return 2;
  }
  const int device = argc > 2 ? std::atoi(argv[2]) : 0;
  const bench::BenchPool pool(device);
  BareMemory memory(parse_sizes(argv[1]), pool.properties(device));
  std::string command;
  while (std::getline(std::cin, command)) {
    require(command == "discard" || command == "remap", "a command is discard or remap");
    const double seconds = command == "discard" ? memory.discard() : memory.remap();
    std::printf("{\"seconds\": %.9f}\n", seconds);
    std::fflush(stdout);
  }
  return 0;
}
