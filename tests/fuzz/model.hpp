// The simple model that the library is held to: what lives, in which state, with which contents,
// and what each transition does to that.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "contents.hpp"
#include "cumempool/cumempool.h"

namespace cumempool::fuzz {

struct Tag {
  std::string name;
  bool declared = false;
  bool zero_on_wake = false;
  cumempool_backup_tier tier = CUMEMPOOL_BACKUP_PINNED;
  bool bad_directory = false;
  int peer = 0;
  cumempool_backing backing = CUMEMPOOL_BACKING_VMM;
  bool all_peers = false;
  std::vector<std::int32_t> peers;
  bool rdma = true;
  std::vector<std::uint64_t> pins;
};

constexpr std::size_t kTags = 5;

struct Block {
  explicit Block(std::size_t rounded) : bytes(rounded), contents(rounded) {}

  bool awake() const noexcept { return state == CUMEMPOOL_AWAKE; }
  bool ordinary() const noexcept { return backing == CUMEMPOOL_BACKING_CUDA_MALLOC; }

  std::uint64_t id = 0;
  std::size_t allocator = 0;  // by number
  cumempool_address address = 0;
  std::size_t bytes;
  std::size_t requested = 0;
  std::size_t tag = 0;
  int device = 0;
  cumempool_backing backing = CUMEMPOOL_BACKING_VMM;
  bool preserved = false;
  cumempool_state state = CUMEMPOOL_AWAKE;
  std::uint64_t generation = 1;
  std::uint64_t epoch = 0;  // grows when it goes to sleep, when it wakes, when its backup goes
  Contents contents;
  Mask dead;                       // what its last sleep was told to be dead
  bool may_hold = false;           // asleep since something failed: its memory may be there still
  bool busy = false;               // the program's own work on it may be in flight
  bool vacated = false;            // its allocator was closed by force
  std::uint64_t backup_bytes = 0;  // as the last snapshot had it
  cumempool_backup_tier backup_tier = CUMEMPOOL_BACKUP_UNSET;
};

// What an imported handle shows.
struct Share {
  cumempool_shared* handle = nullptr;
  cumempool_address address = 0;
  std::uint64_t block = 0;  // whose memory it is, or was, and in which generation
  std::uint64_t generation = 0;
  bool parted = false;  // that block has gone, or is of another generation
  bool writable = false;
  Contents contents;  // since it has parted
};

struct SleepSpec {
  struct Action {
    std::size_t tag;
    bool discard;
  };
  const Action* action_of(const Block& block) const noexcept;
  // Whether the contents of a block that it is about are given up.
  bool discards(const Block& block) const noexcept;

  std::vector<Action> actions;
  bool drop_backups = false;
  bool streams = false;
  std::vector<cumempool_extent> dead;
};

struct WakeSpec {
  bool wakes(const Block& block) const noexcept;

  bool all = false;
  std::array<bool, kTags> tags{};
  std::array<bool, kTags> except{};  // of all
};

class Model {
 public:
  Model();

  // For a new allocator.
  void reset_tags();
  std::size_t allocator = 0;  // the current one

  std::array<Tag, kTags> tags;
  std::vector<Block> blocks;
  std::vector<Share> shares;

  bool current(const Block& block) const noexcept { return block.allocator == allocator; }
  Block* find(std::uint64_t id) noexcept;
  // The block that a share shows, if it still does.
  Block* shown_by(const Share& share) noexcept;
  // Parted, and after failures: that block may have the same memory again. Nothing is known.
  bool vague(const Share& share) noexcept { return disturbed && shown_by(share) == nullptr; }
  void add(Share share);
  // Writes through a share that is not vague, to all that show the same.
  void write(Share& share, std::uint8_t seed, std::uint8_t* memory);
  void remove(std::uint64_t id);

  // What the calls do where they succeed.
  void sleep(const SleepSpec& spec);
  void wake(const WakeSpec& spec);
  void wake(Block& block);
  // Its allocator was closed by force. Ordinary memory stays until it is freed.
  void vacate(Block& block);
  // A sleep failed for reasons that nothing could be done about: takes on what became of a block of
  // it, or says what is wrong with that. `told`: the error has secondary failures.
  std::optional<std::string> take_on(Block& block, const cumempool_allocation_info& now,
                                     const SleepSpec& spec, bool is_swap, bool told);
  // Some driver call has failed at some time: handles may be kept where they should have gone.
  bool disturbed = false;

 private:
  void zero_or_undefined(Block& block) const;
  void part_from_shares(const Block& block);
  void put_to_sleep(Block& block, const SleepSpec& spec, bool discard);
};

// Which bytes of a block the request calls dead; empty where there is none.
Mask dead_bytes(const Block& block, const SleepSpec& spec);
bool all_set(const Mask& mask) noexcept;
bool any_set(const Mask& mask, std::size_t offset, std::size_t count) noexcept;

}  // namespace cumempool::fuzz
