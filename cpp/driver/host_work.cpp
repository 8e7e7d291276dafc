// The deferred work of one device of the host driver.
#include "driver/host_work.hpp"

#include <algorithm>
#include <iterator>

#include "driver/scope_exit.hpp"

namespace cumempool::driver {
HostWork::HostWork(int device, std::mutex& mutex, std::condition_variable& ran,
                   const HostMemory& memory, const std::vector<std::unique_ptr<HostWork>>& devices)
    : device_(device), mutex_(mutex), ran_(ran), memory_(memory), devices_(devices) {
  streams_.try_emplace(0);  // the legacy default stream
}

void HostWork::add_stream(cumempool_stream stream) { streams_.try_emplace(stream); }

void HostWork::add_event(cumempool_event event) { events_.try_emplace(event, HostMark{}); }

cumempool_result HostWork::destroy_stream(cumempool_stream stream) {
  if (stream == 0 || !has_stream(stream)) return CUMEMPOOL_RESULT_INVALID_HANDLE;
  const auto found = streams_.find(stream);
  found->second.alive = false;
  if (found->second.queue.empty() && !found->second.running) streams_.erase(found);
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostWork::destroy_event(cumempool_event event) {
  if (!mark_of(event)) return CUMEMPOOL_RESULT_INVALID_HANDLE;
  events_.erase(event);
  return CUMEMPOOL_RESULT_SUCCESS;
}

bool HostWork::has_stream(cumempool_stream stream) const {
  const auto found = streams_.find(stream);
  return found != streams_.end() && found->second.alive && !found->second.lost;
}

bool HostWork::capturing(cumempool_stream stream) const {
  return has_stream(stream) && streams_.at(stream).capturing;
}

bool HostWork::any_capturing() const {
  return std::any_of(streams_.begin(), streams_.end(),
                     [](const auto& stream) { return stream.second.capturing; });
}

bool HostWork::set_capturing(cumempool_stream stream, bool capturing) {
  if (!has_stream(stream)) return false;
  streams_.at(stream).capturing = capturing;
  return true;
}

cumempool_result HostWork::check_stream(cumempool_stream stream) const {
  if (!has_stream(stream)) return CUMEMPOOL_RESULT_INVALID_HANDLE;
  return capturing(stream) ? CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED : CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostWork::submit(cumempool_stream stream, const HostCommand& command) {
  if (const auto result = check_stream(stream)) return result;
  auto& queue = streams_.at(stream).queue;
  queue.push_back(command);
  queue.back().sequence = ++sequence_;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostWork::record(cumempool_event event, cumempool_stream stream) {
  if (!mark_of(event)) return CUMEMPOOL_RESULT_INVALID_HANDLE;
  if (const auto result = check_stream(stream)) return result;
  events_.at(event) = mark_of_stream(stream);
  return CUMEMPOOL_RESULT_SUCCESS;
}

std::optional<HostMark> HostWork::mark_of(cumempool_event event) const {
  const auto found = events_.find(event);
  return found == events_.end() ? std::nullopt : found->second;
}

bool HostWork::pending(const HostMark& mark) const {
  const auto stream = streams_.find(mark.stream);
  return stream != streams_.end() && !stream->second.queue.empty() &&
         stream->second.queue.front().sequence <= mark.sequence;
}

bool HostWork::next_is_running(const HostMark& mark) const {
  if (!pending(mark)) return false;
  const Stream& stream = streams_.at(mark.stream);
  const HostCommand& next = stream.queue.front();
  return stream.running ||
         (next.kind == HostCommand::Kind::kWait &&
          devices_[static_cast<std::size_t>(next.wait.device)]->next_is_running(next.wait));
}

std::optional<HostMark> HostWork::last_use(const void* pointer, std::size_t bytes) const {
  for (const auto& [handle, stream] : streams_) {
    const auto found =
        std::find_if(stream.queue.rbegin(), stream.queue.rend(),
                     [&](const HostCommand& command) { return uses(command, pointer, bytes); });
    if (found != stream.queue.rend()) return HostMark{device_, handle, found->sequence};
  }
  return std::nullopt;
}

void HostWork::lose_context() {
  error_ = CUMEMPOOL_RESULT_SUCCESS;
  for (auto& [handle, stream] : streams_) stream.lost = handle != 0;
  for (auto& event : events_) event.second = std::nullopt;
}

cumempool_result HostWork::run(const HostMark& mark) {
  Lock lock(mutex_);
  while (error_ == CUMEMPOOL_RESULT_SUCCESS && pending(mark)) {
    if (next_is_running(mark)) {
      ran_.wait(lock);
    } else if (const auto result = run_one(mark, lock)) {
      return result;
    }
  }
  return error_;
}

cumempool_result HostWork::run_all() {
  std::vector<HostMark> marks;
  {
    const Lock lock(mutex_);
    for (const auto& stream : streams_) marks.push_back(mark_of_stream(stream.first));
  }
  for (const HostMark& mark : marks) {
    if (const auto result = run(mark)) return result;
  }
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostWork::run_one(const HostMark& mark, Lock& lock) {
  if (error_ != CUMEMPOOL_RESULT_SUCCESS || !pending(mark)) return error_;
  const auto stream = streams_.find(mark.stream);
  if (stream->second.running) return CUMEMPOOL_RESULT_SUCCESS;
  return stream->second.queue.front().kind == HostCommand::Kind::kWait ? run_wait(stream, lock)
                                                                       : run_command(stream, lock);
}

// Comes to an end, because an event marks work that was submitted before the wait.
cumempool_result HostWork::run_wait(Streams::iterator stream, Lock& lock) {
  const HostCommand wait = stream->second.queue.front();
  HostWork& other = *devices_[static_cast<std::size_t>(wait.wait.device)];
  const bool over = !other.pending(wait.wait);
  const auto result = over ? other.error() : other.run_one(wait.wait, lock);
  if (error_ != CUMEMPOOL_RESULT_SUCCESS) return error_;
  // The awaited work is lost, and so is all work behind it.
  if (result != CUMEMPOOL_RESULT_SUCCESS) return fail();
  if (over) pop(stream, wait.sequence);
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostWork::run_command(Streams::iterator stream, Lock& lock) {
  const HostCommand command = stream->second.queue.front();
  const auto ranges = device_ranges(command);
  if (!ranges) return fail();
  const auto operands = find_operands(memory_, device_, command, *ranges);
  if (!operands) return fail();
  {
    bool& running = stream->second.running;
    running = true;
    lock.unlock();
    const ScopeExit stop([&] {  // also without memory to run the command, which stays queued then
      if (!lock.owns_lock()) lock.lock();
      running = false;
      ran_.notify_all();
    });
    const bool moved = execute(command, *ranges, *operands);
    lock.lock();
    // Unmapping while the command ran is as wrong as unmapping before.
    const bool good = moved && find_operands(memory_, device_, command, *ranges);
    if (!good && error_ == CUMEMPOOL_RESULT_SUCCESS) fail();
  }
  pop(stream, command.sequence);
  return error_;
}

// Takes a finished command from its queue, unless the device broke meanwhile.
void HostWork::pop(Streams::iterator stream, std::uint64_t sequence) {
  auto& queue = stream->second.queue;
  if (!queue.empty() && queue.front().sequence == sequence) queue.pop_front();
  if (queue.empty() && !stream->second.alive) streams_.erase(stream);
  ran_.notify_all();
}

// Breaks the device and drops its unfinished work. A destroyed stream with a running command goes
// when that command ends.
cumempool_result HostWork::fail() {
  error_ = kIllegalAddress;
  for (auto stream = streams_.begin(); stream != streams_.end();) {
    stream->second.queue.clear();
    const bool gone = !stream->second.alive && !stream->second.running;
    stream = gone ? streams_.erase(stream) : std::next(stream);
  }
  ran_.notify_all();
  return error_;
}

void HostWork::count(HostDriverCounters& counters) const {
  for (const auto& [handle, stream] : streams_) {
    if (handle != 0 && stream.alive) ++counters.streams;
    counters.queued_commands += stream.queue.size();
  }
  counters.events += events_.size();
}

}  // namespace cumempool::driver
