// Physical memory of another process, mapped here.
#include "vmm/shared_mapping.hpp"

namespace cumempool::vmm {
namespace {

cumempool_physical import(driver::Driver driver, int device, std::uint32_t type,
                          const void* exported, std::size_t bytes) {
  const auto& table = driver.table();
  cumempool_physical imported = 0;
  driver::check(table, "import_handle", table.import_handle(table.self, exported, type, &imported),
                device, bytes);
  return imported;
}

}  // namespace

SharedMapping::SharedMapping(driver::Driver driver, int device, std::uint32_t handle_type,
                             const void* exported, std::size_t bytes, cumempool_access access)
    : driver_(driver), device_(device), context_(driver, device), range_(driver, ledger_, bytes) {
  physical_.emplace(driver_, ledger_, bytes,
                    import(driver_, device_, handle_type, exported, bytes));
  mapping_.emplace(driver_, ledger_, range_, *physical_);
  mapping_->give_access({device_}, access);
}

SharedMapping::~SharedMapping() {
  try {
    close();
  } catch (const Error&) {
    // The owners below try once more, in order; what the driver keeps is lost to this process.
  }
}

void SharedMapping::close() {
  if (mapping_) {
    const driver::ContextScope scope(driver_, device_);
    driver_.fence(device_);
    driver::check(driver_.table(), "unmap", mapping_->release(), device_, bytes());
    mapping_.reset();
  }
  if (physical_) {
    driver::check(driver_.table(), "release", physical_->release(), device_, bytes());
    physical_.reset();
  }
  driver::check(driver_.table(), "unreserve", range_.release(), device_, bytes());
}

}  // namespace cumempool::vmm
