// The devices of an allocator.
#include "pool/device.hpp"

#include <string>
#include <utility>

namespace cumempool::pool {

Device::Device(driver::Driver driver, int ordinal)
    : driver_(driver),
      ordinal_(ordinal),
      context_(driver, ordinal),
      kind_(vmm::choose_memory_kind(driver, ordinal)),
      numa_node_(driver.device_attribute(ordinal, CUMEMPOOL_ATTRIBUTE_HOST_NUMA)) {}

Device::~Device() {
  try {
    drop_streams();
  } catch (const Error&) {
    // The context is gone, and its streams with it. Only host memory is left, which goes now.
    return;
  }
}

template <typename Made>
Made& Device::made(std::unique_ptr<Made>& one) {
  if (one == nullptr) {
    auto made = std::make_unique<Made>(driver_, ordinal_);
    const std::lock_guard lock(mutex_);
    one = std::move(made);
  }
  return *one;
}

backup::Transfer& Device::transfer(Direction direction) {
  return made(direction == Direction::kOut ? out_ : in_);
}

backup::DigestBuffer& Device::digests() { return made(digests_); }

backup::DigestBuffer& Device::rechecks() { return made(rechecks_); }

void Device::settle() {
  if (settled_) return;
  for (backup::Transfer* transfer : {out_.get(), in_.get()}) {
    if (transfer == nullptr) continue;
    transfer->bounce_buffers.abandon();
    transfer->queue.drain();
  }
  for (backup::DigestBuffer* digests : {digests_.get(), rechecks_.get()}) {
    if (digests != nullptr) digests->queue().drain();
  }
  settled_ = true;
}

std::uint64_t Device::release_buffers() noexcept {
  std::uint64_t bytes = 0;
  for (backup::Transfer* transfer : {out_.get(), in_.get()})
    bytes += transfer == nullptr ? 0 : transfer->bounce_buffers.release();
  for (backup::DigestBuffer* digests : {digests_.get(), rechecks_.get()}) {
    bytes += digests == nullptr ? 0 : digests->release();
  }
  return bytes;
}

std::uint64_t Device::buffer_bytes() const {
  const std::lock_guard lock(mutex_);
  std::uint64_t bytes = 0;
  for (const backup::Transfer* transfer : {out_.get(), in_.get()}) {
    bytes += transfer == nullptr ? 0 : transfer->bounce_buffers.bytes();
  }
  for (const backup::DigestBuffer* digests : {digests_.get(), rechecks_.get()}) {
    bytes += digests == nullptr ? 0 : digests->bytes();
  }
  return bytes;
}

std::uint64_t Device::missing_buffer_bytes() const {
  const std::lock_guard lock(mutex_);
  std::uint64_t bytes = 0;
  for (const backup::Transfer* transfer : {out_.get(), in_.get()}) {
    const bool there = transfer != nullptr && transfer->bounce_buffers.bytes() != 0;
    bytes += there ? 0 : backup::BounceBuffers::kAllBytes;
  }
  return bytes;
}

void Device::drop_streams() {
  if (out_ == nullptr && in_ == nullptr && digests_ == nullptr && rechecks_ == nullptr) return;
  const driver::ContextScope scope(driver_, ordinal_);
  release_buffers();
  if (buffer_bytes() != 0) {
    throw Error(CUMEMPOOL_DRIVER_ERROR, "bounce buffers or digest buffers could not be unpinned");
  }
  const std::lock_guard lock(mutex_);
  digests_.reset();
  rechecks_.reset();
  in_.reset();
  out_.reset();
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
