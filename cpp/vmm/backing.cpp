// What an allocation is made of.
#include "vmm/backing.hpp"

#include <exception>
#include <utility>

namespace cumempool::vmm {

// ---- virtual memory -----------------------------------------------------------------------------

VmmBacking::VmmBacking(driver::Driver driver, MemoryStats& stats,
                       const cumempool_memory_properties& properties, std::size_t bytes)
    : driver_(driver),
      stats_(&stats),
      properties_(properties),
      bytes_(bytes),
      address_(driver.reserve(bytes)) {
  stats_->reserved_bytes += bytes_;
}

VmmBacking::VmmBacking(VmmBacking&& other) noexcept
    : driver_(other.driver_),
      stats_(other.stats_),
      properties_(other.properties_),
      bytes_(other.bytes_),
      address_(other.address_),
      handle_(other.handle_),
      held_(std::exchange(other.held_, Held::kNothing)) {}

void VmmBacking::adopt(cumempool_physical imported) noexcept {
  handle_ = imported;
  held_ = Held::kPhysical;
  stats_->add_physical(bytes_);
}

void VmmBacking::map(const std::vector<int>& devices, cumempool_access access) {
  const Held before = held_;
  try {
    if (held_ < Held::kPhysical) adopt(driver_.create(bytes_, &properties_));
    if (held_ < Held::kMapping) {
      driver_.map(address_, bytes_, handle_);
      held_ = Held::kMapping;
      stats_->mapped_bytes += bytes_;
    }
    driver_.set_access(address_, bytes_, devices, access);
    held_ = Held::kAccess;
  } catch (const std::exception&) {
    if (before < Held::kMapping) unmap();
    if (before < Held::kPhysical) release_physical();
    throw;
  }
}

void VmmBacking::give_access(const std::vector<int>& devices) {
  driver_.set_access(address_, bytes_, devices);
}

cumempool_result VmmBacking::unmap() noexcept {
  if (held_ < Held::kMapping) return CUMEMPOOL_RESULT_SUCCESS;
  const auto& table = driver_.table();
  const cumempool_result result = table.unmap(table.self, address_, bytes_);
  if (result == CUMEMPOOL_RESULT_SUCCESS) {
    stats_->mapped_bytes -= bytes_;
    held_ = Held::kPhysical;
  }
  return result;
}

cumempool_result VmmBacking::release_physical() noexcept {
  if (held_ != Held::kPhysical) return CUMEMPOOL_RESULT_SUCCESS;
  const auto& table = driver_.table();
  const cumempool_result result = table.release(table.self, handle_);
  if (result == CUMEMPOOL_RESULT_SUCCESS) {
    stats_->physical_bytes -= bytes_;
    held_ = Held::kAddresses;
  }
  return result;
}

cumempool_result VmmBacking::release_addresses() noexcept {
  if (held_ != Held::kAddresses) return CUMEMPOOL_RESULT_SUCCESS;
  const auto& table = driver_.table();
  const cumempool_result result = table.unreserve(table.self, address_, bytes_);
  if (result == CUMEMPOOL_RESULT_SUCCESS) {
    stats_->reserved_bytes -= bytes_;
    held_ = Held::kNothing;
  }
  return result;
}

cumempool_result VmmBacking::teardown() noexcept {
  cumempool_result result = unmap();
  if (result == CUMEMPOOL_RESULT_SUCCESS) result = release_physical();
  if (result == CUMEMPOOL_RESULT_SUCCESS) result = release_addresses();
  return result;
}

// ---- cudaMalloc ---------------------------------------------------------------------------------

namespace {

cumempool_address allocate(driver::Driver driver, int device, std::size_t bytes) {
  const driver::ContextScope scope(driver, device);
  return driver.allocate(device, bytes);
}

}  // namespace

CudaMallocBacking::CudaMallocBacking(driver::Driver driver, MemoryStats& stats, int device,
                                     std::size_t bytes)
    : driver_(driver),
      stats_(&stats),
      device_(device),
      bytes_(bytes),
      address_(allocate(driver, device, bytes)) {
  stats_->add_physical(bytes_);
  stats_->mapped_bytes += bytes_;
}

CudaMallocBacking::CudaMallocBacking(CudaMallocBacking&& other) noexcept
    : driver_(other.driver_),
      stats_(other.stats_),
      device_(other.device_),
      bytes_(other.bytes_),
      address_(other.address_),
      held_(std::exchange(other.held_, false)) {}

cumempool_result CudaMallocBacking::teardown() noexcept {
  if (!held_) return CUMEMPOOL_RESULT_SUCCESS;
  const auto& table = driver_.table();
  cumempool_context_token token{};
  cumempool_result result = table.context_enter(table.self, device_, &token);
  if (result != CUMEMPOOL_RESULT_SUCCESS) return result;
  result = table.deallocate(table.self, device_, address_);
  table.context_leave(table.self, &token);
  if (result == CUMEMPOOL_RESULT_SUCCESS) {
    stats_->physical_bytes -= bytes_;
    stats_->mapped_bytes -= bytes_;
    held_ = false;
  }
  return result;
}

}  // namespace cumempool::vmm
