// Address space and pages for backups.
#include "backup/host_pages.hpp"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <utility>

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

// Uses the system call, since libnuma would be one more dependency. If the kernel refuses, the
// memory comes from another node and copies are slower; nothing else changes.
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
    // One more huge page, so that the range can begin at a huge page.
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
  // Huge pages make pinning several times faster. If they are off, this has no effect.
  madvise(first, bytes, MADV_HUGEPAGE);
  // A forked child must neither copy these pages nor have the parent's moved under a registration.
  madvise(first, bytes, MADV_DONTFORK);
  if (numa_node >= 0) prefer_node(first, bytes, numa_node);
}

void decommit_pages(std::byte* first, std::size_t bytes) noexcept {
  map_anonymous(first, bytes, PROT_NONE, MAP_FIXED | MAP_NORESERVE);
}

namespace {

// Writes a byte per page. MADV_POPULATE_WRITE would hold the lock of the address space, and so stop
// all threads that map or pin memory. If memory is missing, the thread that pins it fails.
void touch(const HostSpan& range) {
  static const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (std::size_t at = 0; at < range.bytes; at += page) {
    *const_cast<volatile std::byte*>(range.data + at) = std::byte{0};
  }
}

}  // namespace

FirstTouch::FirstTouch(std::vector<HostSpan> ranges, unsigned threads, std::function<bool()> room)
    : ranges_(std::move(ranges)), room_(std::move(room)), touched_(ranges_.size()) {
  const std::size_t count = std::min<std::size_t>(threads, ranges_.size());
  threads_.reserve(count);
  try {
    while (threads_.size() < count) threads_.emplace_back([this] { work(); });
  } catch (const std::exception&) {
    // The system starts no more threads. The existing ones do the work, or wait() does.
  }
}

FirstTouch::~FirstTouch() {
  stop_ = true;
  for (std::thread& thread : threads_) thread.join();
}

void FirstTouch::work() noexcept {
  while (!stop_ && touch_next()) {
  }
}

bool FirstTouch::has_room() noexcept {
  if (!room_) return true;
  const std::lock_guard lock(room_mutex_);
  return room_();
}

bool FirstTouch::touch_next() noexcept {
  const std::size_t index = next_++;
  if (index >= ranges_.size()) return false;
  if (!has_room()) {
    {
      const std::lock_guard lock(mutex_);
      full_ = true;
    }
    stop_ = true;
    done_.notify_all();
    return false;
  }
  touch(ranges_[index]);
  {
    const std::lock_guard lock(mutex_);
    touched_[index] = true;
  }
  done_.notify_all();
  return true;
}

bool FirstTouch::wait(std::size_t index) {
  if (threads_.empty()) {
    while (next_ <= index && touch_next()) {
    }
  }
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] { return touched_[index] || full_; });
  return touched_[index];
}

unsigned FirstTouch::default_threads() noexcept {
  return std::clamp(std::thread::hardware_concurrency() * 3 / 4, 1U, 16U);
}

}  // namespace cumempool::backup
