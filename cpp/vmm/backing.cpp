// The backings of allocations: virtual memory, and memory of cudaMalloc.
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
      held_(std::exchange(other.held_, Held::kNothing)),
      leaked_(std::exchange(other.leaked_, false)),
      set_aside_(std::move(other.set_aside_)) {}

VmmBacking::~VmmBacking() {
  teardown();
  recover();
}

void VmmBacking::adopt(cumempool_physical imported) noexcept {
  handle_ = imported;
  held_ = Held::kPhysical;
  stats_->add_physical(bytes_);
}

void VmmBacking::map(const std::vector<int>& devices, cumempool_access access) {
  if (leaked_ && held_ == Held::kPhysical) set_aside();
  const Held before = held_;
  if (before == Held::kAccess) {
    recover();
    return;
  }
  try {
    if (held_ < Held::kPhysical) adopt(driver_.create(bytes_, &properties_));
    if (held_ < Held::kMapping) {
      driver_.map(address_, bytes_, handle_);
      held_ = Held::kMapping;
      stats_->mapped_bytes += bytes_;
    }
    driver_.set_access(address_, bytes_, devices, access);
    held_ = Held::kAccess;
    recover();
  } catch (const std::exception&) {
    if (before < Held::kMapping && unmap() != CUMEMPOOL_RESULT_SUCCESS) leak();
    if (before < Held::kPhysical && release_physical() != CUMEMPOOL_RESULT_SUCCESS) leak();
    throw;
  }
}

void VmmBacking::set_aside() {
  set_aside_.push_front(handle_);  // leaked_bytes still counts it
  held_ = Held::kAddresses;
  leaked_ = false;
}

void VmmBacking::leak() noexcept {
  if (leaked_ || held_ == Held::kNothing) return;
  leaked_ = true;
  stats_->leaked_bytes += bytes_;
}

void VmmBacking::recover() noexcept {
  if (!leaked_) return;
  leaked_ = false;
  stats_->leaked_bytes -= bytes_;
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
    recover();
  }
  return result;
}

cumempool_result VmmBacking::release_set_aside() noexcept {
  const auto& table = driver_.table();
  while (!set_aside_.empty()) {
    const cumempool_result result = table.release(table.self, set_aside_.front());
    if (result != CUMEMPOOL_RESULT_SUCCESS) return result;
    set_aside_.pop_front();
    stats_->physical_bytes -= bytes_;
    stats_->leaked_bytes -= bytes_;
  }
  return CUMEMPOOL_RESULT_SUCCESS;
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
  if (result == CUMEMPOOL_RESULT_SUCCESS) result = release_set_aside();
  if (result == CUMEMPOOL_RESULT_SUCCESS) result = release_addresses();
  result == CUMEMPOOL_RESULT_SUCCESS ? recover() : leak();
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
      held_(std::exchange(other.held_, false)),
      leaked_(std::exchange(other.leaked_, false)) {}

CudaMallocBacking::~CudaMallocBacking() {
  teardown();
  recover();
}

void CudaMallocBacking::leak() noexcept {
  if (leaked_ || !held_) return;
  leaked_ = true;
  stats_->leaked_bytes += bytes_;
}

void CudaMallocBacking::recover() noexcept {
  if (!leaked_) return;
  leaked_ = false;
  stats_->leaked_bytes -= bytes_;
}

cumempool_result CudaMallocBacking::teardown() noexcept {
  if (!held_) return CUMEMPOOL_RESULT_SUCCESS;
  const auto& table = driver_.table();
  cumempool_context_token token{};
  cumempool_result result = table.context_enter(table.self, device_, &token);
  if (result == CUMEMPOOL_RESULT_SUCCESS) {
    result = table.deallocate(table.self, device_, address_);
    table.context_leave(table.self, &token);
  }
  if (result == CUMEMPOOL_RESULT_SUCCESS) {
    stats_->physical_bytes -= bytes_;
    stats_->mapped_bytes -= bytes_;
    held_ = false;
    recover();
  } else {
    leak();
  }
  return result;
}

}  // namespace cumempool::vmm
