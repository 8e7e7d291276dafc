// A wake in a thread of its own: allocations are ready one after another, and streams can wait for
// each of them.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "pool/wake.hpp"

namespace cumempool::pool {

// Thread-safe.
class Waking {
 public:
  // Returns when it is known that there is room for all of it. Throws Error; then nothing has
  // changed.
  Waking(std::shared_ptr<Allocator> allocator, WakeRequest request);
  // Waits for the end.
  ~Waking();
  Waking(const Waking&) = delete;
  Waking& operator=(const Waking&) = delete;

  // Makes later work of a stream, of any device with an active context, wait until the allocation
  // at `address` has its contents; returns as soon as that is arranged. Throws Error: of the wake,
  // where it failed.
  void wait(cumempool_address address, const cumempool_device_stream& stream);
  // Whether it has ended, well or not.
  bool done() const;
  // Waits for the end. Throws Error where it failed; returns the report, the first time.
  std::optional<Report> finish();

 private:
  // When an allocation has its contents.
  struct Ready {
    int device = 0;
    cumempool_event event = 0;  // behind its copies, once they are in the queue
    bool queued = false;
  };

  void run();
  void note_planned(const std::vector<RecordPointer>& records);
  void note_queued(const Record& record, backup::CopyQueue& queue);
  void withdraw();
  void hold_context(int device);
  void wait_for_event(const cumempool_device_stream& stream, cumempool_event event);
  void destroy_events() noexcept;
  void throw_failure() const;
  void throw_failure_locked() const;

  const std::shared_ptr<Allocator> allocator_;
  WakeRequest request_;

  mutable std::mutex mutex_;  // guards everything below but the thread
  std::condition_variable changed_;
  bool planned_ = false;
  bool ended_ = false;
  bool withdrawn_ = false;  // it fails: nothing is handed out any more
  int handing_out_ = 0;     // calls of wait() that have seen that it does not
  std::map<const Record*, Ready> ready_;
  std::vector<std::shared_ptr<Device>> devices_;  // of the events
  // Contexts of other devices whose streams wait, until the end.
  std::map<int, std::unique_ptr<driver::RetainedContext>> contexts_;
  std::exception_ptr failure_;
  std::optional<Report> report_;
  std::thread thread_;
};

}  // namespace cumempool::pool
