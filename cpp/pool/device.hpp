// What an allocator keeps per device: the primary context, the kind of memory, the private streams
// and the buffers that go with them.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "backup/backup_storage.hpp"
#include "backup/bounce_buffers.hpp"
#include "backup/copy_queue.hpp"
#include "driver/driver.hpp"
#include "vmm/probe.hpp"

namespace cumempool::pool {

enum class Direction { kOut, kIn };

class Device {
 public:
  // Retains the primary context and finds out by trying what memory the device makes.
  Device(driver::Driver driver, int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int ordinal() const noexcept { return ordinal_; }
  // Frozen at the first allocation, so that all handles are alike (R8).
  const vmm::MemoryKind& kind() const noexcept { return kind_; }
  // NUMA node of the nearest host memory; -1 = not known.
  int numa_node() const noexcept { return numa_node_; }

  // The private streams and what belongs to them; made at first use. For the transition under way,
  // inside a ContextScope.
  backup::Transfer& transfer(Direction direction);
  backup::CopyQueue& digest_queue();
  backup::DigestBuffer& digest_buffer();
  // The same for digests behind the copies.
  backup::CopyQueue& recheck_queue();
  backup::DigestBuffer& recheck_buffer();

  // A transition failed: what it has enqueued may still run.
  void unsettle() noexcept { settled_ = false; }
  // Waits for that, and forgets it; no effect where there is none. Inside a ContextScope. Throws
  // Error; then it is still to be done, and the streams take no more.
  void settle();

  // Gives back the buffers; nothing is under way. Inside a ContextScope. Returns the bytes.
  std::uint64_t release_buffers() noexcept;
  // Pinned bytes of the buffers; from any thread.
  std::uint64_t staging_bytes() const;
  // What the buffers will take that copies out of the device and back go through, and that are not
  // there yet.
  std::uint64_t staging_missing() const;
  // Destroys the private streams. Throws Error; then they are still there.
  void drop_streams();

 private:
  struct Digests {
    Digests(driver::Driver driver, int device) : queue(driver, device), board(driver, queue) {}
    backup::CopyQueue queue;
    backup::DigestBuffer board;
  };

  template <typename Made>
  Made& made(std::unique_ptr<Made>& one);

  driver::Driver driver_;
  int ordinal_;
  driver::RetainedContext context_;
  vmm::MemoryKind kind_;
  int numa_node_;
  mutable std::mutex mutex_;  // guards the pointers below against staging_bytes()
  std::unique_ptr<backup::Transfer> out_;
  std::unique_ptr<backup::Transfer> in_;
  std::unique_ptr<Digests> digests_;
  std::unique_ptr<Digests> rechecks_;
  bool settled_ = true;  // for the transition under way
};

// Thread-safe. A device lives, with its context, as long as somebody holds on to it, so that
// closing takes nothing away from a call in another thread.
class DeviceTable {
 public:
  explicit DeviceTable(driver::Driver driver) : driver_(driver) {}

  // Throws Error (CUMEMPOOL_INVALID_ARGUMENT) for an ordinal that does not exist, and
  // (CUMEMPOOL_CLOSED) after close().
  std::shared_ptr<Device> at(int ordinal);
  // Null where it was not used so far.
  std::shared_ptr<Device> find(int ordinal) const;
  // The devices used so far.
  std::vector<std::shared_ptr<Device>> used() const;
  void close();

 private:
  driver::Driver driver_;
  mutable std::mutex mutex_;
  std::map<int, std::shared_ptr<Device>> devices_;
  bool closed_ = false;
};

}  // namespace cumempool::pool
