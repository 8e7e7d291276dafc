// The devices of an allocator: the primary context, the kind of memory, and the private streams
// with their buffers.
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
  // Retains the primary context, and finds by trying what memory the device makes.
  Device(driver::Driver driver, int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int ordinal() const noexcept { return ordinal_; }
  // Frozen at the first allocation, so that all handles are alike (R8).
  const vmm::MemoryKind& kind() const noexcept { return kind_; }
  // NUMA node of the nearest host memory; -1 if not known.
  int numa_node() const noexcept { return numa_node_; }

  // The private streams with their buffers, made at first use. For the transition under way, inside
  // a ContextScope.
  backup::Transfer& transfer(Direction direction);
  backup::DigestBuffer& digests();
  // Digests behind the copies.
  backup::DigestBuffer& rechecks();

  // A transition has failed: its commands may still run.
  void unsettle() noexcept { settled_ = false; }
  // Waits for the commands of a failed transition, if there was one, and forgets them. Runs inside
  // a ContextScope. If this throws Error, it has to be repeated before the streams are used.
  void settle();

  // Gives back the buffers; nothing may be under way. Runs inside a ContextScope. Returns the
  // bytes.
  std::uint64_t release_buffers() noexcept;
  // Pinned bytes of all buffers. Any thread may call this.
  std::uint64_t buffer_bytes() const;
  // Bytes of the bounce buffers, of both directions, that are not made yet.
  std::uint64_t missing_buffer_bytes() const;
  // Destroys the private streams. If this throws Error, they are still there.
  void drop_streams();

 private:
  template <typename Made>
  Made& made(std::unique_ptr<Made>& one);

  driver::Driver driver_;
  int ordinal_;
  driver::RetainedContext context_;
  vmm::MemoryKind kind_;
  int numa_node_;
  mutable std::mutex mutex_;  // guards the four pointers against buffer_bytes()
  std::unique_ptr<backup::Transfer> out_;
  std::unique_ptr<backup::Transfer> in_;
  std::unique_ptr<backup::DigestBuffer> digests_;
  std::unique_ptr<backup::DigestBuffer> rechecks_;
  bool settled_ = true;  // for the transition under way
};

// Thread-safe. A device lives, with its context, as long as somebody holds its pointer, so close()
// takes nothing away from calls in other threads.
class DeviceTable {
 public:
  explicit DeviceTable(driver::Driver driver) : driver_(driver) {}

  // Throws Error (CUMEMPOOL_INVALID_ARGUMENT) for an ordinal that does not exist, and
  // (CUMEMPOOL_CLOSED) after close().
  std::shared_ptr<Device> at(int ordinal);
  // Null if the device was not used so far.
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
