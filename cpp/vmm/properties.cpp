// Which properties a device's memory can really have: found by creating and exporting a granule.
#include "vmm/properties.hpp"

#include <unistd.h>

#include <array>
#include <optional>

#include "vmm/ledger.hpp"
#include "vmm/physical_memory.hpp"

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
  const std::size_t granularity = driver.granularity(&properties);
  Ledger ledger;
  const PhysicalMemory granule(driver, ledger, properties, granularity);
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

}  // namespace cumempool::vmm
