// Address space and pages from the kernel, as backups want them: huge pages, near to a device, and
// not inherited by children.
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

// Reserves up to `wanted` bytes of addresses, whole huge pages, that nothing can be written to yet;
// as much as the limits of the process allow, at least `least`. Throws Error
// (CUMEMPOOL_OUT_OF_HOST_MEMORY).
std::byte* reserve_pages(std::size_t wanted, std::size_t least, std::size_t& got);
void unreserve_pages(std::byte* first, std::size_t bytes) noexcept;

// Makes reserved addresses usable; `numa_node` -1 = wherever there is room. Nothing is touched.
// Throws Error (CUMEMPOOL_OUT_OF_HOST_MEMORY).
void commit_pages(std::byte* first, std::size_t bytes, int numa_node);
// Gives the pages back; the addresses stay reserved.
void decommit_pages(std::byte* first, std::size_t bytes) noexcept;

// A range of host memory.
struct HostSpan {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
};

// Has several threads fault memory in, in order, ahead of the thread that pins it: the kernel
// clears pages at a fraction of the link's rate with one thread, and at nearly it with twelve. The
// threads make no driver call and hold no lock while they touch.
class FirstTouch {
 public:
  // Starts on `ranges`, first to last, with up to `threads` threads. Where the system grants none,
  // wait() does the work itself. No range is begun once `room` has said that there is none: others
  // take memory meanwhile. It is asked in any thread, by one at a time, and throws nothing.
  FirstTouch(std::vector<HostSpan> ranges, unsigned threads, std::function<bool()> room = {});
  // Stops the threads before their next range and joins them.
  ~FirstTouch();
  FirstTouch(const FirstTouch&) = delete;
  FirstTouch& operator=(const FirstTouch&) = delete;

  // Returns when range `index` has been touched: true; or false where there was no room for it.
  bool wait(std::size_t index);

  // As many threads as pay, beside the one that pins: three quarters of the processors, at most 16.
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
  std::mutex room_mutex_;      // one thread asks
  std::vector<std::thread> threads_;
};

}  // namespace cumempool::backup
