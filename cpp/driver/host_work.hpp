// The deferred work of one device of the host driver: its streams, its events, and the queued
// commands. A command runs only when a thread waits for it.
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

// The caller holds the driver's mutex, except for run and run_all, which lock it themselves. No
// thread holds it while bytes move (R7), or while one device runs work of another for which its own
// work waits. So threads wait for moving bytes only, and never for each other.
class HostWork {
 public:
  using Lock = std::unique_lock<std::mutex>;

  // `mutex` guards all state of the driver. `ran` is notified when a command has run. `devices` has
  // the work of each device, this one included.
  HostWork(int device, std::mutex& mutex, std::condition_variable& ran, const HostMemory& memory,
           const std::vector<std::unique_ptr<HostWork>>& devices);

  // The caller chooses the handles, which are never 0.
  void add_stream(cumempool_stream stream);
  void add_event(cumempool_event event);
  // Queued commands of a destroyed stream still run when a thread waits for them.
  cumempool_result destroy_stream(cumempool_stream stream);
  cumempool_result destroy_event(cumempool_event event);

  // Returns success if the stream takes work.
  cumempool_result check_stream(cumempool_stream stream) const;
  bool has_stream(cumempool_stream stream) const;
  bool capturing(cumempool_stream stream) const;
  bool any_capturing() const;
  bool set_capturing(cumempool_stream stream, bool capturing);

  cumempool_result submit(cumempool_stream stream, const HostCommand& command);
  cumempool_result record(cumempool_event event, cumempool_stream stream);
  // The work recorded in an event; sequence 0 if it was never recorded. Nothing for an event that
  // does not exist or whose context is gone.
  std::optional<HostMark> mark_of(cumempool_event event) const;
  // All work submitted to the stream so far.
  HostMark mark_of_stream(cumempool_stream stream) const { return {device_, stream, sequence_}; }
  // Whether a command of the mark has not run yet.
  bool pending(const HostMark& mark) const;
  // The last unfinished command that uses the host range, if any.
  std::optional<HostMark> last_use(const void* pointer, std::size_t bytes) const;

  // The error that every call for the device returns, or success.
  cumempool_result error() const noexcept { return error_; }
  // The context is gone: none of its streams and events can be used again or be destroyed.
  void lose_context();

  // Runs the commands of the mark, and waits for commands that another thread runs.
  cumempool_result run(const HostMark& mark);
  // Runs all work submitted before the call, on any stream.
  cumempool_result run_all();
  // Runs the next command of the mark, or of the work that it waits for; does nothing if another
  // thread is running it. `lock` holds the driver's mutex; run_one releases it while bytes move.
  cumempool_result run_one(const HostMark& mark, Lock& lock);

  void count(HostDriverCounters& counters) const;

 private:
  struct Stream {
    bool alive = true;  // not destroyed
    bool lost = false;
    bool capturing = false;
    bool running = false;           // a thread is running the front of the queue
    std::deque<HostCommand> queue;  // the front stays until it has run
  };
  using Streams = std::map<cumempool_stream, Stream>;

  bool next_is_running(const HostMark& mark) const;
  cumempool_result run_wait(Streams::iterator stream, Lock& lock);
  cumempool_result run_command(Streams::iterator stream, Lock& lock);
  void pop(Streams::iterator stream, std::uint64_t sequence);
  cumempool_result fail();

  const int device_;
  std::mutex& mutex_;
  std::condition_variable& ran_;
  const HostMemory& memory_;
  const std::vector<std::unique_ptr<HostWork>>& devices_;

  Streams streams_;
  std::map<cumempool_event, std::optional<HostMark>> events_;  // nothing: its context is gone
  std::uint64_t sequence_ = 0;
  cumempool_result error_ = CUMEMPOOL_RESULT_SUCCESS;
};

}  // namespace cumempool::driver
