// Finds out what a device's memory can do by trying.
#include "vmm/probe.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <optional>

#include "driver/scope_exit.hpp"
#include "vmm/allocation.hpp"

namespace cumempool::vmm {
namespace {

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
  const auto& table = driver.table();
  const std::size_t granularity = driver.granularity(&properties);
  const cumempool_physical granule = driver.create(granularity, &properties);
  const driver::ScopeExit release([&] { table.release(table.self, granule); });
  for (const std::uint32_t type : {CUMEMPOOL_HANDLE_POSIX_FD, CUMEMPOOL_HANDLE_FABRIC}) {
    if ((properties.handle_types & type) != 0) {
      try_export(driver, properties.device, granule, type);
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
        // A full device refuses every kind: choosing a lesser one now would freeze it wrongly.
        if (error.status == CUMEMPOOL_OUT_OF_MEMORY) throw;
        last = error;
      }
    }
  }
  throw *last;
}

namespace {

constexpr unsigned char kPattern = 0xA5;

// Fills one page of a granule and copies it back to `page`. Uses a stream of its own: work on the
// legacy default stream would break captures on the streams that wait for it (C4).
void fill_and_copy_back(driver::Driver driver, int device, const Allocation& granule,
                        unsigned char* page, std::size_t bytes) {
  const auto& table = driver.table();
  const cumempool_stream stream = driver.stream_create(device);
  const driver::ScopeExit destroy([&] { table.stream_destroy(table.self, device, stream); });
  driver.fill(device, granule.address(), kPattern, bytes, stream);
  driver.copy_to_host(device, page, granule.address(), bytes, stream);
  driver.stream_synchronize(device, stream);
  driver.fence({device});
}

// Returns whether the driver pins host memory.
bool write_and_read_back(driver::Driver driver, int device, const MemoryKind& kind) {
  MemoryStats stats;
  Allocation granule(driver, stats, kind.properties, kind.granularity);
  granule.map();
  const auto page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* const mapped =
      mmap(nullptr, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw Error(CUMEMPOOL_OUT_OF_HOST_MEMORY, "mmap of one page failed");
  auto* const page = static_cast<unsigned char*>(mapped);
  bool pinned = false;
  const driver::ScopeExit unmap([&] {  // a page that stays pinned stays mapped
    const auto& table = driver.table();
    const bool free = !pinned || table.host_unregister(table.self, device, page) == 0;
    if (free) munmap(page, page_bytes);
  });
  pinned = driver.pin(device, page, page_bytes);
  const std::size_t bytes = std::min(page_bytes, granule.bytes());
  fill_and_copy_back(driver, device, granule, page, bytes);
  if (!std::all_of(page, page + bytes, [](auto byte) { return byte == kPattern; })) {
    throw Error(CUMEMPOOL_DRIVER_ERROR, "memory that was read back differs from the bytes written");
  }
  return pinned;
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
