// The allocator and the tag that each exported malloc/free pair serves.
#include "torch/slot_table.hpp"

#include <exception>
#include <string>
#include <utility>

#include "pool/records.hpp"

namespace cumempool::torch {
namespace {

Error not_bound(std::uint32_t number) {
  return {CUMEMPOOL_INVALID_ARGUMENT, "slot " + std::to_string(number) + " is not bound"};
}

}  // namespace

SlotTable& SlotTable::instance() {
  static auto& table = *new SlotTable;  // never destroyed: torch may call after static destructors
  return table;
}

std::uint32_t SlotTable::bind(const std::shared_ptr<pool::Allocator>& allocator, pool::Tag& tag,
                              bool lasting) {
  allocator->check_open("bind_slot");
  allocator->follow_use();
  for (std::uint32_t number = 0; number < kSlotCount; ++number) {
    Slot& slot = slots_.at(number);
    const std::lock_guard lock(slot.mutex);
    if (slot.allocator != nullptr) continue;
    slot.allocator = allocator;
    slot.tag = &tag;
    slot.lasting = lasting;
    slot.preserves = false;
    slot.mallocs = 0;
    if (!lasting) allocator->records().begin_scope(tag);
    allocator->counters().bound_slots += 1;
    return number;
  }
  Error error(CUMEMPOOL_OUT_OF_SLOTS,
              "all " + std::to_string(kSlotCount) + " slots are bound to open scopes");
  error.operation = "bind_slot";
  error.tag = tag.name;
  error.advice = "leave some use_memory_pool() scopes before opening more at the same time";
  throw error;
}

void SlotTable::preserve(std::uint32_t number) {
  if (number < kSlotCount) {
    Slot& slot = slots_.at(number);
    const std::lock_guard lock(slot.mutex);
    if (slot.allocator != nullptr) {
      slot.preserves = true;
      return;
    }
  }
  throw not_bound(number);
}

std::uint64_t SlotTable::mallocs(std::uint32_t number) {
  if (number < kSlotCount) {
    Slot& slot = slots_.at(number);
    const std::lock_guard lock(slot.mutex);
    if (slot.allocator != nullptr) return slot.mallocs;
  }
  throw not_bound(number);
}

void SlotTable::unbind(std::uint32_t number) {
  std::shared_ptr<pool::Allocator> allocator;
  if (number < kSlotCount) {
    Slot& slot = slots_.at(number);
    const std::lock_guard lock(slot.mutex);
    allocator = std::exchange(slot.allocator, nullptr);
    if (allocator != nullptr && !slot.lasting) allocator->records().end_scope(*slot.tag);
    slot.tag = nullptr;
  }
  if (allocator == nullptr) throw not_bound(number);
  allocator->counters().bound_slots -= 1;
  allocator->follow_use();
}

void* SlotTable::malloc(std::uint32_t number, std::size_t bytes, int device) noexcept {
  std::shared_ptr<pool::Allocator> allocator;
  const pool::Tag* tag = nullptr;
  bool preserves = false;
  {
    Slot& slot = slots_.at(number);
    const std::lock_guard lock(slot.mutex);
    allocator = slot.allocator;
    tag = slot.tag;
    preserves = slot.preserves;
    slot.mallocs += 1;
  }
  if (allocator == nullptr) return nullptr;
  try {
    // Integer to pointer: the address is the device's, and torch hands it back as it is.
    return reinterpret_cast<void*>(  // NOLINT(performance-no-int-to-ptr)
        static_cast<std::uintptr_t>(allocator->malloc(*tag, device, bytes, preserves)));
  } catch (const std::exception&) {
    return nullptr;  // pool::Allocator::malloc has noted the reason
  }
}

void SlotTable::free(void* address) noexcept {
  const pool::RecordPointer record = pool::Registry::instance().take(
      static_cast<cumempool_address>(reinterpret_cast<std::uintptr_t>(address)));
  if (record == nullptr) return;
  const std::shared_ptr<pool::Allocator> owner = record->owner;  // outlives its last record
  owner->free(record);
}

}  // namespace cumempool::torch
