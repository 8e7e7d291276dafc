// Pinned host memory for backups: registered blocks, handed out in spans and kept for the next
// sleep.
#include "backup/pinned_arena.hpp"

#include <algorithm>
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

}  // namespace

std::byte* HostSpan::data() const noexcept { return block->data() + offset; }

PinnedArena::PinnedArena(driver::Driver driver, std::uint64_t limit)
    : driver_(driver), limit_(limit) {}

PinnedArena::~PinnedArena() = default;

HostSpan PinnedArena::acquire(int device, std::size_t bytes, std::size_t expected) {
  while (true) {
    const HostSpan span = take_free(bytes);
    if (span.bytes != 0) return span;
    add_block(device, std::max(bytes, expected));
  }
}

HostSpan PinnedArena::take_free(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  if (with_room_.empty()) return {};
  HostSpan span{with_room_.begin()->second, 0, 0};
  span.bytes = span.block->take(bytes, span.offset);
  used_bytes_ += span.bytes;
  if (span.block->full()) with_room_.erase(with_room_.begin());
  return span;
}

// Bytes for the next block of `needed` more. Refuses what will not fit before any of it is pinned;
// rounding up never is the reason.
std::size_t PinnedArena::claim_room(std::size_t needed) {
  std::size_t bytes = block_bytes_for(needed);
  const std::lock_guard lock(mutex_);
  if (limit_ != 0) {
    const std::uint64_t room = limit_ - std::min(limit_, held_bytes_);
    if (round_up(needed, kPage) > room) throw over_limit(held_bytes_, needed, limit_);
    if (bytes > room) bytes = round_up(needed, kPage);
  }
  held_bytes_ += bytes;  // claimed before the slow part, so that two threads cannot overshoot
  return bytes;
}

void PinnedArena::add_block(int device, std::size_t needed) {
  const std::size_t bytes = claim_room(needed);
  std::uint64_t order = 0;
  {
    const std::lock_guard lock(mutex_);
    order = created_++;
  }
  try {
    auto block = std::make_unique<PinnedBlock>(driver_, device, bytes, order);
    const std::lock_guard lock(mutex_);
    with_room_.emplace(order, block.get());
    const PinnedBlock* key = block.get();
    blocks_.emplace(key, std::move(block));
  } catch (const Error&) {
    const std::lock_guard lock(mutex_);
    held_bytes_ -= bytes;
    throw;
  }
}

void PinnedArena::release(const HostSpan& span) noexcept {
  if (span.bytes == 0) return;
  const std::lock_guard lock(mutex_);
  span.block->give_back(span.offset, span.bytes);
  with_room_.emplace(span.block->order(), span.block);
  used_bytes_ -= span.bytes;
}

std::uint64_t PinnedArena::trim(int device) noexcept {
  std::vector<std::unique_ptr<PinnedBlock>> empty;
  {
    const std::lock_guard lock(mutex_);
    for (auto at = blocks_.begin(); at != blocks_.end();) {
      if (at->second->empty()) {
        with_room_.erase(at->second->order());
        empty.push_back(std::move(at->second));
        at = blocks_.erase(at);
      } else {
        at = std::next(at);
      }
    }
  }
  std::uint64_t released = 0;
  for (auto& block : empty) {
    if (block->unregister(device) == CUMEMPOOL_RESULT_SUCCESS) {
      released += block->bytes();
      block.reset();
    }
  }
  const std::lock_guard lock(mutex_);
  held_bytes_ -= released;
  for (auto& block : empty) {  // what the driver would not take back stays in use
    if (block == nullptr) continue;
    with_room_.emplace(block->order(), block.get());
    const PinnedBlock* key = block.get();
    blocks_.emplace(key, std::move(block));
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
