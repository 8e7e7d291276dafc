// Tries a device's memory for real.
#include "vmm/probe.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <optional>

#include "vmm/allocation.hpp"

namespace cumempool::vmm {
namespace {

// Physical memory without an address.
class Granule {
 public:
  Granule(driver::Driver driver, std::size_t bytes, const cumempool_memory_properties& properties)
      : driver_(driver), handle_(driver.create(bytes, &properties)) {}
  ~Granule() { driver_.table().release(driver_.table().self, handle_); }
  Granule(const Granule&) = delete;
  Granule& operator=(const Granule&) = delete;

  cumempool_physical handle() const noexcept { return handle_; }

 private:
  driver::Driver driver_;
  cumempool_physical handle_;
};

void try_export(driver::Driver driver, int device, cumempool_physical memory, std::uint32_t type) {
  const auto& table = driver.table();
  if (type == CUMEMPOOL_HANDLE_POSIX_FD) {
    int fd = -1;
    driver::check(table, "export_handle", table.export_handle(table.self, memory, type, &fd),
                  device);
    ::close(fd);
    return;
  }
  std::array<unsigned char, CUMEMPOOL_FABRIC_HANDLE_BYTES> exported{};
  driver::check(table, "export_handle",
                table.export_handle(table.self, memory, type, exported.data()), device);
}

MemoryKind try_kind(driver::Driver driver, const cumempool_memory_properties& properties) {
  const std::size_t granularity = driver.granularity(&properties);
  const Granule granule(driver, granularity, properties);
  for (const std::uint32_t type : {CUMEMPOOL_HANDLE_POSIX_FD, CUMEMPOOL_HANDLE_FABRIC}) {
    if ((properties.handle_types & type) != 0) {
      try_export(driver, properties.device, granule.handle(), type);
    }
  }
  return {properties, granularity};
}

}  // namespace

MemoryKind choose_memory_kind(driver::Driver driver, int device) {
  constexpr std::uint32_t kBoth = CUMEMPOOL_HANDLE_POSIX_FD | CUMEMPOOL_HANDLE_FABRIC;
  std::optional<Error> last;
  for (const std::uint32_t types : {kBoth, std::uint32_t{CUMEMPOOL_HANDLE_POSIX_FD}, 0U}) {
    for (const std::uint32_t rdma : {1U, 0U}) {
      try {
        return try_kind(driver, {device, types, rdma, 0});
      } catch (const Error& error) {
        // A full device says nothing about properties: freezing a lesser kind now would be wrong.
        if (error.status == CUMEMPOOL_OUT_OF_MEMORY) throw;
        last = error;
      }
    }
  }
  throw *last;
}

namespace {

constexpr unsigned char kPattern = 0xA5;

// One page of host memory for the copy back, pinned where the driver pins any.
class HostPage {
 public:
  HostPage(driver::Driver driver, int device)
      : driver_(driver), device_(device), bytes_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
    void* page = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) throw Error(CUMEMPOOL_OUT_OF_HOST_MEMORY, "mmap of one page failed");
    page_ = static_cast<unsigned char*>(page);
    try {
      pinned_ = driver_.pin(device_, page_, bytes_);
    } catch (const Error&) {
      munmap(page_, bytes_);
      throw;
    }
  }
  ~HostPage() {
    const auto& table = driver_.table();
    if (!pinned_ || table.host_unregister(table.self, device_, page_) == CUMEMPOOL_RESULT_SUCCESS) {
      munmap(page_, bytes_);
    }
  }
  HostPage(const HostPage&) = delete;
  HostPage& operator=(const HostPage&) = delete;

  bool pinned() const noexcept { return pinned_; }

  unsigned char* data() const noexcept { return page_; }
  std::size_t bytes() const noexcept { return bytes_; }

 private:
  driver::Driver driver_;
  int device_;
  std::size_t bytes_;
  unsigned char* page_ = nullptr;
  bool pinned_ = false;
};

