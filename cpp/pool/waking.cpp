// A wake in a thread of its own.
#include "pool/waking.hpp"

#include <exception>
#include <system_error>
#include <utility>

#include "pool/registry.hpp"

namespace cumempool::pool {

Waking::Waking(std::shared_ptr<Allocator> allocator, WakeRequest request)
    : allocator_(std::move(allocator)), request_(std::move(request)) {
  allocator_->turnstile().refuse_inside("wake");
  request_.planned = [this](const auto& records) { note_planned(records); };
  request_.queued = [this](const Record& record, backup::CopyQueue& queue) {
    note_queued(record, queue);
  };
  request_.withdraw = [this] { withdraw(); };
  try {
    thread_ = std::thread([this] { run(); });
  } catch (const std::system_error& error) {
    Error refused(CUMEMPOOL_OUT_OF_HOST_MEMORY,
                  std::string("no thread could be started: ") + error.what());
    refused.operation = "wake";
    refused.advice = "raise the limit on processes (ulimit -u), or wake without a thread";
    throw refused;
  }
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return planned_ || ended_; });
  if (planned_) return;
  lock.unlock();
  thread_.join();
  throw_failure();
}

Waking::~Waking() {
  if (thread_.joinable()) thread_.join();
  destroy_events();
}

void Waking::run() {
  std::exception_ptr failure;  // told by those who ask: this thread has nobody to fail to
  std::optional<Report> report;
  try {
    report = wake(*allocator_, request_);
  } catch (const std::exception&) {
    failure = std::current_exception();
  }
  std::unique_lock lock(mutex_);
  failure_ = std::move(failure);
  report_ = std::move(report);
  ended_ = true;
  changed_.notify_all();
  changed_.wait(lock, [this] { return handing_out_ == 0; });
  contexts_.clear();
}

void Waking::note_planned(const std::vector<RecordPointer>& records) {
  const std::lock_guard lock(mutex_);
  for (const RecordPointer& record : records) {
    Ready ready;
    ready.device = record->device;
    ready_.emplace(record.get(), ready);
    // They keep the contexts of the events.
    if (devices_.empty() || devices_.back()->ordinal() != record->device) {
      devices_.push_back(allocator_->devices().at(record->device));
    }
  }
  planned_ = true;
  changed_.notify_all();
}

// In the thread of the wake, inside a ContextScope of the device.
void Waking::note_queued(const Record& record, backup::CopyQueue& queue) {
  const cumempool_event event = allocator_->driver().event_create(record.device);
  {
    const std::lock_guard lock(mutex_);
    ready_.at(&record).event = event;
  }
  queue.record(event);
  const std::lock_guard lock(mutex_);
  ready_.at(&record).queued = true;
  changed_.notify_all();
}

// Behind it, work on memory that was handed out is in its streams, or comes too late: wait() says
// so.
void Waking::withdraw() {
  std::unique_lock lock(mutex_);
  withdrawn_ = true;
  changed_.wait(lock, [this] { return handing_out_ == 0; });
}

void Waking::destroy_events() noexcept {
  const auto& table = allocator_->driver().table();
  for (const auto& entry : ready_) {
    const Ready& ready = entry.second;
    if (ready.event == 0) continue;
    cumempool_context_token token{};
    if (table.context_enter(table.self, ready.device, &token) != CUMEMPOOL_RESULT_SUCCESS) continue;
    table.event_destroy(table.self, ready.device, ready.event);
    table.context_leave(table.self, &token);
  }
}

void Waking::throw_failure() const {
  const std::lock_guard lock(mutex_);
  throw_failure_locked();
}

void Waking::throw_failure_locked() const {
  if (failure_ == nullptr) return;
  try {
    std::rethrow_exception(failure_);
  } catch (const Error& error) {
    throw Error(error);  // each asker has one of its own
  } catch (const std::exception& error) {
    Error other(CUMEMPOOL_OUT_OF_HOST_MEMORY, error.what());
    other.operation = "wake";
    throw other;
  }
}

namespace {

Error refuse_wait(cumempool_status status, const char* why, const char* advice) {
  Error error(status, why);
  error.operation = "wait";
  error.advice = advice;
  return error;
}

// Counts a call that hands memory out, outside of the lock.
class HandingOut {
 public:
  HandingOut(std::unique_lock<std::mutex>& lock, std::condition_variable& changed, int& count)
      : lock_(lock), changed_(changed), count_(count) {
    ++count_;
    lock_.unlock();
  }
  ~HandingOut() {
    lock_.lock();
    --count_;
    changed_.notify_all();
  }
  HandingOut(const HandingOut&) = delete;
  HandingOut& operator=(const HandingOut&) = delete;

 private:
  std::unique_lock<std::mutex>& lock_;
  std::condition_variable& changed_;
  int& count_;
};

}  // namespace

void Waking::wait(cumempool_address address, const cumempool_device_stream& stream) {
  const RecordPointer record = Registry::instance().find(address);
  if (record == nullptr || record->owner != allocator_) {
    throw refuse_wait(CUMEMPOOL_NOT_OWNED, "the address lies in no allocation of the allocator",
                      "pass a tensor of the tags that are waking");
  }
  std::unique_lock lock(mutex_);
  const auto found = ready_.find(record.get());
  if (found != ready_.end()) {
    changed_.wait(lock, [&] { return (found->second.queued && !withdrawn_) || ended_; });
    throw_failure_locked();
  }
  if (found == ready_.end() || ended_) {  // then its contents are visible to every stream
    lock.unlock();
    bool asleep = false;
    allocator_->records().update([&] { asleep = record->asleep && !record->freed; });
    if (!asleep) return;
    throw refuse_wait(CUMEMPOOL_INVALID_ARGUMENT,
                      "the allocation sleeps, and is not part of this wake", "wake its tag");
  }
  const cumempool_event event = found->second.event;
  const HandingOut handing_out(lock, changed_, handing_out_);
  wait_for_event(stream, event);
}

void Waking::wait_for_event(const cumempool_device_stream& stream, cumempool_event event) {
  const driver::Driver driver = allocator_->driver();
  hold_context(stream.device);
  const driver::ContextScope scope(driver, stream.device);
  if (driver.stream_is_capturing(stream.device, stream.stream)) {
    throw refuse_wait(CUMEMPOOL_CAPTURING, "the stream is being captured",
                      "wait before the capture, or finish the wake first");
  }
  driver.stream_wait_event(stream.device, stream.stream, event);
}

// Of a device that the program uses; the driver knows a context only while it is held.
void Waking::hold_context(int device) {
  const driver::Driver driver = allocator_->driver();
  if (!driver.context_active(device)) {
    Error error = refuse_wait(CUMEMPOOL_INVALID_ARGUMENT,
                              "the device of the stream has no context, so it has no streams",
                              "use the device before (torch.cuda.synchronize(device))");
    error.device = device;
    throw error;
  }
  const std::lock_guard lock(mutex_);
  auto& context = contexts_[device];
  if (context == nullptr) context = std::make_unique<driver::RetainedContext>(driver, device);
}

bool Waking::done() const {
  const std::lock_guard lock(mutex_);
  return ended_;
}

std::optional<Report> Waking::finish() {
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return ended_; });
  }
  throw_failure();
  const std::lock_guard lock(mutex_);
  return std::exchange(report_, std::nullopt);
}

}  // namespace cumempool::pool
