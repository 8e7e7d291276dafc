// Deferred work of the host driver. Bytes move through the file behind the memory, not through its
// mapping, so that work into memory that is gone ends in an error and never in a SIGSEGV.
#include "driver/host_work.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <functional>

namespace cumempool::driver {
namespace {

// Calls transfer(done) until it has moved all bytes; false where the kernel refuses.
bool move_all(std::size_t bytes, const std::function<ssize_t(std::size_t done)>& transfer) {
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t moved = transfer(done);
    if (moved > 0) {
      done += static_cast<std::size_t>(moved);
    } else if (moved == 0 || errno != EINTR) {
      return false;
    }
  }
  return true;
}

bool fill_segment(const HostSegment& segment, std::uint8_t byte) {
  std::array<std::uint8_t, 65536> pattern{};
  pattern.fill(byte);
  return move_all(segment.bytes, [&](std::size_t done) {
    return pwrite(segment.memory->descriptor.get(), pattern.data(),
                  std::min(pattern.size(), segment.bytes - done),
                  static_cast<off_t>(segment.offset + done));
  });
}

bool execute(const HostCommand& command, const std::vector<HostSegment>& segments) {
  auto* host = static_cast<unsigned char*>(const_cast<void*>(command.host));  // NOLINT
  for (const HostSegment& segment : segments) {
    const int file = segment.memory->descriptor.get();
    bool moved = false;
    if (command.kind == HostCommand::Kind::kFill) {
      moved = fill_segment(segment, command.byte);
    } else {
      const bool reads = command.kind == HostCommand::Kind::kCopyToHost;
      moved = move_all(segment.bytes, [&](std::size_t done) {
        const auto offset = static_cast<off_t>(segment.offset + done);
        const std::size_t left = segment.bytes - done;
        return reads ? pread(file, host + done, left, offset)
                     : pwrite(file, host + done, left, offset);
      });
      host += segment.bytes;
    }
    if (!moved) return false;
  }
  return true;
}

bool uses(const HostCommand& command, const void* pointer, std::size_t bytes) {
  if (command.host == nullptr) return false;
  const auto begin = reinterpret_cast<std::uintptr_t>(pointer);
  const auto host = reinterpret_cast<std::uintptr_t>(command.host);
  return host < begin + bytes && begin < host + command.bytes;
}

}  // namespace

HostWork::HostWork(int device, std::mutex& state, const HostMemory& memory)
    : device_(device), state_(state), memory_(memory) {
  streams_.try_emplace(0);  // the legacy default stream
}

void HostWork::add_stream(cumempool_stream stream) { streams_.try_emplace(stream); }

void HostWork::add_event(cumempool_event event) { events_.try_emplace(event); }

cumempool_result HostWork::destroy_stream(cumempool_stream stream) {
  if (stream == 0 || !has_stream(stream)) return CUMEMPOOL_RESULT_INVALID_HANDLE;
  const auto found = streams_.find(stream);
  found->second.alive = false;
  if (found->second.queue.empty()) streams_.erase(found);
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

bool HostWork::set_capturing(cumempool_stream stream, bool capturing) {
  if (!has_stream(stream)) return false;
  streams_.at(stream).capturing = capturing;
  return true;
}

cumempool_result HostWork::check_stream(cumempool_stream stream) const {
  if (!has_stream(stream)) return CUMEMPOOL_RESULT_INVALID_HANDLE;
  return capturing(stream) ? CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED : CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostWork::submit(cumempool_stream stream, HostCommand command) {
  if (const auto result = check_stream(stream)) return result;
  command.sequence = sequence_ + 1;
  streams_.at(stream).queue.push_back(command);
  ++sequence_;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostWork::record(cumempool_event event, cumempool_stream stream) {
  if (!mark_of(event)) return CUMEMPOOL_RESULT_INVALID_HANDLE;
  if (const auto result = check_stream(stream)) return result;
  events_.at(event).mark = mark_of_stream(stream);
  return CUMEMPOOL_RESULT_SUCCESS;
}

std::optional<HostMark> HostWork::mark_of(cumempool_event event) const {
  const auto found = events_.find(event);
  if (found == events_.end() || found->second.lost) return std::nullopt;
  return found->second.mark;
}

std::optional<HostMark> HostWork::last_use(const void* pointer, std::size_t bytes) const {
  for (const auto& [handle, stream] : streams_) {
    const auto found =
        std::find_if(stream.queue.rbegin(), stream.queue.rend(),
                     [&](const HostCommand& command) { return uses(command, pointer, bytes); });
    if (found != stream.queue.rend()) return HostMark{handle, found->sequence};
  }
  return std::nullopt;
}

void HostWork::lose_context() {
  error_ = CUMEMPOOL_RESULT_SUCCESS;
  for (auto& [handle, stream] : streams_) stream.lost = handle != 0;
  for (auto& event : events_) event.second.lost = true;
}

cumempool_result HostWork::run(const HostMark& mark) {
  const std::lock_guard<std::mutex> execution(execution_);
  return run_in_order(mark);
}

cumempool_result HostWork::run_all() {
  std::vector<HostMark> marks;
  {
    const std::lock_guard<std::mutex> state(state_);
    for (const auto& stream : streams_) marks.push_back(mark_of_stream(stream.first));
  }
  const std::lock_guard<std::mutex> execution(execution_);
  for (const HostMark& mark : marks) {
    if (const auto result = run_in_order(mark)) return result;
  }
  return CUMEMPOOL_RESULT_SUCCESS;
}

// Needs execution_.
cumempool_result HostWork::run_in_order(const HostMark& mark) {
  for (;;) {
    std::unique_lock<std::mutex> state(state_);
    if (error_ != CUMEMPOOL_RESULT_SUCCESS) return error_;
    const auto stream = streams_.find(mark.stream);
    if (stream == streams_.end()) return CUMEMPOOL_RESULT_SUCCESS;
    auto& queue = stream->second.queue;
    if (queue.empty() || queue.front().sequence > mark.sequence) return CUMEMPOOL_RESULT_SUCCESS;

    const HostCommand command = queue.front();
    const auto still_mapped = [&](std::vector<HostSegment>* segments) {
      return memory_.resolve(command.address, command.bytes, device_, command.epoch, segments);
    };
    std::vector<HostSegment> segments;
    if (!still_mapped(&segments)) return fail();
    state.unlock();
    const bool moved = execute(command, segments);
    state.lock();
    // Unmapping while the command ran is as wrong as unmapping before.
    if (!moved || !still_mapped(nullptr)) return fail();
    queue.pop_front();
    if (queue.empty() && !stream->second.alive) streams_.erase(stream);
  }
}

// Breaks the device; its unfinished work is gone. Needs execution_ and the state lock.
cumempool_result HostWork::fail() {
  error_ = kIllegalAddress;
  for (auto stream = streams_.begin(); stream != streams_.end();) {
    stream->second.queue.clear();
    stream = stream->second.alive ? std::next(stream) : streams_.erase(stream);
  }
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
