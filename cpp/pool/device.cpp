// What an allocator keeps per device: the primary context, the kind of memory, the private stream.
#include "pool/device.hpp"

#include <string>

namespace cumempool::pool {

Device::Device(driver::Driver driver, int ordinal)
    : driver_(driver),
      ordinal_(ordinal),
      context_(driver, ordinal),
      kind_(vmm::choose_memory_kind(driver, ordinal)) {}

Device::~Device() {
  if (queue_ == nullptr) return;
  try {
    const driver::ContextScope scope(driver_, ordinal_);
    queue_.reset();
  } catch (const Error&) {
    // The context is gone, and its streams with it: what is left is host memory of the queue.
    queue_.reset();
  }
}

backup::CopyQueue& Device::queue() {
  if (queue_ == nullptr) queue_ = std::make_unique<backup::CopyQueue>(driver_, ordinal_);
  return *queue_;
}

Device& DeviceTable::at(int ordinal) {
  const std::lock_guard lock(mutex_);
  std::unique_ptr<Device>& device = devices_[ordinal];
  if (device != nullptr) return *device;
  try {
    const int count = driver_.device_count();
    if (ordinal < 0 || ordinal >= count) {
      Error error(CUMEMPOOL_INVALID_ARGUMENT, "there is no device " + std::to_string(ordinal));
      error.device = ordinal;
      error.advice = "the driver has " + std::to_string(count) + " device(s), counted from 0";
      throw error;
    }
    device = std::make_unique<Device>(driver_, ordinal);
    return *device;
  } catch (const Error&) {
    devices_.erase(ordinal);
    throw;
  }
}

std::vector<Device*> DeviceTable::used() const {
  const std::lock_guard lock(mutex_);
  std::vector<Device*> devices;
  devices.reserve(devices_.size());
  for (const auto& entry : devices_) {
    if (entry.second != nullptr) devices.push_back(entry.second.get());
  }
  return devices;
}

void DeviceTable::clear() {
  const std::lock_guard lock(mutex_);
  devices_.clear();
}

}  // namespace cumempool::pool
