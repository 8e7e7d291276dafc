// Device memory of the host driver: address ranges, physical memory within a budget, mappings, and
// allocations that are all three in one, made of mmap and memfd. Not thread-safe; the driver locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "cumempool/cumempool.h"
#include "cumempool/driver.h"
#include "driver/host_driver.hpp"

namespace cumempool::driver {

// An open file descriptor, closed with its owner.
class Descriptor {
 public:
  explicit Descriptor(int number) noexcept : number_(number) {}
  ~Descriptor();
  Descriptor(Descriptor&& other) noexcept : number_(other.number_) { other.number_ = -1; }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  Descriptor& operator=(Descriptor&&) = delete;

  int get() const noexcept { return number_; }

 private:
  int number_;
};

// A memfd. Its bytes are charged to a device from create until its last handle, mapping and
// exported descriptor are gone.
struct HostPhysical {
  Descriptor descriptor;
  std::size_t bytes;
  int device;  // -1: imported from elsewhere, charged there
  std::uint32_t handle_types;
  std::uint64_t handles = 0;
  std::uint64_t mappings = 0;
  std::vector<int> exported;  // descriptor numbers that this process was given
  bool charged = false;

  HostPhysical(Descriptor file, std::size_t size, int owner, std::uint32_t types)
      : descriptor(std::move(file)), bytes(size), device(owner), handle_types(types) {}
};

// A part of physical memory; keeps it alive.
struct HostSegment {
  std::shared_ptr<const HostPhysical> memory;
  std::size_t offset;
  std::size_t bytes;
};

// Who uses device memory, and how: by mappings made no later than `epoch`.
struct HostAccess {
  int device;
  std::uint64_t epoch;
  cumempool_access kind;
};

class HostMemory {
 public:
  explicit HostMemory(const cumempool_host_driver_options& options);
  ~HostMemory();
  HostMemory(const HostMemory&) = delete;
  HostMemory(HostMemory&&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  HostMemory& operator=(HostMemory&&) = delete;

  // The entries of the table of the same name.
  cumempool_result granularity(const cumempool_memory_properties* properties, std::size_t* bytes);
  cumempool_result reserve(std::size_t bytes, cumempool_address* address);
  cumempool_result unreserve(cumempool_address address, std::size_t bytes);
  cumempool_result create(std::size_t bytes, const cumempool_memory_properties* properties,
                          cumempool_physical* physical);
  cumempool_result release(cumempool_physical physical);
  cumempool_result map(cumempool_address address, std::size_t bytes, cumempool_physical physical);
  cumempool_result unmap(cumempool_address address, std::size_t bytes);
  cumempool_result set_access(cumempool_address address, std::size_t bytes, const int* devices,
                              std::size_t device_count, cumempool_access access);
  cumempool_result export_handle(cumempool_physical physical, std::uint32_t handle_type,
                                 void* exported);
  cumempool_result import_handle(const void* exported, std::uint32_t handle_type,
                                 cumempool_physical* physical);

  // The entries of the same name, for a device that exists; deallocate does not wait.
  cumempool_result allocate(int device, std::size_t bytes, cumempool_address* address);
  cumempool_result deallocate(int device, cumempool_address address);
  // Whether deallocate would take the pair.
  bool allocated(int device, cumempool_address address) const;
  // The device's context is gone, and the memory of its allocations with it.
  void lose_allocations(int device);

  std::uint64_t free_bytes(int device);

  // Whether devices can be given access to each other's memory.
  bool peers() const noexcept { return peers_; }
  void set_peers(bool possible) noexcept { peers_ = possible; }

  // A number that grows with each map; see resolve.
  std::uint64_t epoch() const noexcept { return epoch_; }

  // Whether the whole range is mapped with this access. Fills `segments`, if given, with the memory
  // behind it.
  bool resolve(cumempool_address address, std::size_t bytes, const HostAccess& access,
               std::vector<HostSegment>* segments) const;

  void count(HostDriverCounters& counters);

 private:
  struct Mapping {
    std::size_t bytes;
    std::shared_ptr<HostPhysical> memory;  // null: of an allocation whose context is gone
    std::uint64_t epoch;
    bool allocated = false;     // by allocate, with address space of its own
    std::uint64_t readers = 0;  // bit per device
    std::uint64_t writers = 0;

    // The writers once the devices with these bits were given access.
    std::uint64_t writers_after(std::uint64_t devices, cumempool_access access) const noexcept {
      return access == CUMEMPOOL_ACCESS_READ ? writers & ~devices : writers | devices;
    }
  };
  using Mappings = std::map<cumempool_address, Mapping>;

  bool granules(std::uint64_t value) const noexcept;
  bool device_exists(int device) const noexcept;
  cumempool_result check_properties(const cumempool_memory_properties* properties) const;
  cumempool_result check_grants(const cumempool_memory_properties& properties) const;
  std::size_t whole_granules(std::size_t bytes) const noexcept;
  std::shared_ptr<HostPhysical> make_physical(std::size_t bytes, int device,
                                              std::uint32_t handle_types) const;
  void charge(HostPhysical& memory);
  bool may_access(const HostPhysical& memory, std::uint64_t devices) const noexcept;
  cumempool_result device_bits(const int* devices, std::size_t device_count,
                               std::uint64_t& bits) const;
  cumempool_result protect(Mappings::iterator first, Mappings::iterator last, std::uint64_t devices,
                           cumempool_access access);
  cumempool_result import_file(int number, std::uint32_t handle_type, cumempool_physical* physical);
  bool overlaps_mapping(cumempool_address address, std::size_t bytes) const;
  bool inside_reservation(cumempool_address address, std::size_t bytes) const;
  void settle(HostPhysical& memory);
  void settle_exported();

  const int device_count_;
  const std::uint64_t bytes_per_device_;
  const std::size_t granularity_;
  const std::uint32_t handle_types_;
  const bool rdma_;
  bool peers_ = true;

  std::vector<std::uint64_t> charged_;  // per device
  std::map<cumempool_address, std::size_t> reservations_;
  Mappings mappings_;
  std::map<cumempool_physical, std::shared_ptr<HostPhysical>> handles_;
  std::vector<std::shared_ptr<HostPhysical>> exported_;
  cumempool_physical next_handle_ = 0x1000;  // never reused, so that a stale handle is noticed
  std::uint64_t epoch_ = 0;
};

}  // namespace cumempool::driver
