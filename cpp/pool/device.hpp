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

 private:
  driver::Driver driver_;
  int ordinal_;
  driver::RetainedContext context_;
  vmm::MemoryKind kind_;
  std::unique_ptr<backup::CopyQueue> queue_;
};

// Thread-safe.
class DeviceTable {
 public:
  explicit DeviceTable(driver::Driver driver) : driver_(driver) {}

  // Throws Error (CUMEMPOOL_INVALID_ARGUMENT) for an ordinal that does not exist.
  Device& at(int ordinal);
  // The devices used so far.
  std::vector<Device*> used() const;
  void clear();

 private:
  driver::Driver driver_;
  mutable std::mutex mutex_;
  std::map<int, std::unique_ptr<Device>> devices_;
};

}  // namespace cumempool::pool
