// Has several threads fault memory in, in order, ahead of the thread that pins it: the kernel
// clears pages at a fraction of the link's rate with one thread, and at nearly it with twelve.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace cumempool::backup {

struct PageRange {
  std::byte* data;
  std::size_t bytes;
};

// The threads make no driver call and hold no lock while they touch.
class FirstTouch {
 public:
  // Starts on `ranges`, first to last, with up to `threads` threads. Where the system grants none,
  // wait() does the work itself. No range is begun once `room` has said that there is none: others
  // take memory meanwhile. It is asked in any thread, by one at a time, and throws nothing.
  FirstTouch(std::vector<PageRange> ranges, unsigned threads, std::function<bool()> room = {});
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

  const std::vector<PageRange> ranges_;
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
