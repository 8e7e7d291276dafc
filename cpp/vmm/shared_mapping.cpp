// Physical memory of another process, mapped here.
#include "vmm/shared_mapping.hpp"

#include <exception>
#include <mutex>
#include <utility>

#include "vmm/backing.hpp"

namespace cumempool::vmm {

// What a mapping holds of the driver, in the order of its making; destroyed last to first.
struct SharedParts {
  SharedParts(driver::Driver of, int on_device, std::size_t size)
      : driver(of),
        device(on_device),
        bytes(size),
        context(of, on_device),
        memory(of, stats, {on_device, 0, 0, 0}, size) {}

  void open(std::uint32_t handle_type, const void* exported, cumempool_access access);
  // Step by step, each once the one before has succeeded. Throws Error; may be repeated.
  void give_back();

  driver::Driver driver;
  int device;
  std::size_t bytes;
  MemoryStats stats;
  driver::RetainedContext context;
  VmmBacking memory;
  std::unique_ptr<SharedParts> next;  // of those that are kept
};

void SharedParts::open(std::uint32_t handle_type, const void* exported, cumempool_access access) {
  const auto& table = driver.table();
  cumempool_physical imported = 0;
  driver::check(table, "import_handle",
                table.import_handle(table.self, exported, handle_type, &imported), device, bytes);
  memory.adopt(imported);
  memory.map({device}, access);
}

void SharedParts::give_back() {
  const auto& table = driver.table();
  if (memory.mapped()) {  // the one device, without a list that takes memory
    driver::check(table, "fence", table.fence(table.self, &device, 1), device, bytes);
  }
  driver::check(table, "unmap", memory.unmap(), device, bytes);
  driver::check(table, "release", memory.release_physical(), device, bytes);
  driver::check(table, "unreserve", memory.release_addresses(), device, bytes);
}

namespace {

using Parts = std::unique_ptr<SharedParts>;

// What could not be given back. Never destroyed: the owners inside must not unmap what they hold.
struct Leftovers {
  std::mutex mutex;
  Parts first;
};

Leftovers& leftovers() {
  static auto* const all = new Leftovers;
  return *all;
}

// What drivers have taken with them.
Parts& forgotten() {
  static auto* const all = new Parts;
  return *all;
}

void keep(Parts parts) noexcept {
  Leftovers& all = leftovers();
  const std::lock_guard lock(all.mutex);
  parts->next = std::move(all.first);
  all.first = std::move(parts);
}

// Null where nothing is left.
Parts give_back(Parts parts) noexcept {
  try {
    parts->give_back();
  } catch (const std::exception&) {  // or no memory to say what failed
    return parts;
  }
  return nullptr;
}

// The leftovers of a driver, taken out.
Parts take_leftovers(const cumempool_driver& table) noexcept {
  Leftovers& all = leftovers();
  const std::lock_guard lock(all.mutex);
  Parts taken;
  for (Parts* at = &all.first; *at != nullptr;) {
    if (&(*at)->driver.table() != &table) {
      at = &(*at)->next;
      continue;
    }
    Parts one = std::exchange(*at, std::move((*at)->next));
    one->next = std::exchange(taken, nullptr);
    taken = std::move(one);
  }
  return taken;
}

template <typename KeepOne>
void retry_leftovers(const cumempool_driver& table, const KeepOne& keep_one) noexcept {
  Parts left = take_leftovers(table);
  while (left != nullptr) {
    Parts one = std::exchange(left, std::move(left->next));
    one = give_back(std::move(one));
    if (one != nullptr) keep_one(std::move(one));
  }
}

}  // namespace

SharedMapping::SharedMapping(driver::Driver driver, int device, std::uint32_t handle_type,
                             const void* exported, std::size_t bytes, cumempool_access access) {
  retry_leftovers(driver.table(), keep);  // they may be what is missing now
  parts_ = std::make_unique<SharedParts>(driver, device, bytes);
  try {
    parts_->open(handle_type, exported, access);
  } catch (const std::exception&) {
    parts_ = give_back(std::move(parts_));
    if (parts_ != nullptr) keep(std::move(parts_));
    throw;
  }
}

SharedMapping::~SharedMapping() {
  const cumempool_driver& table = parts_->driver.table();
  retry_leftovers(table, keep);
  parts_ = give_back(std::move(parts_));
  if (parts_ != nullptr) keep(std::move(parts_));
}

cumempool_address SharedMapping::address() const noexcept { return parts_->memory.address(); }

void SharedMapping::close() {
  retry_leftovers(parts_->driver.table(), keep);
  parts_->give_back();
}

void SharedMapping::forget_leftovers(const cumempool_driver& table) noexcept {
  retry_leftovers(table, [](Parts one) {
    const std::lock_guard lock(leftovers().mutex);
    one->next = std::move(forgotten());
    forgotten() = std::move(one);
  });
}

}  // namespace cumempool::vmm
