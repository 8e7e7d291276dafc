// What an allocator keeps per device: the primary context, the kind of memory, the private stream.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "backup/copy_queue.hpp"
#include "driver/driver.hpp"
#include "vmm/properties.hpp"

namespace cumempool::pool {

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
  // The private stream; made at first use. For the transition under way, inside a ContextScope.
  backup::CopyQueue& queue();
  // Destroys the private stream. Throws Error; then it is still there.
  void drop_queue();

 private:
  driver::Driver driver_;
  int ordinal_;
  driver::RetainedContext context_;
  vmm::MemoryKind kind_;
  std::unique_ptr<backup::CopyQueue> queue_;
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
