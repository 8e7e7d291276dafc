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
  try {
    drop_queue();
  } catch (const Error&) {
    // The context is gone, and its streams with it: what is left is host memory of the queue.
    queue_.reset();
  }
}

backup::CopyQueue& Device::queue() {
  if (queue_ == nullptr) queue_ = std::make_unique<backup::CopyQueue>(driver_, ordinal_);
  return *queue_;
}

void Device::drop_queue() {
  if (queue_ == nullptr) return;
  const driver::ContextScope scope(driver_, ordinal_);
  queue_.reset();
}

std::shared_ptr<Device> DeviceTable::at(int ordinal) {
  const std::lock_guard lock(mutex_);
  if (closed_) throw Error(CUMEMPOOL_CLOSED, "the allocator is closed");
  std::shared_ptr<Device>& device = devices_[ordinal];
  if (device != nullptr) return device;
  try {
    const int count = driver_.device_count();
    if (ordinal < 0 || ordinal >= count) {
      Error error(CUMEMPOOL_INVALID_ARGUMENT, "there is no device " + std::to_string(ordinal));
      error.device = ordinal;
      error.advice = "the driver has " + std::to_string(count) + " device(s), counted from 0";
      throw error;
    }
    device = std::make_shared<Device>(driver_, ordinal);
    return device;
  } catch (const Error&) {
    devices_.erase(ordinal);
    throw;
  }
}

std::shared_ptr<Device> DeviceTable::find(int ordinal) const {
  const std::lock_guard lock(mutex_);
  const auto found = devices_.find(ordinal);
  return found == devices_.end() ? nullptr : found->second;
}

std::vector<std::shared_ptr<Device>> DeviceTable::used() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<Device>> devices;
  devices.reserve(devices_.size());
  for (const auto& entry : devices_) {
    if (entry.second != nullptr) devices.push_back(entry.second);
  }
  return devices;
}

void DeviceTable::close() {
  std::map<int, std::shared_ptr<Device>> devices;
  const std::lock_guard lock(mutex_);
  closed_ = true;
  devices.swap(devices_);
}

}  // namespace cumempool::pool
