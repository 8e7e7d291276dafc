// One registered range of host memory and the intervals of it that are free.
#include "backup/pinned_block.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <string>

namespace cumempool::backup {
namespace {

std::byte* map_pages(std::size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
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

PinnedBlock::PinnedBlock(driver::Driver driver, int device, std::size_t bytes, std::uint64_t order)
    : driver_(driver), bytes_(bytes), order_(order), free_bytes_(bytes) {
  data_ = map_pages(bytes);
  try {
    driver_.host_register(device, data_, bytes_);
  } catch (Error& error) {
    munmap(data_, bytes_);
    error.status = CUMEMPOOL_OUT_OF_HOST_MEMORY;
    error.problem = "host memory for a backup could not be pinned";
    error.advice = "free host memory, or raise the limit on locked memory (ulimit -l)";
    throw;
  }
  registered_ = true;
  free_.emplace(0, bytes_);
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
