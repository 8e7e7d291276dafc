// Where a failure sweep takes place: on small simulated devices of the host driver, each world on
// fresh ones, or on the GPUs of the machine, of which it uses a small part.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "conformance_fixture.hpp"
#include "driver/builtin.hpp"
#include "host_fixture.hpp"

namespace cumempool::tests {

using Bytes = std::vector<std::uint8_t>;

// A driver, and how its device memory is written and read.
class Machine {
 public:
  Machine() = default;
  Machine(const Machine&) = delete;
  Machine(Machine&&) = delete;
  Machine& operator=(const Machine&) = delete;
  Machine& operator=(Machine&&) = delete;
  virtual ~Machine() = default;

  virtual const cumempool_driver& table() const = 0;
  virtual void write(int device, cumempool_address address, const Bytes& bytes) const = 0;
  virtual Bytes read(int device, cumempool_address address, std::size_t bytes) const = 0;
};

class Site {
 public:
  Site() = default;
  Site(const Site&) = delete;
  Site(Site&&) = delete;
  Site& operator=(const Site&) = delete;
  Site& operator=(Site&&) = delete;
  virtual ~Site() = default;

  virtual std::size_t page() const = 0;   // the granularity
  virtual std::size_t pages() const = 0;  // of each device
  virtual int devices() const = 0;
  virtual std::unique_ptr<Machine> open() const = 0;
};

// ---- host --------------------------------------------------------------------------------------

class HostMachine : public Machine {
 public:
  HostMachine(std::size_t pages, int devices, std::size_t page) : host_(pages, devices, page) {}

  const cumempool_driver& table() const override { return host_.table(); }
  void write(int /*device*/, cumempool_address address, const Bytes& bytes) const override {
    std::memcpy(bytes_at(address), bytes.data(), bytes.size());
  }
  Bytes read(int /*device*/, cumempool_address address, std::size_t bytes) const override {
    return {bytes_at(address), bytes_at(address) + bytes};
  }

 private:
  Host host_;
};

// Small pages, for there are thousands of worlds.
class HostSite : public Site {
 public:
  explicit HostSite(int devices = 3) : devices_(devices) {}

  std::size_t page() const override { return 4096; }
  std::size_t pages() const override { return 64; }
  int devices() const override { return devices_; }
  std::unique_ptr<Machine> open() const override {
    return std::make_unique<HostMachine>(pages(), devices_, page());
  }

 private:
  int devices_;
};

// ---- cuda --------------------------------------------------------------------------------------

class CudaMachine : public Machine {
 public:
  CudaMachine(const cumempool_driver& table, const conformance::HostBuffer& staging,
              std::size_t staging_bytes)
      : table_(table), staging_(staging), staging_bytes_(staging_bytes) {}

  const cumempool_driver& table() const override { return table_; }
  void write(int device, cumempool_address address, const Bytes& bytes) const override {
    const conformance::Inside inside(table_, device);
    in_pieces(bytes.size(), [&](std::size_t at, std::size_t count) {
      std::memcpy(staging_.data(), bytes.data() + at, count);
      conformance::must(CALL(table_, copy_to_device, device, address + at, staging_.data(), count,
                             cumempool_stream{0}),
                        "copy_to_device");
      wait(device);
    });
  }
  Bytes read(int device, cumempool_address address, std::size_t bytes) const override {
    const conformance::Inside inside(table_, device);
    Bytes read(bytes);
    in_pieces(bytes, [&](std::size_t at, std::size_t count) {
      conformance::must(CALL(table_, copy_to_host, device, staging_.data(), address + at, count,
                             cumempool_stream{0}),
                        "copy_to_host");
      wait(device);
      std::memcpy(read.data() + at, staging_.data(), count);
    });
    return read;
  }

 private:
  template <typename Step>
  void in_pieces(std::size_t bytes, const Step& step) const {
    for (std::size_t at = 0; at < bytes; at += staging_bytes_) {
      step(at, std::min(staging_bytes_, bytes - at));
    }
  }
  void wait(int device) const {
    conformance::must(CALL(table_, stream_synchronize, device, cumempool_stream{0}),
                      "stream_synchronize");
  }

  const cumempool_driver& table_;
  const conformance::HostBuffer& staging_;
  std::size_t staging_bytes_;
};

// Holds the contexts of the devices, as a program does: making one takes longer than a whole world.
class CudaSite : public Site {
 public:
  CudaSite() : table_(driver::cuda_driver()) {
    conformance::must(table_.init(table_.self), "init");
    int count = 0;
    conformance::must(CALL(table_, device_count, &count), "device_count");
    devices_ = std::min(count, 3);
    for (; retained_ < devices_; ++retained_) {
      conformance::must(CALL(table_, context_retain, retained_), "context_retain");
    }
    cumempool_memory_properties properties{};
    properties.handle_types = CUMEMPOOL_HANDLE_POSIX_FD;
    properties.rdma = 1;
    if (CALL(table_, granularity, &properties, &page_) != CUMEMPOOL_RESULT_SUCCESS) {
      properties = {};
      conformance::must(CALL(table_, granularity, &properties, &page_), "granularity");
    }
    const conformance::Inside inside(table_);
    staging_ = std::make_unique<conformance::HostBuffer>(table_, kStagingBytes);
  }
  ~CudaSite() override {
    if (staging_ != nullptr) {
      const conformance::Inside inside(table_);
      staging_.reset();
    }
    for (int device = 0; device < retained_; ++device) CALL(table_, context_release, device);
  }
  CudaSite(const CudaSite&) = delete;
  CudaSite(CudaSite&&) = delete;
  CudaSite& operator=(const CudaSite&) = delete;
  CudaSite& operator=(CudaSite&&) = delete;

  std::size_t page() const override { return page_; }
  std::size_t pages() const override { return 40; }
  int devices() const override { return devices_; }
  std::unique_ptr<Machine> open() const override {
    return std::make_unique<CudaMachine>(table_, *staging_, kStagingBytes);
  }

 private:
  static constexpr std::size_t kStagingBytes = std::size_t{8} << 20;

  const cumempool_driver& table_;
  int devices_ = 0;
  int retained_ = 0;
  std::size_t page_ = 0;
  std::unique_ptr<conformance::HostBuffer> staging_;
};

}  // namespace cumempool::tests
