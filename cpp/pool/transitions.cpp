// The transitions of an allocator: sleep, wake, swap, asynchronous wake, prepare.
#include "pool/transitions.hpp"

#include <cstddef>
#include <deque>
#include <exception>
#include <map>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "pool/backup_plan.hpp"
#include "pool/offload.hpp"
#include "pool/records.hpp"

namespace cumempool::pool {

// ---- common parts of transitions ----------------------------------------------------------------

Transition::Transition(Allocator& allocator, const char* operation)
    : allocator_(allocator),
      turn_(allocator.transition_lock().enter(operation)),
      operation_(operation) {
  allocator_.check_open(operation);
  allocator_.counters().copied_bytes = allocator_.counters().bytes_to_copy = 0;
  allocator_.follow_use_inside();
}

Transition::~Transition() {
  allocator_.unclaim(claimed_);
  Counters& counters = allocator_.counters();
  if (!committed_) {
    counters.failed_transitions += 1;
  } else {
    const std::string operation = operation_;
    (operation == "wake"   ? counters.wakes
     : operation == "swap" ? counters.swaps
                           : counters.sleeps) += 1;
  }
}

void Transition::refuse_captures(const std::vector<cumempool_device_stream>& streams) const {
  for (const cumempool_device_stream& stream : streams) {
    if (allocator_.devices().find(stream.device) == nullptr) continue;  // a device without records
    const driver::ContextScope scope(allocator_.driver(), stream.device);
    if (!allocator_.driver().stream_is_capturing(stream.device, stream.stream)) continue;
    Error error(CUMEMPOOL_CAPTURING, "the calling thread's current stream is being captured");
    error.operation = operation_;
    error.device = stream.device;
    error.advice = "end the capture first; the capture goes on undisturbed";
    throw error;
  }
}

std::vector<RecordPointer> Transition::claim(const std::function<bool(const Record&)>& wanted,
                                             const std::function<void()>& admit) {
  std::vector<RecordPointer> claimed = allocator_.records().claim(operation_, wanted, admit);
  try {
    claimed_.insert(claimed_.end(), claimed.begin(), claimed.end());
  } catch (const std::exception&) {  // out of memory: the destructor would miss the claims
    allocator_.unclaim(claimed);
    throw;
  }
  return claimed;
}

void Transition::begin_again() noexcept {
  allocator_.unclaim(claimed_);
  claimed_.clear();
  allocator_.counters().copied_bytes = allocator_.counters().bytes_to_copy = 0;
}

// ---- sleep --------------------------------------------------------------------------------------

Report sleep(Allocator& allocator, const SleepRequest& request) {
  const char* operation = request.drop_backups ? "discard" : "sleep";
  Transition transition(allocator, operation);
  const Clock::time_point start = Clock::now();
  transition.refuse_captures(request.streams);
  Report report = transition.with_overflow([&] {
    Report made;
    Offload offload(allocator, operation, request, made);
    offload.plan(transition.claim([&](const Record& candidate) { return offload.wants(candidate); },
                                  [&] { offload.admit(); }));
    offload.fence();
    undo_on_failure(offload, [&] {
      offload.start_copies();
      offload.finish();
    });
    offload.commit();
    return made;
  });
  transition.commit();
  report.seconds = seconds_since(start);
  return report;
}

// ---- wake ---------------------------------------------------------------------------------------

namespace {

// Sorts the records: those of `first`, then in order of allocation, since programs use those first.
// If no program can look before the end, records with a backup come first: the rest is mapped while
// they are copied.
void put_in_order(std::vector<RecordPointer>& records, const WakeRequest& request) {
  const auto rank = [&](const RecordPointer& record) {
    if (request.first.count(record.get()) != 0) return 0;
    return request.queued || record->contents.backup() != nullptr ? 1 : 2;
  };
  std::stable_sort(records.begin(), records.end(),
                   [&](const auto& left, const auto& right) { return rank(left) < rank(right); });
}

}  // namespace

bool wakes(const WakeRequest& request, const Record& record) {
  return record.contents.asleep() && !record.freed &&
         (request.all || request.tags.count(record.tag) != 0);
}

void refuse_without_room(Allocator& allocator, const char* operation, Restore& restore,
                         const std::function<std::uint64_t(int)>& more) {
  const auto refuse = [&](int device) {
    std::uint64_t free = 0;
    std::uint64_t total = 0;
    const driver::ContextScope scope(allocator.driver(), device);
    allocator.driver().memory_info(device, &free, &total);
    const std::uint64_t needed = restore.bytes_on(device);
    const std::uint64_t room = free + more(device);
    if (needed <= room) return;
    Error error(CUMEMPOOL_OUT_OF_MEMORY, "the wake needs " + format_bytes(needed) +
                                             " on the device, which has room for " +
                                             format_bytes(room));
    error.operation = operation;
    error.device = device;
    error.bytes = needed;
    error.free_bytes = free;
    error.total_bytes = total;
    error.advice =
        "free device memory (torch.cuda.empty_cache(), other tags, other processes) and try again; "
        "nothing has changed";
    throw error;
  };
  for (const int device : restore.devices()) {
    allocator.with_freed_memory([&] { refuse(device); });
  }
}

Report wake(Allocator& allocator, const WakeRequest& request) {
  Report report;
  Restore restore(allocator, "wake", report, request.queued, request.withdraw);
  Transition transition(allocator, "wake");
  const Clock::time_point start = Clock::now();
  transition.refuse_captures(request.streams);
  auto records =
      transition.claim([&](const Record& candidate) { return wakes(request, candidate); });
  put_in_order(records, request);
  restore.plan(records);
  if (request.planned) {
    refuse_without_room(allocator, "wake", restore, [](int) { return 0; });
    request.planned(records);
  }
  undo_on_failure(restore, [&] {
    restore.bring_all();
    restore.finish();
  });
  restore.commit();
  transition.commit();
  report.seconds = seconds_since(start);
  return report;
}

// ---- swap ---------------------------------------------------------------------------------------

namespace {

class Swap {
 public:
  Swap(Transition& transition, const SleepRequest& sleep, const WakeRequest& wake)
      : allocator_(transition.allocator()),
        sleep_(sleep),
        wake_(wake),
        offload_(allocator_, "swap", sleep, report_),
        restore_(allocator_, "swap", report_),
        transition_(transition) {}

