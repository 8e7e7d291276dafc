// Device memory of the host driver, made of mmap and memfd: address ranges, physical memory within
// a budget, mappings, and allocations, which are all three in one. Not thread-safe; the driver
// locks.
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

// Owns an open file descriptor.
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

// Physical memory: a memfd. Its bytes are charged to a device from create until its last handle,
// mapping and exported descriptor are gone.
struct HostPhysical {
  Descriptor descriptor;
  std::size_t bytes;
  int device;  // -1: imported from another process, which is charged
  std::uint32_t handle_types;
  std::uint64_t handles = 0;
  std::uint64_t mappings = 0;
  std::vector<int> exported;  // descriptor numbers that export_handle gave to this process
  bool charged = false;

  HostPhysical(Descriptor file, std::size_t size, int owner, std::uint32_t types)
      : descriptor(std::move(file)), bytes(size), device(owner), handle_types(types) {}
};

// A part of physical memory, which it keeps alive.
struct HostSegment {
  std::shared_ptr<const HostPhysical> memory;
  std::size_t offset;
  std::size_t bytes;
};

class HostMemory {
 public:
  explicit HostMemory(const cumempool_host_driver_options& options);
  ~HostMemory();
  HostMemory(const HostMemory&) = delete;
  HostMemory(HostMemory&&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  HostMemory& operator=(HostMemory&&) = delete;

  // The entries of the same name of the table.
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

  // The same for a device that exists. deallocate does not wait.
  cumempool_result allocate(int device, std::size_t bytes, cumempool_address* address);
  cumempool_result deallocate(int device, cumempool_address address);
  // Whether deallocate takes the pair.
  bool allocated(int device, cumempool_address address) const;
  // The device's context is gone, and the memory of its allocations with it.
  void lose_allocations(int device);

  std::uint64_t free_bytes(int device);

  // Whether set_access gives devices access to each other's memory.
  bool peers() const noexcept { return peers_; }
  void set_peers(bool possible) noexcept { peers_ = possible; }

  // The number of the last mapping; see resolve.
  std::uint64_t epoch() const noexcept { return epoch_; }

  // Whether the device has this access to the whole range, by mappings made no later than `epoch`.
  // Fills `segments`, unless it is null, with the memory behind the range.
  bool resolve(const cumempool_extent& range, int device, cumempool_access access,
               std::uint64_t epoch, std::vector<HostSegment>* segments) const;

  void count(HostDriverCounters& counters);

 private:
  struct Mapping {
    std::size_t bytes;
    std::shared_ptr<HostPhysical> memory;  // null: an allocation whose context is gone
    std::uint64_t epoch;
    bool allocated = false;     // made by allocate, with address space of its own
    std::uint64_t readers = 0;  // bit per device
    std::uint64_t writers = 0;

    // The writers after the devices with these bits get access.
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
  cumempool_physical next_handle_ = 0x1000;  // never reused, so that a stale handle is an error
  std::uint64_t epoch_ = 0;
};

}  // namespace cumempool::driver
