// Address space and pages from the kernel, as backups want them.
#include "backup/host_pages.hpp"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>

#include "driver/error.hpp"

namespace cumempool::backup {
namespace {

Error no_pages(const char* what, std::size_t bytes, int number) {
  Error error(CUMEMPOOL_OUT_OF_HOST_MEMORY, std::string(what) + " " + format_bytes(bytes) +
                                                " of host memory failed: " + strerror(number));
  error.bytes = bytes;
  error.advice = "free host memory, or discard tags instead of backing them up";
  return error;
}

void* map_anonymous(void* address, std::size_t bytes, int protection, int flags) {
  return mmap(address, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

// By system call, since libnuma would be one more library to have. Where the kernel refuses, the
// memory comes from elsewhere and copies are slower; nothing else changes.
void prefer_node(std::byte* first, std::size_t bytes, int node) {
  constexpr int kPreferred = 1;  // MPOL_PREFERRED of <numaif.h>
  std::array<unsigned long, 16> mask{};
  constexpr std::size_t kBits = 8 * sizeof(unsigned long);
  const auto number = static_cast<std::size_t>(node);
  if (number >= mask.size() * kBits) return;
  mask[number / kBits] |= 1UL << (number % kBits);
  syscall(SYS_mbind, first, bytes, kPreferred, mask.data(), mask.size() * kBits, 0U);
}

}  // namespace

std::byte* reserve_pages(std::size_t wanted, std::size_t least, std::size_t& got) {
  for (std::size_t bytes = wanted;; bytes = std::max(bytes / 2, least)) {
    // One huge page more, to begin at the border of one.
    void* mapped = map_anonymous(nullptr, bytes + kHugePage, PROT_NONE, MAP_NORESERVE);
    if (mapped == MAP_FAILED) {
      if (bytes <= least) throw no_pages("reserving the addresses of", bytes, errno);
      continue;
    }
    auto* first = static_cast<std::byte*>(mapped);
    const std::size_t before = -reinterpret_cast<std::uintptr_t>(first) % kHugePage;
    if (before != 0) munmap(first, before);
    if (before != kHugePage) munmap(first + before + bytes, kHugePage - before);
    got = bytes;
    return first + before;
  }
}

void unreserve_pages(std::byte* first, std::size_t bytes) noexcept { munmap(first, bytes); }

void commit_pages(std::byte* first, std::size_t bytes, int numa_node) {
  if (map_anonymous(first, bytes, PROT_READ | PROT_WRITE, MAP_FIXED) == MAP_FAILED) {
    throw no_pages("mapping", bytes, errno);
  }
  // Huge pages make pinning several times faster; where they are off this changes nothing.
  madvise(first, bytes, MADV_HUGEPAGE);
  // A forked child must neither copy these pages nor have the parent's moved under a registration.
  madvise(first, bytes, MADV_DONTFORK);
  if (numa_node >= 0) prefer_node(first, bytes, numa_node);
}

void decommit_pages(std::byte* first, std::size_t bytes) noexcept {
  map_anonymous(first, bytes, PROT_NONE, MAP_FIXED | MAP_NORESERVE);
}

}  // namespace cumempool::backup
