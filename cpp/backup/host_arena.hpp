// An arena of host memory for backups: adjacent blocks, pinned or pageable, that are handed out in
// spans and kept for the next sleep. Several threads fault ordered blocks in while copies into
// earlier ones run. Each block is registered by itself until a view crosses its border.
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
#include "cumempool/cumempool.h"
#include "driver/driver.hpp"

namespace cumempool::backup {

// Thread-safe. Calls the driver and the kernel outside its lock. Calls that take a `device` run
// inside a ContextScope of it. A span may cross adjacent blocks; a copy call may not: see run().
class HostArena {
 public:
  // Addresses of an arena: enough for eight devices of twice today's size on one node.
  static constexpr std::size_t kAddressBytes = std::size_t{1} << 42;

  // `tier` is PINNED or PAGEABLE. Takes memory of `numa_node` if there is room; -1 is any node.
  HostArena(driver::Driver driver, cumempool_backup_tier tier, int numa_node, HostBudget& budget,
            std::size_t address_bytes = kAddressBytes);
  // If the driver refuses to unregister memory, it stays mapped: the driver may still write to it.
  ~HostArena();
  HostArena(const HostArena&) = delete;
  HostArena& operator=(const HostArena&) = delete;

  cumempool_backup_tier tier() const noexcept { return tier_; }

  // The free bytes, and the bytes of new blocks that `bytes` would need beside them.
  std::size_t free_bytes() const;
  std::size_t missing(std::size_t bytes) const;
  // Bytes of new blocks that the arena has addresses for. For the transition under way.
  std::uint64_t address_room();
  // Returns the error for a lack of addresses: CUMEMPOOL_OUT_OF_HOST_MEMORY.
  Error no_addresses() const;

  // Orders the blocks that `bytes` need beyond the free bytes, and starts to fault them in. One
  // thread at a time may order; cancel_order() ends an order. If the blocks do not fit into the
  // budget, or into the memory that the kernel leaves to the process, throws Error
  // (CUMEMPOOL_OUT_OF_HOST_MEMORY) before it touches any, and orders nothing.
  void order(std::size_t bytes);
  // Adds all blocks that are still on order as free room. Throws Error
  // (CUMEMPOOL_OUT_OF_HOST_MEMORY); the blocks added until then stay.
  void deliver(int device);
  // Gives back the ordered blocks that were not delivered.
  void cancel_order() noexcept;

  // Takes a span of 1 to `bytes` bytes from free room, from the order, or from a new block. Throws
  // Error (CUMEMPOOL_OUT_OF_HOST_MEMORY).
  HostSpan acquire(int device, std::size_t bytes);
  // Takes all `bytes` in one span.
  HostSpan acquire_whole(int device, std::size_t bytes);
  // Gives back a span, or several adjacent ones as one.
  void release(const HostSpan& span) noexcept;

  // Returns how many of the `bytes` bytes at `data` one copy call may use.
  std::size_t run(const std::byte* data, std::size_t bytes) const noexcept;
  // Puts acquired bytes into one registration, for programs that copy them in one call. Includes
  // all adjacent blocks: otherwise a range that grows block by block would be pinned over and over.
  // Waits for copies that use the blocks. Throws Error (CUMEMPOOL_OUT_OF_HOST_MEMORY), with
  // everything as before.
  void join(int device, const std::byte* data, std::size_t bytes);
  // Pins the blocks that join() or trim() has unpinned and could not pin again. Comes before any
  // copy. Throws Error (CUMEMPOOL_OUT_OF_HOST_MEMORY).
  void pin_lost(int device);

  // Gives back empty blocks, at most `most` bytes of them; returns their bytes.
  std::uint64_t trim(int device, std::uint64_t most = std::numeric_limits<std::uint64_t>::max());

  std::uint64_t held_bytes() const;
  std::uint64_t used_bytes() const;

 private:
  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);
  struct Block {
    std::size_t bytes = 0;
    std::size_t registration = kNone;  // the first slot of its registration
    bool delivered = false;
  };
  // Adjacent slots, filled by their blocks but for the last one.
  struct Slots {
    std::size_t first = 0;
    std::size_t last = 0;
  };
  // Blocks on order: mapped and being touched.
  struct Order {
    std::vector<std::size_t> slots;
    std::vector<std::size_t> ranges_until;  // per slot: the ranges up to its end
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
  const cumempool_backup_tier tier_;
  const int numa_node_;
  const std::size_t address_bytes_;
  HostBudget& budget_;
  std::byte* base_ = nullptr;  // of the reserved addresses
  std::size_t slot_count_ = 0;
  // For the transition under way. Other threads may release spans, which needs neither of these.
  std::map<std::size_t, Block> blocks_;  // by slot
  bool lost_pins_ = false;               // whether a delivered block may be without a registration
  std::unique_ptr<Order> order_;
  mutable std::mutex mutex_;  // guards the three below
  IntervalSet free_;          // offsets from base_
  std::uint64_t held_bytes_ = 0;
  std::uint64_t used_bytes_ = 0;
};

// Orders blocks of an arena, and cancels the order when it goes.
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
