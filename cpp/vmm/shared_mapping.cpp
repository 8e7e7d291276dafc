// Physical memory of another process: imported, mapped here, and given back.
#include "vmm/shared_mapping.hpp"

namespace cumempool::vmm {

SharedMapping::SharedMapping(driver::Driver driver, int device, std::uint32_t handle_type,
                             const void* exported, std::size_t bytes, cumempool_access access)
    : driver_(driver),
      device_(device),
      bytes_(bytes),
      context_(driver, device),
      memory_(driver, stats_, {device, 0, 0, 0}, bytes) {
  const auto& table = driver_.table();
  cumempool_physical imported = 0;
  driver::check(table, "import_handle",
                table.import_handle(table.self, exported, handle_type, &imported), device_, bytes_);
  memory_.adopt(imported);
  memory_.map({device_}, access);
}

SharedMapping::~SharedMapping() {
  if (wait() != CUMEMPOOL_RESULT_SUCCESS) memory_.abandon();
}

// Takes no host memory.
cumempool_result SharedMapping::wait() const noexcept {
  const auto& table = driver_.table();
  return memory_.mapped() ? table.fence(table.self, &device_, 1) : CUMEMPOOL_RESULT_SUCCESS;
}

void SharedMapping::close() {
  const auto& table = driver_.table();
  driver::check(table, "fence", wait(), device_, bytes_);
  driver::check(table, "unmap", memory_.unmap(), device_, bytes_);
  driver::check(table, "release", memory_.release_physical(), device_, bytes_);
  driver::check(table, "unreserve", memory_.release_addresses(), device_, bytes_);
}

}  // namespace cumempool::vmm
