// The worlds that operations fail in: a driver that can fail and counts what is held of it, an
// allocator over it, and blocks with known contents.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "fault_driver.hpp"
#include "host_fixture.hpp"
#include "sweep_site.hpp"
#include "tracked_driver.hpp"

namespace cumempool::tests {

struct Block {
  std::string tag;
  std::size_t bytes;
  int device;
  cumempool_address address;
  std::uint32_t seed;
  std::uint64_t generation = 0;  // in which it was written
};

// What a transition changes of one allocation. Awake, a backup is only retained: whether there is
// one is no promise.
struct AllocationState {
  cumempool_state state;
  std::uint64_t generation;
  std::uint64_t backup_bytes;
};
using State = std::vector<AllocationState>;

// `regrown`: memory that had gone may have been taken again.
inline bool same(const State& left, const State& right, bool regrown) {
  return std::equal(
      left.begin(), left.end(), right.begin(), right.end(),
      [regrown](const AllocationState& now, const AllocationState& then) {
        return now.state == then.state && now.backup_bytes == then.backup_bytes &&
               (regrown ? now.generation >= then.generation : now.generation == then.generation);
      });
}

inline std::ostream& operator<<(std::ostream& out, const AllocationState& state) {
  return out << "(" << state.state << ", " << state.generation << ", " << state.backup_bytes << ")";
}

// A program's own stream, which no test counts or fails.
class ProgramStream {
 public:
  ProgramStream(const cumempool_driver& table, int device) : table_(table), device_(device) {
    conformance::must(CALL(table_, context_retain, device_), "context_retain");
    const conformance::Inside inside(table_, device_);
    conformance::must(CALL(table_, stream_create, device_, &stream_), "stream_create");
  }
  ~ProgramStream() {
    {
      const conformance::Inside inside(table_, device_);
      CALL(table_, stream_destroy, device_, stream_);
    }
    CALL(table_, context_release, device_);
  }
  ProgramStream(const ProgramStream&) = delete;
  ProgramStream(ProgramStream&&) = delete;
  ProgramStream& operator=(const ProgramStream&) = delete;
  ProgramStream& operator=(ProgramStream&&) = delete;

  cumempool_device_stream get() const {
    return {sizeof(cumempool_device_stream), device_, stream_};
  }

 private:
  const cumempool_driver& table_;
  int device_;
  cumempool_stream stream_ = 0;
};

// Memory of a world that is opened as another process would. Ends with what it was opened from.
class Opened {
 public:
  Opened(const cumempool_driver& table, int device, int descriptor, std::uint64_t bytes)
      : status_(cumempool_shared_open(&table, device, CUMEMPOOL_HANDLE_POSIX_FD, &descriptor, bytes,
                                      CUMEMPOOL_ACCESS_READ_WRITE, &shared_)) {}
  ~Opened() { cumempool_shared_destroy(shared_); }
  Opened(const Opened&) = delete;
  Opened(Opened&&) = delete;
  Opened& operator=(const Opened&) = delete;
  Opened& operator=(Opened&&) = delete;

  cumempool_status status() const { return status_; }
  cumempool_address address() const { return cumempool_shared_address(shared_); }
  cumempool_status close() const { return cumempool_shared_close(shared_); }

 private:
  cumempool_shared* shared_ = nullptr;
  cumempool_status status_;
};

// What a sleep does to the blocks: "weights" and "next" are offloaded but for the dead ranges, "kv"
// is lost, "zero" comes back as zeros.
class World {
 public:
  explicit World(const Site& site, bool retain_backups = false)
      : page(site.page()),
        pages(site.pages()),
        second(site.devices() > 2 ? 1 : 0),
        peer(site.devices() - 1),
        machine(site.open()),
        tracked(machine->table(), pages * page),
        faults(tracked.table()),
        pool(faults.table(), pool_options(0, retain_backups)) {
    // Calls that end the life of something, and whose failure has no remedy: the library has
    // nothing left to try, and libcuda fails them only where the context, and all of its objects
    // with it, is lost already.
    for (const char* entry :
         {"context_leave", "context_release", "stream_destroy", "event_destroy"}) {
      faults.exclude(entry);
    }
    pool.declare("zero", CUMEMPOOL_ON_WAKE_ZERO);
  }

  const Block& add(const char* tag, std::size_t bytes, int device) {
    const auto seed = static_cast<std::uint32_t>(blocks.size() + 1);
    blocks.push_back({tag, bytes, device, pool.malloc(tag, bytes, device), seed});
    return blocks.back();
  }

  void write_patterns() {
    for (Block& block : blocks) {
      const cumempool_allocation_info info = pool.find(block.address);
      if (info.state != CUMEMPOOL_AWAKE) continue;
      machine->write(block.device, block.address, pattern(block));
      block.generation = info.generation;
    }
  }