  Report run() {
    plan();
    offload_.fence();
    undo_on_failure(*this, [this] {
      offload_.start_copies();
      for (bool any = true; any;) {
        any = false;
        for (const int device : restore_.devices()) any = bring_next(device) || any;
      }
      // Memory that the restore does not need is released last: a device clears what it gets back,
      // which would slow down the copies that still run.
      restore_.finish();
      offload_.finish();
    });
    offload_.commit();
    restore_.commit();
    return std::move(report_);
  }

  // Undoes the restore first, since the offload may need its memory.
  void undo(Error& failure) {
    restore_.undo(failure);
    offload_.undo(failure);
  }

 private:
  void plan() {
    const auto leaving =
        transition_.claim([this](const Record& record) { return offload_.wants(record); },
                          [this] { offload_.admit(); });
    const auto coming = transition_.claim([this](const Record& record) {
      return record.claimed_by == nullptr && wakes(wake_, record) &&
             sleep_.actions.count(record.tag) == 0;
    });
    offload_.plan(leaving);
    restore_.plan(coming);
    refuse_without_room(allocator_, "swap", restore_,
                        [this](int device) { return offload_.bytes_on(device); });
    for (const int device : restore_.devices()) {
      std::uint64_t total = 0;
      const driver::ContextScope scope(allocator_.driver(), device);
      allocator_.driver().memory_info(device, &free_[device], &total);
    }
  }

  // Brings one allocation, once there is room for it.
  bool bring_next(int device) {
    if (restore_.done(device)) return false;
    const std::uint64_t needed = restore_.next_bytes(device);
    std::uint64_t& free = free_.at(device);
    while (needed > free) {
      const std::uint64_t before = offload_.released_on(device);
      // Without known room, the device has the last word.
      if (!offload_.release_next(device, true)) break;
      free += offload_.released_on(device) - before;
    }
    if (needed <= free) free -= needed;
    restore_.bring_next(device);
    return true;
  }

