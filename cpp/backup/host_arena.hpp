// Host memory for backups: blocks at neighbouring addresses, pinned or not, handed out in spans and
// kept for the next sleep. Blocks on order are faulted in by several threads while the copies into
// earlier ones run. Each is registered by itself, until others want to copy across their borders.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "backup/host_limits.hpp"
#include "backup/host_pages.hpp"
#include "backup/interval_set.hpp"
#include "driver/driver.hpp"

namespace cumempool::backup {

enum class Residence { kPinned, kPageable };

// Thread-safe. The driver and the kernel are called outside its lock. Its spans may cross blocks,
// which lie side by side; a copy call may not: see run().
class HostArena {
 public:
  // Addresses of an arena: eight devices of twice today's size, should all of them be of one node.
  static constexpr std::size_t kAddressBytes = std::size_t{1} << 42;

  // Memory is taken from `numa_node` where there is room; -1 = wherever it is.
  HostArena(driver::Driver driver, Residence residence, int numa_node, HostBudget& budget,
            std::size_t address_bytes = kAddressBytes);
  // Leaves memory that could not be unregistered mapped: the driver may still write to it.
  ~HostArena();
  HostArena(const HostArena&) = delete;
  HostArena& operator=(const HostArena&) = delete;

  Residence residence() const noexcept { return residence_; }

  // Free room, and what `bytes` would take beyond it, rounded as blocks are.
  std::size_t free_bytes() const;
  std::size_t missing(std::size_t bytes) const;
  // Bytes that it has addresses for beside the blocks that it holds. For the transition under way.
  std::uint64_t address_room();
  // Why a block has no address: CUMEMPOOL_OUT_OF_HOST_MEMORY.
  Error no_addresses() const;

  // Orders the blocks that `bytes` more than what is free will need, and starts to fault them in.
  // Orders are for one thread at a time, and end with cancel_order(). Throws Error
  // (CUMEMPOOL_OUT_OF_HOST_MEMORY), with nothing ordered: what will not fit, into the budget or
  // into the memory that the kernel leaves to the process, is refused here, before any of it is
  // touched.
  void order(std::size_t bytes);
  // Adds all that is still on order as free room. Inside a ContextScope of `device`. Throws Error
  // (CUMEMPOOL_OUT_OF_HOST_MEMORY); what was added until then stays.
  void deliver(int device);
  // Gives back what was ordered and not delivered.
  void cancel_order() noexcept;

  // One span of 1 to `bytes` bytes, from free room, from the order, or from a block made for it.
  // Inside a ContextScope of `device`. Throws Error (CUMEMPOOL_OUT_OF_HOST_MEMORY).
  HostSpan acquire(int device, std::size_t bytes);
  // The same, all in one span.
  HostSpan acquire_whole(int device, std::size_t bytes);
  // A span, or several that were acquired side by side.
  void release(const HostSpan& span) noexcept;

  // How many of `bytes` bytes from `data` on one copy call may use.
  std::size_t run(const std::byte* data, std::size_t bytes) const noexcept;
  // Has the bytes, which are handed out, lie in one registration, for those who copy them in one
  // call, as programs do. Registers all neighbours along with them: a range that grew by a block at
  // a time would be pinned over and over. Waits for copies that use them. Inside a ContextScope of
  // `device`. Throws Error (CUMEMPOOL_OUT_OF_HOST_MEMORY), with everything as it was.
  void join(int device, const std::byte* data, std::size_t bytes);
  // Pins what could not be pinned again when a join() or a trim() was undone. Before any copy.
  // Inside a ContextScope of `device`. Throws Error (CUMEMPOOL_OUT_OF_HOST_MEMORY).
  void pin_lost(int device);

  // Gives back the blocks that hold nothing, or `most` bytes of them; returns their bytes. Inside a
  // ContextScope.
  std::uint64_t trim(int device, std::uint64_t most = std::numeric_limits<std::uint64_t>::max());

  std::uint64_t held_bytes() const;
  std::uint64_t used_bytes() const;

 private:
  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);
  struct Block {
    std::size_t bytes = 0;
    std::size_t registration = kNone;  // the first slot of the registration that it is part of
    bool delivered = false;
  };
  // Neighbours, all but the last of which fill their slots.
  struct Slots {
    std::size_t first = 0;
    std::size_t last = 0;
  };
  // Blocks on order: mapped, in the course of being touched, not delivered.
  struct Order {
    std::vector<std::size_t> slots;
    std::vector<std::size_t> ranges_until;  // per slot: the ranges of it and of those before
    std::size_t delivered = 0;
    std::unique_ptr<FirstTouch> touch;
  };

  std::byte* address_of(std::size_t slot) const noexcept;
  HostSpan take_free(std::size_t bytes, bool whole);
  void reserve_addresses();
  std::size_t claim_room(std::size_t needed);
  std::size_t map_block(std::size_t needed, std::size_t from_slot);
  void unmap_block(std::size_t slot) noexcept;
  void start_touching(Order& order) const;
  void deliver_next(int device);
  void add_block(int device, std::size_t slot);
  const Block* neighbour(std::size_t slot) const noexcept;
  Slots neighbours_of(Slots slots) const noexcept;
  std::vector<Slots> registrations_in(const Slots& slots) const;
  cumempool_result pin(int device, const Slots& slots) noexcept;
  cumempool_result unpin(int device, std::size_t registration) noexcept;
  void pin_again(int device, const std::vector<Slots>& registrations) noexcept;
  bool split(int device, std::size_t registration) noexcept;
  void refuse(std::size_t needed) const;
  std::size_t slot_after_last() const;
  std::vector<std::size_t> take_empty_blocks(std::uint64_t most);

  driver::Driver driver_;
  const Residence residence_;
  const int numa_node_;
  const std::size_t address_bytes_;
  HostBudget& budget_;
  std::byte* base_ = nullptr;  // of the reserved addresses
  std::size_t slot_count_ = 0;
  // For the transition under way; spans are released meanwhile, which needs neither.
  std::map<std::size_t, Block> blocks_;
  bool lost_pins_ = false;  // whether a delivered block may be without a registration
  std::unique_ptr<Order> order_;
  mutable std::mutex mutex_;  // guards the three below
  IntervalSet free_;          // offsets from base_
  std::uint64_t held_bytes_ = 0;
  std::uint64_t used_bytes_ = 0;
};

// An order that ends with the object.
class ArenaOrder {
 public:
  // Throws Error (CUMEMPOOL_OUT_OF_HOST_MEMORY).
  ArenaOrder(HostArena& arena, std::size_t bytes) : arena_(arena) { arena_.order(bytes); }
  ~ArenaOrder() { arena_.cancel_order(); }
  ArenaOrder(const ArenaOrder&) = delete;
  ArenaOrder& operator=(const ArenaOrder&) = delete;

 private:
  HostArena& arena_;
};

}  // namespace cumempool::backup
