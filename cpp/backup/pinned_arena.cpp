// Pinned host memory for backups: registered blocks, handed out in spans and kept for the next
// sleep.
#include "backup/pinned_arena.hpp"

#include <algorithm>
#include <exception>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "backup/pinned_block.hpp"

namespace cumempool::backup {
namespace {

// Large enough that a copy of one block runs at the link's rate, small enough that the first copies
// start while later blocks are still being pinned.
constexpr std::size_t kBlockBytes = std::size_t{32} << 20;
constexpr std::size_t kSmallBlockUnit = std::size_t{64} << 10;
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kPage = std::size_t{4} << 10;

std::size_t round_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

// Blocks of a huge page or more are whole huge pages; what is left over is small.
std::size_t block_bytes_for(std::size_t expected) {
  if (expected >= kBlockBytes) return kBlockBytes;
  return round_up(expected, expected >= kHugePage ? kHugePage : kSmallBlockUnit);
}

Error over_limit(std::uint64_t held, std::uint64_t bytes, std::uint64_t limit) {
  Error error(CUMEMPOOL_OUT_OF_HOST_MEMORY,
              "the backup needs " + format_bytes(bytes) + " more of host memory, " +
                  format_bytes(held) + " are held and the limit is " + format_bytes(limit));
  error.bytes = bytes;
  error.advice = "raise host_backup_limit, or discard tags instead of backing them up";
  return error;
}

std::vector<PageRange> ranges_of(const std::vector<std::unique_ptr<PinnedBlock>>& blocks) {
  std::vector<PageRange> ranges;
  ranges.reserve(blocks.size());
  for (const auto& block : blocks) ranges.push_back({block->data(), block->bytes()});
  return ranges;
}

}  // namespace

std::byte* HostSpan::data() const noexcept { return block->data() + offset; }

PinnedArena::PinnedArena(driver::Driver driver, std::uint64_t limit)
    : driver_(driver), limit_(limit) {}

PinnedArena::~PinnedArena() = default;

PinnedArena::Order::Order(std::vector<std::unique_ptr<PinnedBlock>> made)
    : blocks(std::move(made)), touch(ranges_of(blocks), FirstTouch::default_threads()) {}

void PinnedArena::order(std::size_t bytes) {
  cancel_order();
  const std::uint64_t free = held_bytes() - used_bytes();
  std::size_t needed = bytes - std::min<std::size_t>(bytes, free);
  std::vector<std::unique_ptr<PinnedBlock>> made;
  std::size_t claimed = 0;
  try {
    refuse_over_limit(needed);
    while (needed > 0) {
      const std::size_t size = claim_room(needed);
      claimed += size;
      made.push_back(std::make_unique<PinnedBlock>(driver_, size));
      needed -= std::min(needed, size);
    }
    if (!made.empty()) order_ = std::make_unique<Order>(std::move(made));
  } catch (const std::exception&) {
    unclaim_room(claimed);
    throw;
  }
}

void PinnedArena::cancel_order() noexcept {
  if (order_ == nullptr) return;
  std::size_t bytes = 0;
  for (const auto& block : order_->blocks) bytes += block == nullptr ? 0 : block->bytes();
  order_.reset();
  unclaim_room(bytes);
}

void PinnedArena::pin_order(int device) {
  while (order_ != nullptr && order_->delivered < order_->blocks.size()) add_block(device, 0);
}

HostSpan PinnedArena::acquire(int device, std::size_t bytes) {
  while (true) {
    const HostSpan span = take_free(bytes);
    if (span.bytes != 0) return span;
    add_block(device, bytes);
  }
}

HostSpan PinnedArena::take_free(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  if (with_room_.empty()) return {};
  HostSpan span{*with_room_.begin(), 0, 0};
  span.bytes = span.block->take(bytes, span.offset);
  used_bytes_ += span.bytes;
  if (span.block->full()) with_room_.erase(with_room_.begin());
  return span;
}

void PinnedArena::refuse_over_limit(std::size_t needed) const {
  const std::lock_guard lock(mutex_);
  if (limit_ == 0) return;
  const std::uint64_t room = limit_ - std::min(limit_, held_bytes_);
  if (round_up(needed, kPage) > room) throw over_limit(held_bytes_, needed, limit_);
}

// Bytes for the next block of `needed` more, entered as held before the slow part, so that two
// threads cannot overshoot the limit. Rounding up is never the reason for a refusal.
std::size_t PinnedArena::claim_room(std::size_t needed) {
  refuse_over_limit(std::min(needed, kBlockBytes));
  std::size_t bytes = block_bytes_for(needed);
  const std::lock_guard lock(mutex_);
  if (limit_ != 0 && held_bytes_ + bytes > limit_) bytes = round_up(needed, kPage);
  held_bytes_ += bytes;
  return bytes;
}

void PinnedArena::unclaim_room(std::size_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  held_bytes_ -= bytes;
}

// The next block of the order, touched; or a new one, which pinning will touch.
std::unique_ptr<PinnedBlock> PinnedArena::next_block(std::size_t bytes) {
  if (order_ != nullptr && order_->delivered < order_->blocks.size()) {
    const std::size_t next = order_->delivered++;
    order_->touch.wait(next);
    return std::move(order_->blocks[next]);
  }
  const std::size_t claimed = claim_room(bytes);
  try {
    return std::make_unique<PinnedBlock>(driver_, claimed);
  } catch (const std::exception&) {
    unclaim_room(claimed);
    throw;
  }
}

void PinnedArena::add_block(int device, std::size_t bytes) {
  std::unique_ptr<PinnedBlock> block = next_block(bytes);
  try {
    block->pin(device);
    const std::lock_guard lock(mutex_);
    blocks_.reserve(blocks_.size() + 1);
    with_room_.insert(block.get());
    blocks_.push_back(std::move(block));
  } catch (const std::exception&) {
    if (block != nullptr) unclaim_room(block->bytes());
    throw;
  }
}

void PinnedArena::release(const HostSpan& span) noexcept {
  if (span.bytes == 0) return;
  const std::lock_guard lock(mutex_);
  span.block->give_back(span.offset, span.bytes);
  with_room_.insert(span.block);
  used_bytes_ -= span.bytes;
}

std::uint64_t PinnedArena::trim(int device) noexcept {
  std::vector<std::unique_ptr<PinnedBlock>> empty;
  {
    const std::lock_guard lock(mutex_);
    const auto first_empty = std::stable_partition(
        blocks_.begin(), blocks_.end(), [](const auto& block) { return !block->empty(); });
    std::move(first_empty, blocks_.end(), std::back_inserter(empty));
    blocks_.erase(first_empty, blocks_.end());
    for (const auto& block : empty) with_room_.erase(block.get());
  }
  std::uint64_t released = 0;
  for (auto& block : empty) {
    if (block->unregister(device) != CUMEMPOOL_RESULT_SUCCESS) continue;
    released += block->bytes();
    block.reset();
  }
  const std::lock_guard lock(mutex_);
  held_bytes_ -= released;
  for (auto& block : empty) {  // what the driver would not take back stays in use
    if (block == nullptr) continue;
    with_room_.insert(block.get());
    blocks_.push_back(std::move(block));
  }
  return released;
}

std::uint64_t PinnedArena::held_bytes() const {
  const std::lock_guard lock(mutex_);
  return held_bytes_;
}

std::uint64_t PinnedArena::used_bytes() const {
  const std::lock_guard lock(mutex_);
  return used_bytes_;
}

}  // namespace cumempool::backup
