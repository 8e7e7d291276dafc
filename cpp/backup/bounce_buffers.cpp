// Copies through pinned buffers. Only the calling thread calls the driver; it passes buffers
// between the queue and the threads. Only the threads touch bytes.
#include "backup/bounce_buffers.hpp"

#include <exception>
#include <new>
#include <utility>

#include "backup/host_limits.hpp"
#include "backup/host_pages.hpp"

namespace cumempool::backup {
namespace {

// Makes an Error of the exception of a sink or source; call it inside a catch block.
Error failure_of(const std::exception& caught) {
  if (dynamic_cast<const std::bad_alloc*>(&caught) != nullptr) {
    Error error(CUMEMPOOL_OUT_OF_HOST_MEMORY, "no host memory is left for the copy of a backup");
    error.advice = "free host memory, or discard tags instead of backing them up";
    return error;
  }
  return {CUMEMPOOL_INTERNAL, std::string("the copy of a backup failed: ") + caught.what()};
}

}  // namespace

// ---- buffers ------------------------------------------------------------------------------------

// Host memory in one registration, with an event per buffer. If the driver cannot pin memory,
// copies wait for the device; the rest is the same.
class BounceBuffers::Buffers {
 public:
  Buffers(driver::Driver driver, int device) : Buffers(driver, device, nullptr) {
    commit_pages(data_, kAllBytes, driver_.device_attribute(device, CUMEMPOOL_ATTRIBUTE_HOST_NUMA));
    while (events_.size() < kBuffers) events_.push_back(driver_.event_create(device_));
    try {
      registered_ = driver_.pin(device_, data_, kAllBytes);
    } catch (Error& error) {
      error.status = CUMEMPOOL_OUT_OF_HOST_MEMORY;
      error.problem = "host memory for bounce buffers could not be pinned";
      error.advice = "free host memory, or raise the limit on locked memory (ulimit -l)";
      throw;
    }
  }

  // If the driver refuses to unregister the memory, it stays mapped: the driver may still write to
  // it.
  ~Buffers() {
    const auto& table = driver_.table();
    const bool unregistered = unregister();
    for (const cumempool_event event : events_) table.event_destroy(table.self, device_, event);
    if (unregistered) unreserve_pages(data_, reserved_);
  }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  // Waits for copies that use the buffers; false if the driver refuses.
  bool unregister() noexcept {
    const auto& table = driver_.table();
    if (registered_ &&
        table.host_unregister(table.self, device_, data_) == CUMEMPOOL_RESULT_SUCCESS) {
      registered_ = false;
    }
    return !registered_;
  }

  std::byte* data(std::size_t buffer) const noexcept { return data_ + buffer * kBufferBytes; }
  cumempool_event event(std::size_t buffer) const noexcept { return events_[buffer]; }

 private:
  // Once this constructor is done, the destructor undoes the rest of the other one.
  Buffers(driver::Driver driver, int device, std::nullptr_t)
      : driver_(driver), device_(device), data_(reserve_pages(kAllBytes, kAllBytes, reserved_)) {
    events_.reserve(kBuffers);
  }

