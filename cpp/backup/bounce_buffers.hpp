// Copies between device memory and storages that no copy engine reaches, through pinned buffers:
// threads write out, or read ahead, one buffer while the device fills or drains others.
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

// Work on the bytes of one buffer, in one of the threads; throws Error. Makes no driver call.
// May use the buffer's bytes past `bytes`, up to kBufferBytes.
using BufferWork = std::function<void(std::byte* data, std::size_t bytes)>;

// One thread at a time calls it, inside a ContextScope of the queue's device. The buffers and
// threads are made at first use and stay until release() or destruction. It waits for events of
// its own: others may drain the queue at any time.
class BounceBuffers {
 public:
  // Bytes of a buffer; a multiple of kSliceBytes, aligned for direct I/O.
  static constexpr std::size_t kBufferBytes = std::size_t{8} << 20;

  // More buffers than there are threads: a disk answers out of order, and what came early waits
  // with its buffer for its turn in the queue.
  static constexpr std::size_t kBuffers = 16;
  static constexpr std::size_t kAllBytes = kBuffers * kBufferBytes;

  // Enough for 8 to wait for a disk, which is then busy, while others check what came. They wait
  // more than they compute, so that the number of cores does not matter.
  static constexpr unsigned kThreads = 12;

  // `threads` 0: the calling thread does the work itself, as where no thread can be started.
  BounceBuffers(driver::Driver driver, CopyQueue& queue, unsigned threads = kThreads);
  // finish() first: copies may not be under way.
  ~BounceBuffers();
  BounceBuffers(const BounceBuffers&) = delete;
  BounceBuffers& operator=(const BounceBuffers&) = delete;

  // Starts a copy of device memory of at most kBufferBytes into a buffer, which `sink` is then
  // called with. Waits where all buffers are busy. Throws Error: of this call, or of the sink
  // of an earlier one. Whatever out(), in() or finish() throws, abandon() comes next.
  void out(cumempool_address source, std::size_t bytes, BufferWork sink);

  // Has `source` fill a buffer with at most kBufferBytes, and then copies it to the device, in
  // the order of the calls. Returns before that; throws Error as out() does.
  void in(cumempool_address destination, std::size_t bytes, BufferWork source);

  // Has `call` called once the copies of all in() calls so far are in the queue: at once where
  // they are, else inside a later call of in(), out() or finish(), which throws what it throws.
  void when_queued(std::function<void()> call);

  // Has an Error of sinks and sources of later out() and in() calls say what they are about.
  using Annotate = std::function<void(Error&)>;
  void about(Annotate annotate) { annotate_ = std::move(annotate); }

  // Returns when the copies of all in() calls so far are in the queue, and the sinks of all
  // out() calls so far have returned. Throws the first Error of a sink or source. An out()
  // after in(), or the other way round, finishes first.
  void finish();

  // Waits for everything under way, the whole queue included, and forgets it, errors too. After
  // a failure, before either side of a copy may go. Throws Error where the device cannot be
  // waited for; no thread works then, and it may be called again.
  void abandon();

  // Gives the buffers and threads back; finish() or abandon() first. Inside a ContextScope.
  // Returns the bytes unpinned; 0 where the driver would not unpin them, which may be tried
  // again.
  std::uint64_t release() noexcept;

  // Pinned bytes held. Any thread may ask.
  std::uint64_t bytes() const noexcept { return bytes_; }

 private:
  class Buffers;

  // Work for a thread on one buffer. Behind a copy out it waits in the queue; without work its
  // buffer is free then.
  struct Job {
    std::size_t buffer = 0;
    std::size_t bytes = 0;
    BufferWork work;
    Annotate annotate;
    bool fills = false;  // else it empties the buffer
  };
  // A buffer that is being filled, and where its contents go.
  struct Incoming {
    std::size_t buffer = 0;
    cumempool_address destination = 0;
    std::size_t bytes = 0;
    std::vector<std::function<void()>> queued;
  };

  // The calling thread.
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

  // Any thread, with the lock, which is given up while the job runs.
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
  bool inwards_ = false;           // to the device
  bool failed_ = false;            // until abandon()
  std::deque<Job> copies_;         // in the queue, oldest first
  std::deque<Incoming> incoming_;  // not in the queue yet, in the order of the calls

  std::mutex mutex_;  // guards everything below
  std::condition_variable job_given_;
  std::condition_variable job_done_;
  std::deque<Job> jobs_;
  std::size_t running_ = 0;
  std::vector<std::size_t> free_;  // has room for all buffers
  std::vector<bool> filled_;
  std::exception_ptr failure_;  // the first one; jobs are skipped from then on
  bool stopping_ = false;
};

}  // namespace cumempool::backup
