// The deferred work of one device of the host driver: streams, events and the commands queued on
// them, which run only when somebody waits for them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "cumempool/driver.h"
#include "driver/host_driver.hpp"
#include "driver/host_memory.hpp"

namespace cumempool::driver {

struct HostCommand {
  enum class Kind { kCopyToHost, kCopyToDevice, kFill };
  Kind kind;
  cumempool_address address;
  const void* host;  // null for a fill
  std::uint8_t byte;
  std::size_t bytes;
  std::uint64_t epoch;     // the mappings that it was submitted for; HostMemory::resolve
  std::uint64_t sequence;  // set by submit
};

// A place in a stream: its commands up to and including `sequence`.
struct HostMark {
  cumempool_stream stream;
  std::uint64_t sequence;
};

// Every function but run and run_all needs the driver's state lock; those two take it themselves,
// and give it up while bytes move (R7).
class HostWork {
 public:
  HostWork(int device, std::mutex& state, const HostMemory& memory);

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
  bool set_capturing(cumempool_stream stream, bool capturing);

  cumempool_result submit(cumempool_stream stream, HostCommand command);
  cumempool_result record(cumempool_event event, cumempool_stream stream);
  // Where an event stands; sequence 0 where it was never recorded.
  std::optional<HostMark> mark_of(cumempool_event event) const;
  // All that was submitted to the stream so far.
  HostMark mark_of_stream(cumempool_stream stream) const { return {stream, sequence_}; }
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

  void count(HostDriverCounters& counters) const;

 private:
  struct Stream {
    bool alive = true;  // not destroyed
    bool lost = false;
    bool capturing = false;
    std::deque<HostCommand> queue;  // the front stays until it has run
  };
  struct Event {
    bool lost = false;
    HostMark mark{0, 0};
  };

  cumempool_result run_in_order(const HostMark& mark);
  cumempool_result fail();

  const int device_;
  std::mutex& state_;
  const HostMemory& memory_;
  std::mutex execution_;  // one thread runs commands; taken before state_

  std::map<cumempool_stream, Stream> streams_;
  std::map<cumempool_event, Event> events_;
  std::uint64_t sequence_ = 0;
  cumempool_result error_ = CUMEMPOOL_RESULT_SUCCESS;
};

}  // namespace cumempool::driver