  driver::Driver driver_;
  int device_;
  std::size_t reserved_ = 0;
  std::byte* data_;
  std::vector<cumempool_event> events_;
  bool registered_ = false;
};

// ---- calls --------------------------------------------------------------------------------------

BounceBuffers::BounceBuffers(driver::Driver driver, CopyQueue& queue, unsigned threads)
    : driver_(driver), queue_(queue), thread_count_(threads) {}

BounceBuffers::~BounceBuffers() { stop_threads(); }

void BounceBuffers::out(cumempool_address source, std::size_t bytes, BufferWork sink) {
  begin(false);
  failed_ = true;
  const std::size_t buffer = take_buffer();
  queue_.to_host(buffers_->data(buffer), source, bytes);
  queue_.record(buffers_->event(buffer));
  copies_.push_back({buffer, bytes, std::move(sink), annotate_, false});
  failed_ = false;
}

void BounceBuffers::in(cumempool_address destination, std::size_t bytes, BufferWork source) {
  begin(true);
  failed_ = true;
  const std::size_t buffer = take_buffer();
  incoming_.push_back({buffer, destination, bytes, {}});
  give({buffer, bytes, std::move(source), annotate_, true});
  failed_ = false;
}

void BounceBuffers::when_queued(std::function<void()> call) {
  refuse_after_failure();
  if (incoming_.empty()) {
    call();
    return;
  }
  incoming_.back().queued.push_back(std::move(call));
}

void BounceBuffers::finish() {
  refuse_after_failure();
  if (buffers_ == nullptr) return;
  failed_ = true;
  while (!incoming_.empty()) {
    wait_for_threads([this] { return head_filled(); });
    enqueue_filled();
  }
  while (!inwards_ && !copies_.empty()) settle_oldest_copy();
  wait_for_threads([this] { return jobs_.empty() && running_ == 0; });
  failed_ = false;
}

void BounceBuffers::abandon() {
  failed_ = true;
  std::deque<Job> dropped;  // destroyed outside the lock, since its captures may do anything
  {
    std::unique_lock lock(mutex_);
    jobs_.swap(dropped);
    job_done_.wait(lock, [this] { return running_ == 0; });
  }
  dropped.clear();
  if (buffers_ != nullptr) queue_.drain();
  copies_.clear();
  incoming_.clear();
  const std::lock_guard lock(mutex_);
  failure_ = nullptr;
  if (buffers_ != nullptr) free_all();
  failed_ = false;
}

std::uint64_t BounceBuffers::release() noexcept {
  stop_threads();
  if (buffers_ == nullptr || !buffers_->unregister()) return 0;
  copies_.clear();
  buffers_.reset();
  return bytes_.exchange(0);
}

// ---- the calling thread -------------------------------------------------------------------------

void BounceBuffers::refuse_after_failure() {
  if (!failed_) return;
  const std::lock_guard lock(mutex_);
  throw_failure();
  throw Error(CUMEMPOOL_INTERNAL, "abandon() was not called after a failed copy");
}

void BounceBuffers::begin(bool inwards) {
  refuse_after_failure();
  if (inwards != inwards_) finish();
  inwards_ = inwards;
  start();
}

void BounceBuffers::start() {
  if (buffers_ == nullptr) {
    filled_.resize(kBuffers);
    free_.reserve(kBuffers);
    const HostRoom room = host_room();
    if (kAllBytes > room.for_backups()) throw room.refusal(kAllBytes);
    buffers_ = std::make_unique<Buffers>(driver_, queue_.device());
    bytes_ = kAllBytes;
    free_all();
  }
  if (!threads_.empty()) return;
  threads_.reserve(thread_count_);
  try {
    while (threads_.size() < thread_count_) threads_.emplace_back([this] { work(); });
  } catch (const std::exception&) {
    // The system starts no more threads. The existing ones do the work, or wait_for_threads() does.
  }
}

void BounceBuffers::free_all() {
  free_.clear();
  for (std::size_t buffer = 0; buffer < kBuffers; ++buffer) free_.push_back(buffer);
}

// Returns a free buffer. Until there is one, passes full buffers from the device to the threads and
// from the threads to the device.
std::size_t BounceBuffers::take_buffer() {
  while (true) {
    settle_done_copies();
    enqueue_filled();
    {
      const std::lock_guard lock(mutex_);
      throw_failure();
      if (!free_.empty()) {
        const std::size_t buffer = free_.back();
        free_.pop_back();
        filled_[buffer] = false;
        return buffer;
      }
    }
    if (!copies_.empty()) {
      settle_oldest_copy();
    } else {
      wait_for_threads([this] { return !free_.empty() || head_filled(); });
    }
  }
}

// Needs the lock.
bool BounceBuffers::head_filled() {
  return !incoming_.empty() && filled_[incoming_.front().buffer];
}

void BounceBuffers::settle_done_copies() {
  while (!copies_.empty() &&
         driver_.event_query(queue_.device(), buffers_->event(copies_.front().buffer))) {
    settle_oldest_copy();
  }
}

void BounceBuffers::settle_oldest_copy() {
  Job& oldest = copies_.front();
  driver_.event_synchronize(queue_.device(), buffers_->event(oldest.buffer));
  if (oldest.work) {
    give(std::move(oldest));
  } else {
    const std::lock_guard lock(mutex_);
    free_.push_back(oldest.buffer);
  }
  copies_.pop_front();
}

void BounceBuffers::enqueue_filled() {
  while (true) {
    {
      const std::lock_guard lock(mutex_);
      throw_failure();
      if (!head_filled()) return;
    }
    enqueue_head();
  }
}

void BounceBuffers::enqueue_head() {
  const Incoming head = std::move(incoming_.front());
  incoming_.pop_front();
  queue_.to_device(head.destination, buffers_->data(head.buffer), head.bytes);
  queue_.record(buffers_->event(head.buffer));
  copies_.push_back({head.buffer, head.bytes, {}, {}, false});
  for (const auto& call : head.queued) call();
}

void BounceBuffers::give(Job job) {
  {
    const std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
  }
  job_given_.notify_one();
}

template <typename Condition>
void BounceBuffers::wait_for_threads(const Condition& reached) {
  std::unique_lock lock(mutex_);
  const auto over = [&] { return failure_ != nullptr || reached(); };
  while (threads_.empty() && !over()) run_next_job(lock);
  job_done_.wait(lock, over);
  throw_failure();
}

// Needs the lock.
void BounceBuffers::throw_failure() const {
  if (failure_ == nullptr) return;
  try {
    std::rethrow_exception(failure_);
  } catch (const Error& error) {
    throw Error(error);
  } catch (const std::exception& error) {
    throw failure_of(error);
  }
}

void BounceBuffers::stop_threads() noexcept {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  job_given_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  stopping_ = false;
}

// ---- the threads --------------------------------------------------------------------------------

void BounceBuffers::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    job_given_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    run_next_job(lock);
  }
}

void BounceBuffers::run_annotated(const Job& job, std::byte* data) {
  try {
    job.work(data, job.bytes);
  } catch (Error& error) {
    if (job.annotate) job.annotate(error);
    throw;
  }
}

void BounceBuffers::run_next_job(std::unique_lock<std::mutex>& lock) {
  Job job = std::move(jobs_.front());
  jobs_.pop_front();
  ++running_;
  const bool skipped = failure_ != nullptr;
  lock.unlock();
  std::exception_ptr failure;  // the calling thread throws it
  try {
    if (!skipped) run_annotated(job, buffers_->data(job.buffer));
  } catch (const std::exception&) {
    failure = std::current_exception();
  }
  job.work = nullptr;  // releases its captures as soon as the job is done
  lock.lock();
  --running_;
  if (failure != nullptr && failure_ == nullptr) {
    failure_ = std::move(failure);
  }
  if (job.fills) {
    filled_[job.buffer] = true;
  } else {
    free_.push_back(job.buffer);
  }
  job_done_.notify_all();
}

}  // namespace cumempool::backup
