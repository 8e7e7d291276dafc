// Address space and pages for backups: huge pages, near a device, and not inherited by children.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace cumempool::backup {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Reserves up to `wanted` bytes of inaccessible addresses in whole huge pages: as much as the
// limits of the process allow, and at least `least`. Throws Error (CUMEMPOOL_OUT_OF_HOST_MEMORY).
std::byte* reserve_pages(std::size_t wanted, std::size_t least, std::size_t& got);
void unreserve_pages(std::byte* first, std::size_t bytes) noexcept;

// Makes reserved addresses usable, without touching them. A `numa_node` of -1 is any node. Throws
// Error (CUMEMPOOL_OUT_OF_HOST_MEMORY).
void commit_pages(std::byte* first, std::size_t bytes, int numa_node);
// Gives the pages back; the addresses stay reserved.
void decommit_pages(std::byte* first, std::size_t bytes) noexcept;

// A range of host memory.
struct HostSpan {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
};

// Faults memory in with several threads, in order, ahead of the thread that pins it: the kernel
// clears pages at a fraction of the link's rate with one thread, and at nearly the full rate with
// twelve. The threads make no driver call and hold no lock while they touch pages.
class FirstTouch {
 public:
  // Starts on `ranges`, first to last, with up to `threads` threads. If the system grants none,
  // wait() does the work itself. Begins no range after `room` has returned false, since others take
  // memory meanwhile. `room` is called in any thread, by one at a time, and must not throw.
  FirstTouch(std::vector<HostSpan> ranges, unsigned threads, std::function<bool()> room = {});
  // Stops the threads before their next range and joins them.
  ~FirstTouch();
  FirstTouch(const FirstTouch&) = delete;
  FirstTouch& operator=(const FirstTouch&) = delete;

  // Waits until range `index` has been touched; false if there was no room for it.
  bool wait(std::size_t index);

  // As many threads as are worth it beside the one that pins: three quarters of the processors, at
  // most 16.
  static unsigned default_threads() noexcept;

 private:
  void work() noexcept;
  bool touch_next() noexcept;
  bool has_room() noexcept;

  const std::vector<HostSpan> ranges_;
  const std::function<bool()> room_;
  std::atomic<std::size_t> next_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable done_;
  std::vector<bool> touched_;  // guarded by mutex_
  bool full_ = false;          // guarded by mutex_
  std::mutex room_mutex_;      // one thread at a time calls room_
  std::vector<std::thread> threads_;
};

}  // namespace cumempool::backup
