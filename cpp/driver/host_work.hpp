// The deferred work of one device of the host driver: streams, events and the commands queued on
// them, which run only when somebody waits for them.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "cumempool/driver.h"
#include "driver/host_command.hpp"
#include "driver/host_driver.hpp"
#include "driver/host_memory.hpp"

namespace cumempool::driver {

// Guards all state of a host driver.
struct HostState {
  std::mutex mutex;
  std::condition_variable ran;  // a command has run
};

// Every function needs the driver's state locked, but run and run_all, which lock it themselves.
// Nothing is locked while bytes move (R7), nor while one device runs work of another that its own
// waits for. So no two threads can wait for each other: who waits, waits for moving bytes only.
class HostWork {
 public:
  using Lock = std::unique_lock<std::mutex>;

  // `devices` are the work of each device, this one included.
  HostWork(int device, HostState& state, const HostMemory& memory,
           const std::vector<std::unique_ptr<HostWork>>& devices);

  // Handles come from the caller, and are never 0.
  void add_stream(cumempool_stream stream);
  void add_event(cumempool_event event);
  // Queued commands of a destroyed stream still run, when somebody waits for them.
  cumempool_result destroy_stream(cumempool_stream stream);
  cumempool_result destroy_event(cumempool_event event);

  // Success where the stream takes work.
  cumempool_result check_stream(cumempool_stream stream) const;
  bool has_stream(cumempool_stream stream) const;
  bool capturing(cumempool_stream stream) const;
  bool any_capturing() const;
  bool set_capturing(cumempool_stream stream, bool capturing);

  cumempool_result submit(cumempool_stream stream, const HostCommand& command);
  cumempool_result record(cumempool_event event, cumempool_stream stream);
  // Where an event stands; sequence 0 where it was never recorded.
  std::optional<HostMark> mark_of(cumempool_event event) const;
  // All that was submitted to the stream so far.
  HostMark mark_of_stream(cumempool_stream stream) const { return {device_, stream, sequence_}; }
  // Whether a command of the mark has not run yet.
  bool pending(const HostMark& mark) const;
  // The last unfinished command that uses the host range, if one does.
  std::optional<HostMark> last_use(const void* pointer, std::size_t bytes) const;

  // The error that every call for the device returns, or success.
  cumempool_result error() const noexcept { return error_; }
  // The context is gone: no stream or event of it can be used again, or be destroyed.
  void lose_context();

  // Runs the commands of the mark, and waits for those that another thread runs.
  cumempool_result run(const HostMark& mark);
  // Runs what was submitted on any stream before the call.
  cumempool_result run_all();
  // Runs the next command of the mark, or of what that one waits for; nothing where another thread
  // is running it. `lock` is on the state, and given up while bytes move.
  cumempool_result run_one(const HostMark& mark, Lock& lock);

  void count(HostDriverCounters& counters) const;

 private:
  struct Stream {
    bool alive = true;  // not destroyed
    bool lost = false;
    bool capturing = false;
    bool running = false;           // the front of the queue, by some thread
    std::deque<HostCommand> queue;  // the front stays until it has run
  };
  using Streams = std::map<cumempool_stream, Stream>;
  struct Event {
    bool lost = false;
    HostMark mark{};
  };

  bool next_is_running(const HostMark& mark) const;
  cumempool_result run_wait(Streams::iterator stream, Lock& lock);
  cumempool_result run_command(Streams::iterator stream, Lock& lock);
  void pop(Streams::iterator stream, std::uint64_t sequence);
  cumempool_result fail();

  const int device_;
  HostState& state_;
  const HostMemory& memory_;
  const std::vector<std::unique_ptr<HostWork>>& devices_;

  Streams streams_;
  std::map<cumempool_event, Event> events_;
  std::uint64_t sequence_ = 0;
  cumempool_result error_ = CUMEMPOOL_RESULT_SUCCESS;
};

}  // namespace cumempool::driver
