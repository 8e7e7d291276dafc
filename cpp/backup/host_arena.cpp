// An arena of host memory for backups.
#include "backup/host_arena.hpp"

#include <algorithm>
#include <chrono>
#include <exception>
#include <functional>
#include <string>
#include <utility>

#include "backup/host_limits.hpp"
#include "backup/host_pages.hpp"

namespace cumempool::backup {
namespace {

// Large enough that pinning runs at full speed, small enough that the first copies start while
// later blocks are still being pinned.
constexpr std::size_t kBlockBytes = std::size_t{64} << 20;
constexpr std::size_t kTouchBytes = std::size_t{32} << 20;  // touched by one thread at a time
constexpr std::size_t kPage = std::size_t{4} << 10;
// How often the room is read while memory is touched; some hundred MiB are touched meanwhile.
constexpr std::chrono::milliseconds kReadRoomAgain{5};

std::size_t round_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

// Rounds to small pages, so that the arena holds no more than backups need. The kernel uses huge
// pages for as much of it as it can.
std::size_t block_bytes_for(std::size_t expected) {
  return std::min(kBlockBytes, round_up(expected, kPage));
}

// Returns a function for FirstTouch that tells whether the process still has room for backups.
std::function<bool()> watch_room() {
  using Clock = std::chrono::steady_clock;
  return [has_room = true, next = Clock::now() + kReadRoomAgain]() mutable noexcept {
    const auto now = Clock::now();
    if (!has_room || now < next) return has_room;
    next = now + kReadRoomAgain;
    try {
      has_room = host_room().for_backups() != 0;
    } catch (const std::exception&) {
      return true;  // no memory to read it: the check at the order has to do
    }
    return has_room;
  };
}

void not_pinned(Error& error) {
  error.pin_refused = !loses_context(error.result);
  if (error.status == CUMEMPOOL_UNSUPPORTED) {
    error.problem = "host memory for a backup cannot be pinned here";
    return;  // keeps its advice
  }
  error.status = CUMEMPOOL_OUT_OF_HOST_MEMORY;
  error.problem = "host memory for a backup could not be pinned";
  error.advice = "free host memory, or raise the limit on locked memory (ulimit -l)";
}

}  // namespace

HostArena::HostArena(driver::Driver driver, cumempool_backup_tier tier, int numa_node,
                     HostBudget& budget, std::size_t address_bytes)
    : driver_(driver),
      tier_(tier),
      numa_node_(numa_node),
      address_bytes_(address_bytes),
      budget_(budget) {}

HostArena::~HostArena() {
  cancel_order();
  bool all_gone = true;
  for (const auto& [slot, block] : blocks_) {
    if (block.registration != kNone) {
      all_gone = false;
    } else {
      decommit_pages(address_of(slot), block.bytes);
    }
    budget_.unclaim(block.bytes);
  }
  if (all_gone && base_ != nullptr) unreserve_pages(base_, slot_count_ * kBlockBytes);
}

std::byte* HostArena::address_of(std::size_t slot) const noexcept {
  return base_ + slot * kBlockBytes;
}

std::size_t HostArena::run(const std::byte* data, std::size_t bytes) const noexcept {
  const auto offset = static_cast<std::size_t>(data - base_);
  return std::min(bytes, kBlockBytes - offset % kBlockBytes);
}

// ---- orders -------------------------------------------------------------------------------------

void HostArena::order(std::size_t bytes) {
  cancel_order();
  std::size_t needed = bytes - std::min(bytes, free_bytes());
  if (needed == 0) return;
  refuse(needed);
  auto order = std::make_unique<Order>();
  order->slots.reserve(needed / kBlockBytes + 1);
  try {
    std::size_t next = slot_after_last();
    while (needed > 0) {
      order->slots.push_back(map_block(needed, next));
      next = order->slots.back() + 1;
      needed -= std::min(needed, blocks_.at(order->slots.back()).bytes);
    }
    start_touching(*order);
  } catch (const std::exception&) {
    for (const std::size_t slot : order->slots) unmap_block(slot);
    throw;
  }
  order_ = std::move(order);
}

void HostArena::start_touching(Order& order) const {
  std::vector<HostSpan> ranges;
  for (const std::size_t slot : order.slots) {
    const std::size_t bytes = blocks_.at(slot).bytes;
    for (std::size_t at = 0; at < bytes; at += kTouchBytes) {
      ranges.push_back({address_of(slot) + at, std::min(kTouchBytes, bytes - at)});
    }
    order.ranges_until.push_back(ranges.size());
  }
  order.touch =
      std::make_unique<FirstTouch>(std::move(ranges), FirstTouch::default_threads(), watch_room());
}

void HostArena::deliver(int device) {
  while (order_ != nullptr) deliver_next(device);
}

void HostArena::deliver_next(int device) {
  const std::size_t next = order_->delivered;
  const std::size_t slot = order_->slots[next];
  const std::size_t first = next == 0 ? 0 : order_->ranges_until[next - 1];
  for (std::size_t i = first; i < order_->ranges_until[next]; ++i) {
    if (!order_->touch->wait(i)) throw host_room().refusal(blocks_.at(slot).bytes);
  }
  ++order_->delivered;
  if (order_->delivered == order_->slots.size()) order_.reset();
  add_block(device, slot);
}

void HostArena::cancel_order() noexcept {
  if (order_ == nullptr) return;
  order_->touch.reset();  // joins the threads before the blocks go
  for (std::size_t i = order_->delivered; i < order_->slots.size(); ++i) {
    unmap_block(order_->slots[i]);
  }
  order_.reset();
}

// ---- blocks -------------------------------------------------------------------------------------

void HostArena::refuse(std::size_t needed) const {
  const std::size_t bytes = round_up(needed, kPage);
  if (bytes > budget_.room()) throw budget_.refusal(needed);
  const HostRoom room = host_room();
  if (bytes > room.for_backups()) throw room.refusal(bytes);
}

std::size_t HostArena::free_bytes() const {
  const std::lock_guard lock(mutex_);
  return free_.total();
}

std::size_t HostArena::missing(std::size_t bytes) const {
  return round_up(bytes - std::min(bytes, free_bytes()), kPage);
}

Error HostArena::no_addresses() const {
  const std::size_t got = slot_count_ * kBlockBytes;
  Error error(CUMEMPOOL_OUT_OF_HOST_MEMORY, "all " + format_bytes(got) +
                                                " of addresses for backups near one NUMA node are "
                                                "in use");
  error.advice = got < address_bytes_
                     ? "raise the limit on virtual memory (ulimit -v)"
                     : "wake other tags and call release_host_memory(), or keep backups of some "
                       "tags in files or on another device";
  return error;
}

std::uint64_t HostArena::address_room() {
  try {
    reserve_addresses();
  } catch (const Error&) {
    return 0;
  }
  return (slot_count_ - blocks_.size()) * std::uint64_t{kBlockBytes};
}

std::size_t HostArena::slot_after_last() const {
  return blocks_.empty() ? 0 : blocks_.rbegin()->first + 1;
}

// Claims budget for the next block of `needed` more bytes; returns the size of the block.
std::size_t HostArena::claim_room(std::size_t needed) {
  const std::size_t bytes = block_bytes_for(needed);
  if (!budget_.claim(bytes)) throw budget_.refusal(needed);
  return bytes;
}

void HostArena::reserve_addresses() {
  if (base_ != nullptr) return;
  std::size_t got = 0;
  base_ = reserve_pages(address_bytes_, kBlockBytes, got);
  slot_count_ = got / kBlockBytes;
}

// Maps the next block of `needed` more bytes at `from_slot`, or, if that is taken, at the first
// free slot; returns the slot.
std::size_t HostArena::map_block(std::size_t needed, std::size_t from_slot) {
  reserve_addresses();
  std::size_t slot = from_slot;
  if (slot >= slot_count_ || blocks_.count(slot) != 0) {
    for (slot = 0; slot < slot_count_ && blocks_.count(slot) != 0;) ++slot;
  }
  if (slot == slot_count_) {
    throw no_addresses();
  }
  const std::size_t bytes = claim_room(needed);
  try {
    commit_pages(address_of(slot), bytes, numa_node_);
    blocks_.emplace(slot, Block{bytes, kNone, false});
  } catch (const std::exception&) {
    decommit_pages(address_of(slot), bytes);
    budget_.unclaim(bytes);
    throw;
  }
  const std::lock_guard lock(mutex_);
  held_bytes_ += bytes;
  return slot;
}

// Unmaps a block that is not registered.
void HostArena::unmap_block(std::size_t slot) noexcept {
  const std::size_t bytes = blocks_.find(slot)->second.bytes;
  decommit_pages(address_of(slot), bytes);
  budget_.unclaim(bytes);
  blocks_.erase(slot);
  const std::lock_guard lock(mutex_);
  held_bytes_ -= bytes;
}

void HostArena::add_block(int device, std::size_t slot) {
  Block& block = blocks_.at(slot);
  try {
    if (tier_ == CUMEMPOOL_BACKUP_PINNED) {
      driver_.host_register(device, address_of(slot), block.bytes);
      block.registration = slot;
    }
    const std::lock_guard lock(mutex_);
    free_.add(slot * kBlockBytes, block.bytes);
    block.delivered = true;
  } catch (Error& error) {
    unmap_block(slot);
    not_pinned(error);
    throw;
  } catch (const std::exception&) {  // no memory for the bookkeeping
    if (block.registration == kNone || unpin(device, slot) == CUMEMPOOL_RESULT_SUCCESS) {
      unmap_block(slot);
    }
    throw;
  }
}

// ---- registrations ------------------------------------------------------------------------------

// Returns the registered block of a slot; null if there is none.
const HostArena::Block* HostArena::neighbour(std::size_t slot) const noexcept {
  const auto found = blocks_.find(slot);
  if (found == blocks_.end() || found->second.registration == kNone) return nullptr;
  return &found->second;
}

// Extends the slots by all adjacent registered blocks, without a gap between their bytes.
HostArena::Slots HostArena::neighbours_of(Slots slots) const noexcept {
  while (slots.first != 0) {
    const Block* const before = neighbour(slots.first - 1);
    if (before == nullptr || before->bytes != kBlockBytes) break;
    --slots.first;
  }
  while (blocks_.find(slots.last)->second.bytes == kBlockBytes &&
         neighbour(slots.last + 1) != nullptr) {
    ++slots.last;
  }
  return slots;
}

std::vector<HostArena::Slots> HostArena::registrations_in(const Slots& slots) const {
  std::vector<Slots> found;
  for (std::size_t slot = slots.first; slot <= slots.last; ++slot) {
    const std::size_t registration = blocks_.at(slot).registration;
    if (registration == kNone) continue;
    if (found.empty() || found.back().first != registration) found.push_back({registration, slot});
    found.back().last = slot;
  }
  return found;
}

cumempool_result HostArena::pin(int device, const Slots& slots) noexcept {
  const auto& table = driver_.table();
  const std::size_t bytes =
      (slots.last - slots.first) * kBlockBytes + blocks_.find(slots.last)->second.bytes;
  const cumempool_result result =
      table.host_register(table.self, device, address_of(slots.first), bytes);
  if (result != CUMEMPOOL_RESULT_SUCCESS) return result;
  for (std::size_t slot = slots.first; slot <= slots.last; ++slot) {
    blocks_.find(slot)->second.registration = slots.first;
  }
  return result;
}

cumempool_result HostArena::unpin(int device, std::size_t registration) noexcept {
  const auto& table = driver_.table();
  const cumempool_result result =
      table.host_unregister(table.self, device, address_of(registration));
  if (result != CUMEMPOOL_RESULT_SUCCESS) return result;
  for (auto block = blocks_.find(registration);
       block != blocks_.end() && block->second.registration == registration; ++block) {
    block->second.registration = kNone;
  }
  return result;
}

// Pins the given slots again, if they are not registered.
void HostArena::pin_again(int device, const std::vector<Slots>& registrations) noexcept {
  for (const Slots& slots : registrations) {
    if (blocks_.find(slots.first)->second.registration != kNone) continue;
    if (pin(device, slots) != CUMEMPOOL_RESULT_SUCCESS) lost_pins_ = true;
  }
}

void HostArena::join(int device, const std::byte* data, std::size_t bytes) {
  if (tier_ != CUMEMPOOL_BACKUP_PINNED) return;
  pin_lost(device);
  const auto offset = static_cast<std::size_t>(data - base_);
  const Slots wanted{offset / kBlockBytes, (offset + bytes - 1) / kBlockBytes};
  if (blocks_.at(wanted.first).registration == blocks_.at(wanted.last).registration) return;
  const Slots all = neighbours_of(wanted);
  const std::vector<Slots> before = registrations_in(all);
  const char* call = "host_unregister";
  cumempool_result result = CUMEMPOOL_RESULT_SUCCESS;
  for (const Slots& slots : before) {
    result = unpin(device, slots.first);
    if (result != CUMEMPOOL_RESULT_SUCCESS) break;
  }
  if (result == CUMEMPOOL_RESULT_SUCCESS) {
    call = "host_register";
    result = pin(device, all);
  }
  if (result == CUMEMPOOL_RESULT_SUCCESS) return;
  pin_again(device, before);
  try {
    driver::check(driver_.table(), call, result, device, bytes);
  } catch (Error& error) {
    not_pinned(error);
    throw;
  }
}

void HostArena::pin_lost(int device) {
  if (!lost_pins_) return;
  for (auto& [slot, block] : blocks_) {
    if (!block.delivered || block.registration != kNone) continue;
    try {
      driver_.host_register(device, address_of(slot), block.bytes);
    } catch (Error& error) {
      not_pinned(error);
      throw;
    }
    block.registration = slot;
  }
  lost_pins_ = false;
}

// Unregisters the blocks of a registration, and registers again the runs of delivered blocks among
// them. False if the driver refuses to unregister.
bool HostArena::split(int device, std::size_t registration) noexcept {
  const auto first = blocks_.find(registration);
  auto end = first;
  while (end != blocks_.end() && end->second.registration == registration) ++end;
  if (unpin(device, registration) != CUMEMPOOL_RESULT_SUCCESS) return false;
  for (auto block = first; block != end;) {
    if (!block->second.delivered) {
      ++block;
      continue;
    }
    Slots kept{block->first, block->first};
    for (++block; block != end && block->second.delivered; ++block) kept.last = block->first;
    if (pin(device, kept) != CUMEMPOOL_RESULT_SUCCESS) lost_pins_ = true;
  }
  return true;
}

// ---- spans --------------------------------------------------------------------------------------

HostSpan HostArena::take_free(std::size_t bytes, bool whole) {
  const std::lock_guard lock(mutex_);
  HostSpan span;
  if (const auto offset = free_.take_first_fit(bytes)) {
    span = {base_ + *offset, bytes};
  } else if (!whole) {
    // The next block will continue the last interval.
    const auto [last, taken] = free_.take_last(bytes);
    if (taken != 0) span = {base_ + last, taken};
  }
  used_bytes_ += span.bytes;
  return span;
}

HostSpan HostArena::acquire(int device, std::size_t bytes) {
  while (true) {
    const HostSpan span = take_free(bytes, false);
    if (span.bytes != 0) return span;
    if (order_ != nullptr) {
      deliver_next(device);
    } else {
      refuse(block_bytes_for(bytes));
      add_block(device, map_block(bytes, slot_after_last()));
    }
  }
}

HostSpan HostArena::acquire_whole(int device, std::size_t bytes) {
  const HostSpan span = take_free(bytes, true);
  if (span.bytes != 0) return span;
  refuse(bytes);
  // Adjacent new blocks behind all others; all but the last fill their slots.
  std::size_t slot = slot_after_last();
  for (std::size_t done = 0; done < bytes; done += kBlockBytes) {
    slot = map_block(bytes - done, slot);
    add_block(device, slot);
    ++slot;
  }
  const HostSpan made = take_free(bytes, true);
  if (made.bytes != 0) return made;
  Error error(CUMEMPOOL_OUT_OF_HOST_MEMORY,
              "no contiguous range of " + format_bytes(bytes) + " of addresses is free");
  error.advice = "wake other tags and call release_host_memory()";
  throw error;
}

void HostArena::release(const HostSpan& span) noexcept {
  if (span.bytes == 0) return;
  const std::lock_guard lock(mutex_);
  free_.give_back(static_cast<std::size_t>(span.data - base_), span.bytes);
  used_bytes_ -= span.bytes;
}

// Takes empty blocks, at most `most` bytes of them, out of the free room.
std::vector<std::size_t> HostArena::take_empty_blocks(std::uint64_t most) {
  const std::lock_guard lock(mutex_);
  std::vector<std::size_t> empty;
  empty.reserve(blocks_.size());
  for (auto& [slot, block] : blocks_) {
    const std::size_t offset = slot * kBlockBytes;
    if (!block.delivered || block.bytes > most) continue;
    if (!free_.contains(offset, block.bytes)) continue;
    try {
      free_.take_exact(offset, block.bytes);
    } catch (const std::exception&) {
      break;  // no memory to take more: the blocks taken so far go, which frees some
    }
    block.delivered = false;
    most -= block.bytes;
    empty.push_back(slot);
  }
  return empty;
}

std::uint64_t HostArena::trim(int device, std::uint64_t most) {
  std::uint64_t released = 0;
  for (const std::size_t slot : take_empty_blocks(most)) {
    Block& block = blocks_.find(slot)->second;
    if (block.registration != kNone && !split(device, block.registration)) {
      const std::lock_guard lock(mutex_);  // the driver refuses: the block stays
      free_.give_back(slot * kBlockBytes, block.bytes);
      block.delivered = true;
      continue;
    }
    released += block.bytes;
    unmap_block(slot);
  }
  if (blocks_.empty() && base_ != nullptr) {
    unreserve_pages(base_, slot_count_ * kBlockBytes);
    base_ = nullptr;
    slot_count_ = 0;
  }
  return released;
}

std::uint64_t HostArena::held_bytes() const {
  const std::lock_guard lock(mutex_);
  return held_bytes_;
}

std::uint64_t HostArena::used_bytes() const {
  const std::lock_guard lock(mutex_);
  return used_bytes_;
}

}  // namespace cumempool::backup
