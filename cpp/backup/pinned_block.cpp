// One registered range of host memory and the intervals of it that are free.
#include "backup/pinned_block.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <string>

namespace cumempool::backup {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Fresh pages; from one huge page on they start at a border of huge pages, without which the kernel
// would give small ones at both ends.
void* map_aligned(std::size_t bytes) {
  const std::size_t slack = bytes >= kHugePage ? kHugePage : 0;
  void* mapped =
      mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED || slack == 0) return mapped;
  auto* first = static_cast<std::byte*>(mapped);
  const std::size_t before = -reinterpret_cast<std::uintptr_t>(first) % kHugePage;
  if (before != 0) munmap(first, before);
  if (before != slack) munmap(first + before + bytes, slack - before);
  return first + before;
}

std::byte* map_pages(std::size_t bytes) {
  void* pages = map_aligned(bytes);
  if (pages == MAP_FAILED) {
    Error error(CUMEMPOOL_OUT_OF_HOST_MEMORY,
                "mmap of " + format_bytes(bytes) + " of host memory failed: " + strerror(errno));
    error.bytes = bytes;
    error.advice = "free host memory, or discard tags instead of backing them up";
    throw error;
  }
  // Huge pages make pinning several times faster; where they are off this changes nothing.
  madvise(pages, bytes, MADV_HUGEPAGE);
  // A forked child must neither copy these pages nor have the parent's moved under a registration.
  madvise(pages, bytes, MADV_DONTFORK);
  return static_cast<std::byte*>(pages);
}

}  // namespace

PinnedBlock::PinnedBlock(driver::Driver driver, std::size_t bytes)
    : driver_(driver), data_(map_pages(bytes)), bytes_(bytes), free_bytes_(bytes) {
  free_.emplace(0, bytes_);
}

void PinnedBlock::pin(int device) {
  try {
    driver_.host_register(device, data_, bytes_);
  } catch (Error& error) {
    error.status = CUMEMPOOL_OUT_OF_HOST_MEMORY;
    error.problem = "host memory for a backup could not be pinned";
    error.advice = "free host memory, or raise the limit on locked memory (ulimit -l)";
    throw;
  }
  registered_ = true;
}

PinnedBlock::~PinnedBlock() {
  if (!registered_) munmap(data_, bytes_);
}

cumempool_result PinnedBlock::unregister(int device) noexcept {
  if (!registered_) return CUMEMPOOL_RESULT_SUCCESS;
  const auto& table = driver_.table();
  const cumempool_result result = table.host_unregister(table.self, device, data_);
  if (result == CUMEMPOOL_RESULT_SUCCESS) registered_ = false;
  return result;
}

std::size_t PinnedBlock::take(std::size_t bytes, std::size_t& offset) {
  const auto first = free_.begin();
  if (first == free_.end()) return 0;
  const auto [start, room] = *first;
  const std::size_t taken = std::min(bytes, room);
  if (taken < room) free_.emplace(start + taken, room - taken);
  free_.erase(first);
  free_bytes_ -= taken;
  offset = start;
  return taken;
}

void PinnedBlock::give_back(std::size_t offset, std::size_t bytes) {
  free_bytes_ += bytes;
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + bytes == next->first) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      previous->second += bytes;
      return;
    }
  }
  free_.emplace(offset, bytes);
}

}  // namespace cumempool::backup
