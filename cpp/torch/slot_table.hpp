// Which allocator and tag each exported malloc/free pair serves at present.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "pool/allocator.hpp"

namespace cumempool::torch {

constexpr std::uint32_t kSlotCount = 64;

// Thread-safe, one per process.
class SlotTable {
 public:
  static SlotTable& instance();

  // A scope's slot keeps its tag from sleeping, since torch hands out parts of what came through
  // it; a lasting one does not. Throws Error (CUMEMPOOL_OUT_OF_SLOTS, CUMEMPOOL_CLOSED).
  enum class Use { kScope, kLasting };
  std::uint32_t bind(const std::shared_ptr<pool::Allocator>& allocator, pool::Tag& tag, Use use);
  // What is allocated through the slot until it is unbound keeps its contents where its tag is
  // discarded. Throws Error (CUMEMPOOL_INVALID_ARGUMENT) for a slot that is not bound.
  void preserve(std::uint32_t slot);
  // How many times the slot was asked for memory since it was bound. Throws the same.
  std::uint64_t mallocs(std::uint32_t slot);
  // Throws the same.
  void unbind(std::uint32_t slot);

  // Null where the slot is not bound or the memory cannot be had. Leaves no error behind (R1).
  void* malloc(std::uint32_t slot, std::size_t bytes, int device) noexcept;
  // Frees whatever was allocated at that address, bound or not; unknown addresses are ignored.
  static void free(void* address) noexcept;

 private:
  struct Slot {
    std::mutex mutex;
    std::shared_ptr<pool::Allocator> allocator;
    pool::Tag* tag = nullptr;
    Use use = Use::kScope;
    bool preserves = false;
    std::uint64_t mallocs = 0;  // since it was bound
  };

  std::array<Slot, kSlotCount> slots_;
};

}  // namespace cumempool::torch
