// Bounce buffers: pinned buffers for copies between device memory and storage that no copy engine
// reaches. Threads write out, or read ahead, one buffer while the device fills or drains others.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "backup/copy_queue.hpp"
#include "driver/driver.hpp"

namespace cumempool::backup {

// Reads or writes the bytes of one buffer, in one of the threads. Throws Error; makes no driver
// call. It may use the buffer past `bytes`, up to kBufferBytes.
using BufferWork = std::function<void(std::byte* data, std::size_t bytes)>;

// Not thread-safe, but for bytes(); calls run inside a ContextScope of the queue's device. The
// buffers and threads are made at first use and stay until release() or destruction. The class
// waits for its own events, so others may drain the queue at any time.
class BounceBuffers {
 public:
  // Bytes of a buffer: a multiple of kSliceBytes, aligned for direct I/O.
  static constexpr std::size_t kBufferBytes = std::size_t{8} << 20;

  // More buffers than threads: a disk answers out of order, and early data waits in its buffer for
  // its turn in the queue.
  static constexpr std::size_t kBuffers = 16;
  static constexpr std::size_t kAllBytes = kBuffers * kBufferBytes;

  // Enough for 8 threads to keep a disk busy while the others check data. Threads wait more than
  // they compute, so the number of cores does not matter.
  static constexpr unsigned kThreads = 12;

  // With 0 `threads`, or if none can be started, the calling thread does the work itself.
  BounceBuffers(driver::Driver driver, CopyQueue& queue, unsigned threads = kThreads);
  // Call finish() first: no copy may be under way.
  ~BounceBuffers();
  BounceBuffers(const BounceBuffers&) = delete;
  BounceBuffers& operator=(const BounceBuffers&) = delete;

  // Starts to copy at most kBufferBytes of device memory into a buffer, then calls `sink` with it.
  // Waits if all buffers are busy. Throws Error, of this call or of an earlier sink. After out(),
  // in() or finish() has thrown, call abandon().
  void out(cumempool_address source, std::size_t bytes, BufferWork sink);

  // Calls `source` to fill a buffer with at most kBufferBytes, then copies it to the device, in the
  // order of the calls. Returns before that. Throws Error as out() does.
  void in(cumempool_address destination, std::size_t bytes, BufferWork source);

  // Calls `call` once the copies of all in() calls so far are in the queue: now if they are, else
  // inside a later in(), out() or finish(), which passes its exceptions on.
  void when_queued(std::function<void()> call);

  // Annotates the Errors of the sinks and sources of later out() and in() calls.
  using Annotate = std::function<void(Error&)>;
  void about(Annotate annotate) { annotate_ = std::move(annotate); }

  // Returns when the copies of all in() calls so far are in the queue, and the sinks of all out()
  // calls so far have returned. Throws the first Error of a sink or source. A change between out()
  // and in() finishes first.
  void finish();

  // Waits for everything under way, the whole queue included, and forgets it and its errors. After
  // a failure, call it before either side of a copy goes. Throws Error if the wait for the device
  // fails; then no thread is working, and the call may be repeated.
  void abandon();

  // Gives back buffers and threads; call finish() or abandon() first, and hold a ContextScope.
  // Returns the bytes unpinned; 0 if the driver refuses, and the call may be repeated.
  std::uint64_t release() noexcept;

  // Pinned bytes held. Any thread may call this.
  std::uint64_t bytes() const noexcept { return bytes_; }

 private:
  class Buffers;

  // Work on one buffer for a thread. Behind a copy it waits in copies_; if it has no work, the
  // buffer is free after the copy.
  struct Job {
    std::size_t buffer = 0;
    std::size_t bytes = 0;
    BufferWork work;
    Annotate annotate;
    bool fills = false;  // the buffer; else empties it
  };
  // A buffer that a source is filling, and the destination of its contents.
  struct Incoming {
    std::size_t buffer = 0;
    cumempool_address destination = 0;
    std::size_t bytes = 0;
    std::vector<std::function<void()>> queued;
  };

  // In the calling thread.
  void refuse_after_failure();
  void begin(bool inwards);
  void start();
  void free_all();
  std::size_t take_buffer();
  bool head_filled();
  void settle_done_copies();
  void settle_oldest_copy();
  void enqueue_filled();
  void enqueue_head();
  void give(Job job);
  template <typename Condition>
  void wait_for_threads(const Condition& reached);
  void throw_failure() const;
  void stop_threads() noexcept;

  // In any thread, with the lock, which is released while the job runs.
  static void run_annotated(const Job& job, std::byte* data);
  void run_next_job(std::unique_lock<std::mutex>& lock);
  void work();

  driver::Driver driver_;
  CopyQueue& queue_;
  const unsigned thread_count_;
  Annotate annotate_;
  std::atomic<std::uint64_t> bytes_{0};

  std::unique_ptr<Buffers> buffers_;
  std::vector<std::thread> threads_;
  bool inwards_ = false;           // copies go to the device
  bool failed_ = false;            // until abandon()
  std::deque<Job> copies_;         // in the queue, oldest first
  std::deque<Incoming> incoming_;  // not in the queue yet, oldest first

  std::mutex mutex_;  // guards everything below
  std::condition_variable job_given_;
  std::condition_variable job_done_;
  std::deque<Job> jobs_;
  std::size_t running_ = 0;
  std::vector<std::size_t> free_;  // has capacity for all buffers
  std::vector<bool> filled_;
  std::exception_ptr failure_;  // the first one; later jobs are skipped
  bool stopping_ = false;
};

}  // namespace cumempool::backup