  // Three tags, on two devices where there are enough; dead ranges inside a block, over a whole
  // one, and outside of all.
  void add_blocks() {
    const cumempool_address first = add("weights", 3 * page, 0).address;
    add("kv", page, 0);
    const cumempool_address whole = add("weights", page, 0).address;
    add("zero", 2 * page, 0);
    add("weights", 2 * page, 0);
    add("weights", 2 * page, second);
    add("kv", page, second);
    write_patterns();
    dead = {{whole, page}, {first + 500, 700}, {first + 1000, 600}, {first - 10, 20}};
  }

  // A peer is used before, as it is by programs: see FirstMalloc.
  void set_tier(const cumempool_backup_policy& policy) const {
    must(pool.set_backup("weights", policy));
    if (policy.tier == CUMEMPOOL_BACKUP_PEER) must(cumempool_free(pool.malloc("kv", page, peer)));
  }

  SleepCall mixed() const {
    return {{{"weights", kOffload}, {"kv", kDiscard}, {"zero", kDiscard}}, dead, {}, false};
  }

  // Whether each block that is awake holds what it must. `whole`: nothing was ever lost.
  void expect_contents(bool whole) const {
    for (const Block& block : blocks) {
      cumempool_allocation_info info{};
      info.size = sizeof info;
      if (cumempool_find(pool.get(), block.address, &info) != CUMEMPOOL_OK) continue;  // freed
      if (info.state != CUMEMPOOL_AWAKE) continue;
      const bool offloaded = block.tag == "weights" || block.tag == "next";
      if (info.generation == block.generation || (whole && !offloaded)) {
        EXPECT_TRUE(contents(block) == pattern(block)) << block.tag;
      } else if (block.tag == "zero") {
        EXPECT_TRUE(contents(block) == Bytes(block.bytes, 0));
      } else if (offloaded) {
        EXPECT_TRUE(live_bytes_hold(block)) << block.tag;
      }
    }
  }

  bool holds(const Block& block) const { return contents(block) == pattern(block); }

  State state() const {
    State state;
    for (const auto& info : pool.snapshot().allocations) {
      if (std::string(info.tag) == "used") continue;  // in the way, until room is made
      state.push_back(
          {info.state, info.generation, info.state == CUMEMPOOL_AWAKE ? 0 : info.backup_bytes});
    }
    return state;
  }

  std::uint64_t leaked() const { return pool.snapshot().totals.leaked_bytes; }

  driver::HostDriverCounters counters() const { return tracked.counters(); }
  void expect_exact(bool settled = true) const { expect_exact_numbers(pool, counters(), settled); }

  cumempool_status begin_wake() {
    waking = std::make_unique<Waking>(pool.get(), std::nullopt, std::vector<cumempool_address>{},
                                      std::vector<cumempool_device_stream>{});
    return waking->status();
  }

  std::size_t page;
  std::size_t pages;  // of each device
  int second;         // one more device to allocate on; 0 where the others are needed for peers
  int peer;           // holds backups, and nothing else
  std::unique_ptr<Machine> machine;
  TrackedDriver tracked;
  driver::FaultDriver faults;
  Pool pool;
  std::vector<Block> blocks;
  std::vector<cumempool_extent> dead;
  // Kept past the failures: that their end cannot enter a context has no remedy either.
  std::unique_ptr<Waking> waking;
  std::unique_ptr<Opened> opened;
  std::unique_ptr<ProgramStream> stream;

 private:
  // Kept, for thousands of worlds have the same few.
  static const Bytes& pattern(const Block& block) {
    static std::map<std::pair<std::size_t, std::uint32_t>, Bytes> all;
    Bytes& bytes = all[{block.bytes, block.seed}];
    if (bytes.empty()) {
      bytes.resize(block.bytes);
      for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = pattern_byte(i, block.seed);
    }
    return bytes;
  }
  Bytes contents(const Block& block) const {
    return machine->read(block.device, block.address, block.bytes);
  }
  bool live_bytes_hold(const Block& block) const {
    const Bytes found = contents(block);
    Bytes expected = pattern(block);
    for (const cumempool_extent& range : dead) {
      const cumempool_address begin = std::max(range.address, block.address);
      const cumempool_address end =
          std::min(range.address + range.bytes, block.address + block.bytes);
      for (cumempool_address at = begin; at < end; ++at) {
        expected[at - block.address] = found[at - block.address];
      }
    }
    return found == expected;
  }
};

// After a close.
inline void nothing_physical_is_left(const World& world) {
  const auto counters = world.counters();
  EXPECT_EQ(counters.charged_bytes + counters.handles + counters.mapped_bytes, 0U);
  EXPECT_EQ(counters.registered_bytes + counters.streams + counters.events, 0U);
  EXPECT_EQ(counters.retained_contexts, 0U);
}

}  // namespace cumempool::tests
