// What each transition does to what lives.
#include "model.hpp"

#include <algorithm>
#include <utility>

namespace cumempool::fuzz {

const SleepSpec::Action* SleepSpec::action_of(const Block& block) const noexcept {
  const auto found = std::find_if(actions.begin(), actions.end(),
                                  [&](const Action& action) { return action.tag == block.tag; });
  return found == actions.end() ? nullptr : &*found;
}

bool SleepSpec::discards(const Block& block) const noexcept {
  const Action* action = action_of(block);
  return action != nullptr && action->discard && !block.preserved;
}

bool WakeSpec::wakes(const Block& block) const noexcept {
  if (block.awake()) return false;
  return all ? !except.at(block.tag) : tags.at(block.tag);
}

Mask dead_bytes(const Block& block, const SleepSpec& spec) {
  Mask dead;
  const cumempool_address end = block.address + block.bytes;
  for (const auto& [address, bytes] : spec.dead) {
    const cumempool_address from = std::max(address, block.address);
    const cumempool_address to = std::min(address + bytes, end);
    if (from >= to) continue;
    dead.resize(block.bytes);
    std::fill(dead.begin() + static_cast<std::ptrdiff_t>(from - block.address),
              dead.begin() + static_cast<std::ptrdiff_t>(to - block.address), std::uint8_t{0xFF});
  }
  return dead;
}

bool all_set(const Mask& mask) noexcept {
  return !mask.empty() &&
         std::all_of(mask.begin(), mask.end(), [](std::uint8_t byte) { return byte != 0; });
}

bool any_set(const Mask& mask, std::size_t offset, std::size_t count) noexcept {
  const auto from = mask.begin() + static_cast<std::ptrdiff_t>(offset);
  return std::any_of(from, from + static_cast<std::ptrdiff_t>(count),
                     [](std::uint8_t byte) { return byte != 0; });
}

Model::Model() { reset_tags(); }

void Model::reset_tags() {
  // Plain ones, one that is not ASCII, and the longest there can be.
  const std::array<std::string, kTags> names = {"weights", "kv", "zero", "\xC3\xA9t\xC3\xA9",
                                                std::string(255, 'x')};
  for (std::size_t i = 0; i < kTags; ++i) {
    tags.at(i) = Tag{};
    tags.at(i).name = names.at(i);
  }
}

Block* Model::find(std::uint64_t id) noexcept {
  const auto found = std::find_if(blocks.begin(), blocks.end(),
                                  [id](const Block& block) { return block.id == id; });
  return found == blocks.end() ? nullptr : &*found;
}

Block* Model::shown_by(const Share& share) noexcept {
  Block* block = share.parted ? nullptr : find(share.block);
  const bool shown = block != nullptr && block->awake() && block->generation == share.generation;
  return shown ? block : nullptr;
}

void Model::add(Share share) {
  share.parted = shown_by(share) == nullptr;
  for (const Share& other : shares) {
    if (other.block == share.block && other.generation == share.generation) {
      share.contents = other.contents;
    }
  }
  shares.push_back(std::move(share));
}

void Model::write(Share& share, std::uint8_t seed, std::uint8_t* memory) {
  Block* block = shown_by(share);
  if (block != nullptr) return block->contents.write(0, block->bytes, seed, memory);
  for (Share& other : shares) {
    if (other.block != share.block || other.generation != share.generation) continue;
    other.contents.write(0, other.contents.size(), seed, &other == &share ? memory : nullptr);
  }
}

// From now on the shares of its memory are on their own.
void Model::part_from_shares(const Block& block) {
  for (Share& share : shares) {
    if (shown_by(share) != &block) continue;
    share.contents = block.contents;
    share.parted = true;
  }
}

void Model::remove(std::uint64_t id) {
  const auto found = std::find_if(blocks.begin(), blocks.end(),
                                  [id](const Block& block) { return block.id == id; });
  part_from_shares(*found);
  blocks.erase(found);
}

// ---- success ------------------------------------------------------------------------------------

void Model::put_to_sleep(Block& block, const SleepSpec& spec, bool discard) {
  part_from_shares(block);
  block.dead = dead_bytes(block, spec);
  const bool lost = discard || all_set(block.dead);
  block.state = lost ? CUMEMPOOL_ASLEEP_DISCARDED : CUMEMPOOL_ASLEEP_BACKED_UP;
  block.epoch += 1;
  block.may_hold = false;
  if (lost) {
    block.contents.forget();
  } else if (!block.dead.empty()) {
    block.contents.forget(block.dead);
  }
}

void Model::sleep(const SleepSpec& spec) {
  for (Block& block : blocks) {
    const SleepSpec::Action* action = spec.action_of(block);
    if (action == nullptr || !current(block) || block.vacated) continue;
    if (block.awake()) {
      put_to_sleep(block, spec, spec.discards(block));
    } else if (block.state == CUMEMPOOL_ASLEEP_BACKED_UP) {
      if (!spec.discards(block) || !spec.drop_backups) continue;
      block.state = CUMEMPOOL_ASLEEP_DISCARDED;
      block.epoch += 1;
      block.contents.forget();
    } else if (spec.discards(block) || all_set(dead_bytes(block, spec))) {
      // Memory that was still held, and had the contents, goes now.
      block.contents.forget();
      block.may_hold = false;
    }
  }
}

// Discarded memory that comes back.
void Model::zero_or_undefined(Block& block) const {
  if (!block.may_hold && tags.at(block.tag).zero_on_wake) block.contents.fill(0, block.bytes, 0);
}

void Model::wake(Block& block) {
  if (block.state == CUMEMPOOL_ASLEEP_DISCARDED) zero_or_undefined(block);
  block.state = CUMEMPOOL_AWAKE;
  block.generation += 1;
  block.epoch += 1;
  block.may_hold = false;
}

void Model::wake(const WakeSpec& spec) {
  for (Block& block : blocks) {
    if (current(block) && !block.vacated && spec.wakes(block)) wake(block);
  }
}

void Model::vacate(Block& block) {
  block.vacated = true;
  if (block.ordinary()) return;
  part_from_shares(block);
  block.state = CUMEMPOOL_ASLEEP_DISCARDED;
  block.epoch += 1;
  block.contents.forget();
}

// ---- failure ------------------------------------------------------------------------------------

std::optional<std::string> Model::take_on(Block& block, const cumempool_allocation_info& now,
                                          const SleepSpec& spec, bool is_swap, bool told) {
  const SleepSpec::Action* action = spec.action_of(block);
  if (now.state == block.state && now.generation == block.generation) return std::nullopt;
  if (action == nullptr || !block.awake()) return "memory that the sleep was not about has changed";
  const Mask dead = dead_bytes(block, spec);
  const bool given_up = spec.discards(block) || all_set(dead);
  part_from_shares(block);
  if (now.state == CUMEMPOOL_AWAKE) {  // it had gone, and was made again
    if (given_up) return "memory without a backup was released and made again";
    if (now.generation != block.generation + 1) return "the generation grew by more than one";
    block.generation = now.generation;
    if (!dead.empty()) block.contents.forget(dead);
    return std::nullopt;
  }
  if (!told) return "memory stays asleep and no secondary failure says so";
  if (now.generation != block.generation) return "memory that stays asleep has a new generation";
  if (given_up != (now.state == CUMEMPOOL_ASLEEP_DISCARDED)) {
    return given_up ? "discarded memory has a backup" : "memory has lost its backup";
  }
  block.state = now.state;
  block.epoch += 1;
  block.may_hold = true;
  block.dead = dead;
  // A swap may have used what it discards. A sleep has not: the handle has the contents.
  if (given_up && is_swap) block.contents.forget();
  if (!given_up && !dead.empty()) block.contents.forget(dead);
  return std::nullopt;
}

}  // namespace cumempool::fuzz