  Allocator& allocator_;
  const SleepRequest& sleep_;
  const WakeRequest& wake_;
  Report report_;
  Offload offload_;
  Restore restore_;
  Transition& transition_;
  std::map<int, std::uint64_t> free_;  // device memory that the restore may take, by device
};

}  // namespace

Report swap(Allocator& allocator, const SleepRequest& sleep, const WakeRequest& wake) {
  Transition transition(allocator, "swap");
  const Clock::time_point start = Clock::now();
  transition.refuse_captures(sleep.streams);
  Report report = transition.with_overflow([&] { return Swap(transition, sleep, wake).run(); });
  transition.commit();
  report.seconds = seconds_since(start);
  return report;
}

// ---- prepare ------------------------------------------------------------------------------------

namespace {

// Returns the new backups that a sleep would make; `choices` holds their choices.
std::vector<HostNeed> needs_of(Allocator& allocator, const SleepRequest& request,
                               const std::set<const Tag*>& yielding,
                               std::deque<BackupChoice>& choices) {
  DeadRanges dead(request.dead, request.dead_as_of);
  std::vector<HostNeed> needs;
  allocator.records().update([&] {
    for (const auto& action : request.actions) dead.look_at(*action.first);
  });
  allocator.records().for_each([&](const Record& record) {
    const auto action = request.actions.find(record.tag);
    if (action == request.actions.end() || record.contents.asleep() || record.freed) return;
    if (yielding.count(record.tag) == 0) refuse_pinned(allocator, "prepare", record);
    refuse_cuda_malloc("prepare", record);
    if (action->second != CUMEMPOOL_ON_SLEEP_OFFLOAD && !record.preserved) return;
    const auto live = dead.live_extents(record);
    BackupChoice choice = allocator.tags().backup(*record.tag);
    if (reusable(allocator, record, choice, live)) return;  // has its room already
    choices.push_back(std::move(choice));
    needs.push_back({record.tag, record.device, total_bytes(live), &choices.back()});
  });
  return needs;
}

// Makes the streams, buffers and code of a device. If it has no digests, the sleep reports that.
void warm_up(Allocator& allocator, int ordinal) {
  const std::shared_ptr<Device> device = allocator.devices().at(ordinal);
  const driver::ContextScope scope(allocator.driver(), ordinal);
  device->transfer(Direction::kOut);
  if (!allocator.retains_backups()) return;
  try {
    device->digests().begin(1);
    device->digests().queue().digest(allocator.digest_seed(), nullptr, 0, nullptr);
  } catch (const Error& error) {
    if (error.result != CUMEMPOOL_RESULT_NOT_SUPPORTED) throw;
  }
}

void hold_room(Allocator& allocator, const SleepRequest& request,
               const std::set<const Tag*>& yielding) {
  std::map<backup::HostArena*, std::size_t> bytes;
  std::map<backup::HostArena*, int> devices;  // the device that pins it
  std::set<int> warm;
  std::deque<BackupChoice> choices;
  const std::vector<HostNeed> needs = needs_of(allocator, request, yielding, choices);
  // Retained backups stay: the sleep may need nothing else.
  plan_host_memory(allocator, "prepare", needs, /*may_drop_retained=*/false);
  for (const HostNeed& need : needs) {
    if (warm.insert(need.device).second) warm_up(allocator, need.device);
    check_reach(allocator, *need.choice, need.device);
    backup::HostArena* arena = arena_of(allocator, *need.choice, need.device);
    if (arena == nullptr) continue;
    bytes[arena] += need.bytes;
    devices.emplace(arena, need.device);
  }
  for (const auto& [arena, device] : devices) {
    const driver::ContextScope scope(allocator.driver(), device);
    const backup::ArenaOrder order(*arena, bytes.at(arena));
    arena->deliver(device);
  }
}

}  // namespace

std::uint64_t prepare(Allocator& allocator, const SleepRequest& request,
                      const std::set<const Tag*>& yielding) {
  const TransitionLock::Turn turn = allocator.transition_lock().enter("prepare");
  allocator.check_open("prepare");
  const std::uint64_t before = allocator.stores().pinned_bytes();
  try {
    try {
      hold_room(allocator, request, yielding);
    } catch (const Error& error) {
      if (!sends_to_overflow(allocator, error)) throw;
      hold_room(allocator, request, yielding);
    }
    return allocator.stores().pinned_bytes() - before;
  } catch (Error& error) {
    annotate(error, "prepare", nullptr);
    throw;
  }
}

// ---- asynchronous wake --------------------------------------------------------------------------

AsyncWake::AsyncWake(std::shared_ptr<Allocator> allocator, WakeRequest request)
    : allocator_(std::move(allocator)), request_(std::move(request)) {
  allocator_->transition_lock().refuse_inside("wake");
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

AsyncWake::~AsyncWake() {
  if (thread_.joinable()) thread_.join();
  destroy_events();
}

void AsyncWake::run() {
  std::exception_ptr failure;  // thrown by wait() and finish()
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

void AsyncWake::note_planned(const std::vector<RecordPointer>& records) {
  const std::lock_guard lock(mutex_);
  for (const RecordPointer& record : records) {
    Ready ready;
    ready.device = record->device;
    ready_.emplace(record.get(), ready);
    // The devices keep the contexts of the events.
    if (devices_.empty() || devices_.back()->ordinal() != record->device) {
      devices_.push_back(allocator_->devices().at(record->device));
    }
  }
  planned_ = true;
  changed_.notify_all();
}

// Runs in the thread of the wake, inside a ContextScope of the device.
void AsyncWake::note_queued(const Record& record, backup::CopyQueue& queue) {
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

// After this, work on memory that was handed out is in its streams. Later calls of wait() throw the
// failure.
void AsyncWake::withdraw() {
  std::unique_lock lock(mutex_);
  withdrawn_ = true;
  changed_.wait(lock, [this] { return handing_out_ == 0; });
}

void AsyncWake::destroy_events() noexcept {
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

void AsyncWake::throw_failure() const {
  const std::lock_guard lock(mutex_);
  throw_failure_locked();
}

void AsyncWake::throw_failure_locked() const {
  if (failure_ == nullptr) return;
  try {
    std::rethrow_exception(failure_);
  } catch (const Error& error) {
    throw Error(error);  // each caller gets its own
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

}  // namespace

void AsyncWake::wait(cumempool_address address, const cumempool_device_stream& stream) {
  const RecordPointer record = Registry::instance().find(address);
  if (record == nullptr || record->owner != allocator_) {
    throw refuse_wait(CUMEMPOOL_NOT_OWNED, "the address lies in no allocation of the allocator",
                      "pass a tensor of a tag that is waking");
  }
  std::unique_lock lock(mutex_);
  const auto found = ready_.find(record.get());
  if (found != ready_.end()) {
    changed_.wait(lock, [&] { return (found->second.queued && !withdrawn_) || ended_; });
    throw_failure_locked();
  }
  if (found == ready_.end() || ended_) {  // then every stream sees its contents
    lock.unlock();
    bool asleep = false;
    allocator_->records().update([&] { asleep = !record->freed && record->contents.asleep(); });
    if (!asleep) return;
    throw refuse_wait(CUMEMPOOL_INVALID_ARGUMENT,
                      "the allocation is asleep and not part of this wake", "wake its tag");
  }
  const cumempool_event event = found->second.event;
  ++handing_out_;
  lock.unlock();
  std::exception_ptr failure;
  try {
    hand_out(stream, event);
  } catch (const std::exception&) {
    failure = std::current_exception();
  }
  lock.lock();
  --handing_out_;
  changed_.notify_all();
  if (failure != nullptr) std::rethrow_exception(failure);
}

// Makes a stream wait for the event of an allocation. Runs outside the lock.
void AsyncWake::hand_out(const cumempool_device_stream& stream, cumempool_event event) {
  const driver::Driver driver = allocator_->driver();
  hold_context(stream.device);
  const driver::ContextScope scope(driver, stream.device);
  if (driver.stream_is_capturing(stream.device, stream.stream)) {
    throw refuse_wait(CUMEMPOOL_CAPTURING, "the stream is being captured",
                      "wait before the capture, or finish the wake first");
  }
  driver.stream_wait_event(stream.device, stream.stream, event);
}

// Holds the context of a device that the program uses: the driver knows only held contexts.
void AsyncWake::hold_context(int device) {
  const driver::Driver driver = allocator_->driver();
  if (!driver.context_active(device)) {
    Error error = refuse_wait(CUMEMPOOL_INVALID_ARGUMENT,
                              "the device of the stream has no context, so it has no streams",
                              "use the device first (torch.cuda.synchronize(device))");
    error.device = device;
    throw error;
  }
  const std::lock_guard lock(mutex_);
  auto& context = contexts_[device];
  if (context == nullptr) context = std::make_unique<driver::RetainedContext>(driver, device);
}

bool AsyncWake::done() const {
  const std::lock_guard lock(mutex_);
  return ended_;
}

std::optional<Report> AsyncWake::finish() {
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return ended_; });
  }
  throw_failure();
  const std::lock_guard lock(mutex_);
  return std::exchange(report_, std::nullopt);
}

}  // namespace cumempool::pool
