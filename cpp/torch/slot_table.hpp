// The allocator and the tag that each exported malloc/free pair serves.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "pool/allocator.hpp"

namespace cumempool::torch {

constexpr std::uint32_t kSlotCount = 64;

// Thread-safe; one per process.
class SlotTable {
 public:
  static SlotTable& instance();

  // Binds a free slot. The slot of a scope keeps its tag from sleeping, because torch hands out
  // parts of the memory that came through it; a `lasting` slot does not. Throws Error
  // (CUMEMPOOL_OUT_OF_SLOTS, CUMEMPOOL_CLOSED).
  std::uint32_t bind(const std::shared_ptr<pool::Allocator>& allocator, pool::Tag& tag,
                     bool lasting);
  // Preserves the contents of all memory allocated through the slot from now on, until it is
  // unbound, if its tag is discarded. Throws Error (CUMEMPOOL_INVALID_ARGUMENT) for a slot that is
  // not bound.
  void preserve(std::uint32_t slot);
  // Counts the calls of malloc since the slot was bound. Throws the same.
  std::uint64_t mallocs(std::uint32_t slot);
  // Throws the same.
  void unbind(std::uint32_t slot);

  // Returns null if the slot is not bound or there is no memory. Leaves no error behind (R1).
  void* malloc(std::uint32_t slot, std::size_t bytes, int device) noexcept;
  // Frees the allocation at that address, through a bound slot or not. Ignores unknown addresses.
  static void free(void* address) noexcept;

 private:
  struct Slot {
    std::mutex mutex;
    std::shared_ptr<pool::Allocator> allocator;
    pool::Tag* tag = nullptr;
    bool lasting = false;
    bool preserves = false;
    std::uint64_t mallocs = 0;  // since the slot was bound
  };

  std::array<Slot, kSlotCount> slots_;
};

}  // namespace cumempool::torch