// Work on the legacy default stream would break captures on the streams that wait for it (C4).
class PrivateStream {
 public:
  PrivateStream(driver::Driver driver, int device)
      : driver_(driver), device_(device), stream_(driver.stream_create(device)) {}
  ~PrivateStream() {
    const auto& table = driver_.table();
    table.stream_destroy(table.self, device_, stream_);
  }
  PrivateStream(const PrivateStream&) = delete;
  PrivateStream& operator=(const PrivateStream&) = delete;

  cumempool_stream get() const noexcept { return stream_; }

 private:
  driver::Driver driver_;
  int device_;
  cumempool_stream stream_;
};

// Returns whether the host memory was pinned.
bool write_and_read_back(driver::Driver driver, int device, const MemoryKind& kind) {
  MemoryStats stats;
  Allocation granule(driver, stats, kind.properties, kind.granularity);
  granule.map();
  const HostPage page(driver, device);
  const PrivateStream stream(driver, device);
  const std::size_t bytes = std::min(page.bytes(), granule.bytes());
  driver.fill(device, granule.address(), kPattern, bytes, stream.get());
  driver.copy_to_host(device, page.data(), granule.address(), bytes, stream.get());
  driver.stream_synchronize(device, stream.get());
  driver.fence({device});
  if (!std::all_of(page.data(), page.data() + bytes, [](auto byte) { return byte == kPattern; })) {
    throw Error(CUMEMPOOL_DRIVER_ERROR, "memory read back does not hold what was written");
  }
  return page.pinned();
}

void read_attributes(driver::Driver driver, int device, cumempool_device_probe& probe) {
  std::snprintf(probe.name, sizeof probe.name, "%s", driver.device_name(device).c_str());
  const auto attribute = [&](cumempool_device_attribute which) {
    return driver.device_attribute(device, which);
  };
  probe.compute_capability = attribute(CUMEMPOOL_ATTRIBUTE_COMPUTE_MAJOR) * 10 +
                             attribute(CUMEMPOOL_ATTRIBUTE_COMPUTE_MINOR);
  probe.virtual_memory = attribute(CUMEMPOOL_ATTRIBUTE_VIRTUAL_MEMORY);
  probe.rdma_claimed = attribute(CUMEMPOOL_ATTRIBUTE_RDMA);
  if (attribute(CUMEMPOOL_ATTRIBUTE_POSIX_FD) != 0) {
    probe.handle_types_claimed |= CUMEMPOOL_HANDLE_POSIX_FD;
  }
  if (attribute(CUMEMPOOL_ATTRIBUTE_FABRIC) != 0) {
    probe.handle_types_claimed |= CUMEMPOOL_HANDLE_FABRIC;
  }
}

void try_device(driver::Driver driver, int device, cumempool_device_probe& probe) {
  const driver::RetainedContext retained(driver, device);
  const driver::ContextScope scope(driver, device);
  driver.memory_info(device, &probe.free_bytes, &probe.total_bytes);
  const MemoryKind kind = choose_memory_kind(driver, device);
  probe.handle_types = kind.properties.handle_types;
  probe.granularity = kind.granularity;
  probe.rdma = static_cast<int>(kind.properties.rdma);
  probe.pins_host_memory = write_and_read_back(driver, device, kind) ? 1 : 0;
  probe.usable = 1;
}

}  // namespace

void probe_device(driver::Driver driver, int device, cumempool_device_probe& probe) {
  const std::uint32_t size = probe.size;
  probe = {};
  probe.size = size;
  read_attributes(driver, device, probe);
  if (probe.virtual_memory == 0) {
    std::snprintf(probe.reason, sizeof probe.reason,
                  "the device does not support virtual memory management");
    return;
  }
  try {
    try_device(driver, device, probe);
  } catch (const Error& error) {
    std::snprintf(probe.reason, sizeof probe.reason, "%s", error.message().c_str());
  }
  probe.fence = driver.device_attribute(device, CUMEMPOOL_ATTRIBUTE_FENCE);
}

}  // namespace cumempool::vmm
