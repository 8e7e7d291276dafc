// One address range with its backing: the state machine that every transition drives.
#include "vmm/allocation.hpp"

#include <algorithm>
#include <exception>
#include <utility>

namespace cumempool::vmm {

Allocation::Allocation(driver::Driver driver, MemoryStats& stats,
                       const cumempool_memory_properties& properties, std::size_t bytes,
                       std::vector<int> access)
    : driver_(driver),
      bytes_(bytes),
      access_(std::move(access)),
      backing_(std::in_place_type<VmmBacking>, driver, stats, properties, bytes),
      address_(std::get<VmmBacking>(backing_).address()) {}

Allocation::Allocation(driver::Driver driver, MemoryStats& stats,
                       const cumempool_memory_properties& properties, std::size_t bytes)
    : Allocation(driver, stats, properties, bytes, {properties.device}) {}

Allocation::Allocation(driver::Driver driver, MemoryStats& stats, int device, std::size_t bytes)
    : driver_(driver),
      bytes_(bytes),
      access_{device},
      backing_(std::in_place_type<CudaMallocBacking>, driver, stats, device, bytes),
      address_(std::get<CudaMallocBacking>(backing_).address()) {}

void Allocation::map() {
  std::visit([this](auto& backing) { backing.map(access_); }, backing_);
}

void Allocation::extend(const std::vector<int>& devices) noexcept {
  if (!can_extend() || !mapped()) return;
  try {
    std::vector<int> more;
    for (const int device : devices) {
      if (std::find(access_.begin(), access_.end(), device) == access_.end())
        more.push_back(device);
    }
    if (more.empty()) return;
    access_.reserve(access_.size() + more.size());  // so that each device with access is fenced
    std::visit([&more](auto& backing) { backing.give_access(more); }, backing_);
    access_.insert(access_.end(), more.begin(), more.end());
  } catch (const std::exception&) {
    return;
  }
}

void Allocation::unmap() {
  if (!can_sleep()) throw Error(CUMEMPOOL_INTERNAL, "memory of this backing cannot be detached");
  const auto result = std::visit([](auto& backing) { return backing.unmap(); }, backing_);
  driver::check(driver_.table(), "unmap", result, access_.front(), bytes_);
  access_.resize(chosen_);
}

cumempool_result Allocation::release_physical() noexcept {
  return std::visit([](auto& backing) { return backing.release_physical(); }, backing_);
}

void Allocation::vacate() {
  cumempool_result unmapped = CUMEMPOOL_RESULT_SUCCESS;
  cumempool_result released = CUMEMPOOL_RESULT_SUCCESS;
  std::visit(
      [&](auto& backing) {
        unmapped = backing.unmap();
        if (unmapped == CUMEMPOOL_RESULT_SUCCESS) released = backing.release_physical();
        if (backing.holds_physical()) backing.leak();
        const cumempool_result aside = backing.release_set_aside();
        if (released == CUMEMPOOL_RESULT_SUCCESS) released = aside;
      },
      backing_);
  if (unmapped == CUMEMPOOL_RESULT_SUCCESS) access_.resize(chosen_);
  driver::check(driver_.table(), "unmap", unmapped, access_.front(), bytes_);
  driver::check(driver_.table(), "release", released, access_.front(), bytes_);
}

cumempool_result Allocation::teardown() noexcept {
  return std::visit([](auto& backing) { return backing.teardown(); }, backing_);
}

}  // namespace cumempool::vmm
