// One address range with its memory: the state machine that every transition drives.
#include "vmm/allocation.hpp"

#include <algorithm>
#include <exception>
#include <utility>

namespace cumempool::vmm {

Allocation::Allocation(driver::Driver driver, Ledger& ledger,
                       const cumempool_memory_properties& properties, std::size_t bytes,
                       std::vector<int> access)
    : driver_(driver),
      ledger_(&ledger),
      properties_(properties),
      bytes_(bytes),
      access_(std::move(access)),
      range_(std::in_place, driver, ledger, bytes) {}

Allocation::Allocation(driver::Driver driver, Ledger& ledger,
                       const cumempool_memory_properties& properties, std::size_t bytes)
    : Allocation(driver, ledger, properties, bytes, {properties.device}) {}

Allocation::Allocation(driver::Driver driver, OrdinaryMemory&& memory, int device,
                       std::size_t bytes)
    : driver_(driver), bytes_(bytes), access_{device}, ordinary_(std::move(memory)) {
  properties_.device = device;
}

void Allocation::map() {
  if (mapped()) return;
  const bool had_physical = holds_physical();
  const bool had_mapping = mapping_.has_value();
  try {
    if (!had_physical) physical_.emplace(driver_, *ledger_, properties_, bytes());
    if (!had_mapping) mapping_.emplace(driver_, *ledger_, *range_, *physical_);
    mapping_->give_access(access_);
  } catch (const std::exception&) {
    // Only what this call made is undone; what cannot be undone stays held and is used next time.
    if (!had_mapping) release_mapping();
    if (!had_physical && !mapping_) release_physical();
    throw;
  }
}

void Allocation::extend(const std::vector<int>& devices) noexcept {
  if (ordinary_ || !mapped()) return;
  try {
    std::vector<int> more;
    for (const int device : devices) {
      if (std::find(access_.begin(), access_.end(), device) == access_.end())
        more.push_back(device);
    }
    if (more.empty()) return;
    access_.reserve(access_.size() + more.size());  // who has access is waited for, without fail
    mapping_->give_access(more);
    access_.insert(access_.end(), more.begin(), more.end());
  } catch (const std::exception&) {
    return;
  }
}

void Allocation::unmap() {
  if (ordinary_) throw Error(CUMEMPOOL_INTERNAL, "ordinary memory cannot be detached");
  driver::check(driver_.table(), "unmap", release_mapping(), properties_.device, bytes());
}

cumempool_result Allocation::release_mapping() noexcept {
  if (!mapping_) return CUMEMPOOL_RESULT_SUCCESS;
  const cumempool_result result = mapping_->release();
  if (result == CUMEMPOOL_RESULT_SUCCESS) {
    mapping_.reset();
    access_.resize(chosen_);
  }
  return result;
}

cumempool_result Allocation::release_physical() noexcept {
  if (!physical_) return CUMEMPOOL_RESULT_SUCCESS;
  const cumempool_result result = physical_->release();
  if (result == CUMEMPOOL_RESULT_SUCCESS) physical_.reset();
  return result;
}

cumempool_result Allocation::teardown() noexcept {
  if (ordinary_) return ordinary_->release();
  cumempool_result result = release_mapping();
  if (result == CUMEMPOOL_RESULT_SUCCESS) result = release_physical();
  if (result == CUMEMPOOL_RESULT_SUCCESS) result = range_->release();
  return result;
}

}  // namespace cumempool::vmm
