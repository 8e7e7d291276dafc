// Gives back the memory of allocations that the program has freed, once no work can be using it.
#include "pool/reaper.hpp"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <thread>

#include "driver/driver.hpp"

namespace cumempool::pool {

namespace {

// Counts the batches of all reapers' threads. None is under way once exit handlers have run, since
// the driver ends after them.
class Exit {
 public:
  static Exit& instance() {
    static auto& exit = *new Exit;
    return exit;
  }

  // Begins a batch; false if the process is ending.
  bool begin() noexcept {
    const std::lock_guard lock(mutex_);
    if (ends_) return false;
    ++under_way_;
    return true;
  }
  void end() noexcept {
    const std::lock_guard lock(mutex_);
    --under_way_;
    ended_.notify_all();
  }
  bool ends() noexcept {
    const std::lock_guard lock(mutex_);
    return ends_;
  }

 private:
  Exit() {
    // Registered later than libcuda's own handlers, and so called before them.
    std::atexit([] {
      if (!driver::in_forked_child()) instance().wait();
    });
  }
  // Waits for a second at most: work that never ends must not keep the process from ending.
  void wait() noexcept {
    std::unique_lock lock(mutex_);
    ends_ = true;
    ended_.wait_for(lock, std::chrono::seconds(1), [this] { return under_way_ == 0; });
  }

  std::mutex mutex_;
  std::condition_variable ended_;
  int under_way_ = 0;
  bool ends_ = false;
};

// How long threads spin for each other before they sleep: a row of frees does not start a thread
// each, and a free of an idle device needs no wake-up.
constexpr std::chrono::microseconds kLookout{250};

}  // namespace

// Runs a driver call that may wait for a device, so that frees can tell how long it takes.
template <typename Call>
auto Reaper::in_step(const Call& call) noexcept {
  {
    const Lock lock(mutex_);
    in_step_ = true;
    step_ += 1;
    step_began_ = Clock::now();
    changed_.notify_all();
  }
  const auto result = call();
  const Lock lock(mutex_);
  in_step_ = false;
  return result;
}

bool Reaper::fence(int device) noexcept {
  const auto& table = driver_.table();
  return in_step([&] { return table.fence(table.self, &device, 1); }) == CUMEMPOOL_RESULT_SUCCESS;
}

// Whether no work submitted before can be using the record's memory. Waits for each device once per
// batch. A device with a broken context keeps the memory that it may use, and no other.
bool Reaper::unused(const Record& record, IdleDevices& idle) noexcept {
  bool unused = true;
  for (const int device : record.memory.access()) {
    const auto index = static_cast<std::size_t>(device);
    if (index >= idle.size()) {
      unused = fence(device) && unused;
      continue;
    }
    std::optional<bool>& known = idle[index];
    if (!known) known = fence(device);
    unused = *known && unused;
  }
  return unused;
}

// ---- calls of frees, transitions and close ------------------------------------------------------

void Reaper::take(const RecordPointer& record) noexcept {
  bytes_ += record->bytes;
  record->contents.discard();      // drops the backup
  if (!record->memory.mapped()) {  // no work can be using it
    finish(record, record->memory.teardown() == CUMEMPOOL_RESULT_SUCCESS);
    return;
  }
  Lock lock(mutex_);
  record->reaped = false;
  waiting_.push(record);
  taken_ += 1;
  wait_for([&] { return record->reaped; }, lock);
}

void Reaper::drain() noexcept {
  Lock lock(mutex_);
  const std::uint64_t last = batches_ + (working_ ? 1 : 0) + (waiting_.empty() ? 0 : 1);
  work_until([&] { return batches_ >= last; }, lock);
}

void Reaper::seal() noexcept {
  {
    const Lock lock(mutex_);
    sealed_ = true;
    while (RecordPointer record = leaked_.pop()) {
      record->reaped = false;
      bytes_ += record->bytes;
      waiting_.push(std::move(record));
    }
  }
  drain();
}

// Waits until `done`, unless a driver call turns out to wait for a busy device.
template <typename Done>
void Reaper::wait_for(const Done& done, Lock& lock) noexcept {
  const Duration wait = free_wait_;
  if (!sealed_ && wait != kForever) {
    if (start(lock)) look_out(finished_, lock);
    while (!done() && start(lock)) {
      if (!in_step_) {
        changed_.wait(lock);  // the thread is about to begin a step
        continue;
      }
      const std::uint64_t step = step_;
      const auto enough = step_began_ + std::min<Duration>(wait, std::chrono::hours(1));
      const bool late = changed_.wait_until(lock, enough) == std::cv_status::timeout;
      if (late && in_step_ && step_ == step) return;
    }
  }
  work_until(done, lock);
}

// ---- the work -----------------------------------------------------------------------------------

// Works off the waiting records until `done`, in turns with other threads that do the same.
template <typename Done>
void Reaper::work_until(const Done& done, Lock& lock) noexcept {
  while (!done()) {
    if (working_) {
      changed_.wait(lock);
    } else {
      work_off(lock);
    }
  }
}

// Works off one batch.
void Reaper::work_off(Lock& lock) noexcept {
  RecordList batch;
  batch.swap(waiting_);
  working_ = true;
  lock.unlock();
  IdleDevices idle{};
  while (RecordPointer record = batch.pop()) {
    bool given_back = !record->memory.mapped() || unused(*record, idle);
    if (given_back) {
      const auto teardown = [&] { return record->memory.teardown(); };
      // Freeing memory of cudaMalloc may wait for a device; unmapping does not (C11).
      given_back = (record->memory.free_waits() ? in_step(teardown) : teardown()) ==
                   CUMEMPOOL_RESULT_SUCCESS;
    }
    finish(std::move(record), given_back);
  }
  lock.lock();
  working_ = false;
  batches_ += 1;
  changed_.notify_all();
}

void Reaper::finish(RecordPointer record, bool given_back) noexcept {
  if (!given_back) record->memory.leak();
  const Lock lock(mutex_);
  record->reaped = true;
  finished_ += 1;
  bytes_ -= record->bytes;
  if (!given_back) leaked_.push(std::move(record));
  changed_.notify_all();
}

// ---- the thread ---------------------------------------------------------------------------------

// Starts the thread; false if there can be none: no memory, too many threads, or the process ends.
bool Reaper::start(const Lock& /*lock*/) noexcept {
  if (thread_lives_) return true;
  if (Exit::instance().ends()) return false;
  try {
    std::thread([self = shared_from_this()] { self->run(); }).detach();
  } catch (const std::exception&) {
    return false;
  }
  thread_lives_ = true;
  return true;
}

void Reaper::run() noexcept {
  Lock lock(mutex_);
  while (!waiting_.empty() || more_soon(lock)) {
    if (working_) {
      changed_.wait(lock);
      continue;
    }
    if (!Exit::instance().begin()) break;
    work_off(lock);
    Exit::instance().end();
  }
  thread_lives_ = false;
  changed_.notify_all();
}

bool Reaper::more_soon(Lock& lock) noexcept {
  look_out(taken_, lock);
  return !waiting_.empty();
}

// Spins without the lock until the count has changed, for kLookout at most.
void Reaper::look_out(const std::atomic<std::uint64_t>& count, Lock& lock) noexcept {
  const std::uint64_t before = count;
  lock.unlock();
  const auto end = Clock::now() + kLookout;
  while (count == before && Clock::now() < end) std::this_thread::yield();
  lock.lock();
}

}  // namespace cumempool::pool
