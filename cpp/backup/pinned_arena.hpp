// Pinned host memory for backups: blocks of mmap memory registered with the driver, handed out in
// spans and kept for the next sleep. Blocks that are on order are faulted in by several threads
// while the copies into earlier ones run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "backup/first_touch.hpp"
#include "driver/driver.hpp"

namespace cumempool::backup {

class PinnedBlock;

// Part of one block; never crosses a registration border, so one copy call may use all of it.
struct HostSpan {
  PinnedBlock* block = nullptr;
  std::size_t offset = 0;
  std::size_t bytes = 0;
  std::byte* data() const noexcept;
};

// Thread-safe. Registration and unregistration happen outside its lock.
class PinnedArena {
 public:
  // `limit` bytes are held at the most; 0 = no limit.
  PinnedArena(driver::Driver driver, std::uint64_t limit);
  ~PinnedArena();
  PinnedArena(const PinnedArena&) = delete;
  PinnedArena& operator=(const PinnedArena&) = delete;

  // Orders the blocks that `bytes` more than what is free will need, and starts to fault them in.
  // Orders are for one thread at a time, and end with cancel_order(). Throws Error
  // (CUMEMPOOL_OUT_OF_HOST_MEMORY), with nothing ordered: what will not fit is refused here, before
  // any of it is pinned.
  void order(std::size_t bytes);
  // Pins all that is still on order, as free room. Inside a ContextScope of `device`. Throws Error
  // (CUMEMPOOL_OUT_OF_HOST_MEMORY); what was pinned until then stays.
  void pin_order(int device);
  // Gives back what was ordered and not acquired.
  void cancel_order() noexcept;

  // One span of 1 to `bytes` bytes, from free room, from the order, or from a block made for it.
  // Inside a ContextScope of `device`. Throws Error (CUMEMPOOL_OUT_OF_HOST_MEMORY).
  HostSpan acquire(int device, std::size_t bytes);
  void release(const HostSpan& span) noexcept;

  // Unregisters and unmaps the blocks that hold nothing; returns their bytes. Inside a
  // ContextScope.
  std::uint64_t trim(int device) noexcept;

  std::uint64_t held_bytes() const;
  std::uint64_t used_bytes() const;

 private:
  // Blocks on order: mapped, in the course of being touched, not pinned.
  struct Order {
    explicit Order(std::vector<std::unique_ptr<PinnedBlock>> made);
    std::vector<std::unique_ptr<PinnedBlock>> blocks;
    std::size_t delivered = 0;
    FirstTouch touch;  // last: its threads end before the blocks go
  };

  HostSpan take_free(std::size_t bytes);
  std::unique_ptr<PinnedBlock> next_block(std::size_t bytes);
  void refuse_over_limit(std::size_t needed) const;
  std::size_t claim_room(std::size_t needed);
  void unclaim_room(std::size_t bytes) noexcept;
  void add_block(int device, std::size_t bytes);

  driver::Driver driver_;
  const std::uint64_t limit_;
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<PinnedBlock>> blocks_;
  std::set<PinnedBlock*> with_room_;
  std::unique_ptr<Order> order_;  // of the transition under way
  std::uint64_t held_bytes_ = 0;
  std::uint64_t used_bytes_ = 0;
};

// An order that ends with the object.
class ArenaOrder {
 public:
  // Throws Error (CUMEMPOOL_OUT_OF_HOST_MEMORY).
  ArenaOrder(PinnedArena& arena, std::size_t bytes) : arena_(arena) { arena_.order(bytes); }
  ~ArenaOrder() { arena_.cancel_order(); }
  ArenaOrder(const ArenaOrder&) = delete;
  ArenaOrder& operator=(const ArenaOrder&) = delete;

 private:
  PinnedArena& arena_;
};

}  // namespace cumempool::backup
