// Fails every driver call that an operation makes: alone, with every later one, and in pairs. Holds
// the outcome to the rules: all or nothing (R4), contents kept, numbers exact (R13), a retry that
// succeeds, and nothing left in the end.
//
// Alone, a failure must leave all or nothing. Where undoing fails as well, allocations may be left
// asleep with their contents kept; then a retry, and in its place a wake, must bring everything
// back. A `release` that fails once all contents are safe is no failure of a sleep but a problem in
// its report: the memory is counted as unreleased and goes with the next sleep, which is held to
// that.
#include <functional>
#include <iostream>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "driver/fault_driver.hpp"
#include "host_fixture.hpp"

namespace cumempool::tests {
namespace {

using driver::FaultDriver;
using Repeat = FaultDriver::Repeat;

constexpr std::size_t kPage =
    4096;  // the granularity here: small, for there are thousands of worlds
constexpr cumempool_result kOutOfMemory = CUMEMPOOL_RESULT_OUT_OF_MEMORY;
constexpr cumempool_result kLaunchFailed = 719;

struct Block {
  std::string tag;
  std::size_t bytes;
  cumempool_address address;
  std::uint32_t seed;
  std::uint64_t generation = 0;  // in which it was written
};

// A driver that can fail, an allocator, and blocks with known contents. What a sleep does to them:
// "weights" are offloaded but for the dead ranges, "kv" is lost, "zero" comes back as zeros.
class World {
 public:
  World() {
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
    blocks.push_back({tag, bytes, pool.malloc(tag, bytes, device), seed});
    return blocks.back();
  }

  void write_patterns() {
    for (Block& block : blocks) {
      write_pattern(block.address, block.bytes, block.seed);
      block.generation = pool.find(block.address).generation;
    }
  }

  // Two devices, three tags, dead ranges inside a block, over a whole one, and outside of all.
  void add_blocks() {
    const cumempool_address first = add("weights", 3 * kPage, 0).address;
    add("kv", kPage, 0);
    const cumempool_address second = add("weights", kPage, 0).address;
    add("zero", 2 * kPage, 0);
    add("weights", 2 * kPage, 0);
    add("weights", 2 * kPage, 1);
    add("kv", kPage, 1);
    write_patterns();
    dead = {{second, kPage}, {first + 50, 100}, {first + 100, 100}, {first - 10, 20}};
  }

  SleepCall mixed() const {
    return {{{"weights", kOffload}, {"kv", kDiscard}, {"zero", kDiscard}}, dead, {}, false};
  }

  // Whether each block that is awake holds what it must. `whole`: nothing was ever lost.
  void expect_contents(bool whole) const {
    for (const Block& block : blocks) {
      cumempool_allocation_info info{};
      if (cumempool_find(pool.get(), block.address, &info) != CUMEMPOOL_OK) continue;  // freed
      if (info.state != CUMEMPOOL_AWAKE) continue;
      if (whole || info.generation == block.generation) {
        EXPECT_TRUE(holds_pattern(block.address, block.bytes, block.seed)) << block.tag;
      } else if (block.tag == "zero") {
        EXPECT_TRUE(all_are(block.address, block.bytes, 0));
      } else if (block.tag == "weights") {
        EXPECT_TRUE(live_bytes_hold(block));
      }
    }
  }

  // Per allocation, what a transition changes.
  using State = std::vector<std::tuple<cumempool_state, std::uint64_t, std::uint64_t>>;
  State state() const {
    State state;
    for (const auto& info : pool.snapshot().allocations) {
      state.emplace_back(info.state, info.generation, info.backup_bytes);
    }
    return state;
  }

  Host host{64, 2, kPage};
  FaultDriver faults{host.table()};
  Pool pool{faults.table()};
  std::vector<Block> blocks;
  std::vector<cumempool_extent> dead;

 private:
  bool live_bytes_hold(const Block& block) const {
    for (std::size_t i = 0; i < block.bytes; ++i) {
      const cumempool_address at = block.address + i;
      const bool lost = std::any_of(dead.begin(), dead.end(), [&](const cumempool_extent& range) {
        return at >= range.address && at - range.address < range.bytes;
      });
      if (!lost && !holds_pattern(block.address, i, 1, block.seed)) return false;
    }
    return true;
  }
};

struct Scenario {
  std::string name;
  std::function<void(World&)> prepare;
  std::function<cumempool_status(World&)> act;
  std::function<cumempool_status(World&)> retry;  // none = act again
  std::function<void(const World&)> finally{};    // what must hold after the retry
  bool sleeps = false;  // if it fails, a wake must bring everything back as well
  bool closes = false;  // a close that fails has closed nevertheless
  std::vector<std::string> excluded{};

  cumempool_status again(World& world) const { return retry ? retry(world) : act(world); }
};

std::ostream& operator<<(std::ostream& out, const Scenario& scenario) {
  return out << scenario.name;
}

// How the operation ends when nothing fails.
struct Reference {
  explicit Reference(const Scenario& scenario) {
    World world;
    scenario.prepare(world);
    before = world.state();
    EXPECT_EQ(scenario.act(world), CUMEMPOOL_OK);
    after = world.state();
    EXPECT_EQ(scenario.again(world), CUMEMPOOL_OK);
    after_retry = world.state();
    if (scenario.finally) scenario.finally(world);
  }

  World::State before;
  World::State after;
  World::State after_retry;
};

enum class Recovery { kRetry, kWake };

// Which calls fail, and how the program goes on.
struct Point {
  std::uint64_t call;
  std::uint64_t second;  // one more, so many calls later; 0 = none
  cumempool_result result;
  Repeat repeat;
  Recovery recovery;

  bool alone() const { return second == 0 && repeat == Repeat::kOnce; }
  std::string text() const {
    return "call " + std::to_string(call) + (repeat == Repeat::kOnce ? "" : " and all later") +
           (second == 0 ? "" : " and the " + std::to_string(second) + ". after it") + ": " +
           cumempool_result_name(result) + (recovery == Recovery::kRetry ? "" : ", then wake");
  }
};

// Runs the operation with these failures. Returns whether all of them were reached.
bool run(const Scenario& scenario, const Reference& reference, const Point& point) {
  World world;
  scenario.prepare(world);
  for (const std::string& entry : scenario.excluded) world.faults.exclude(entry);
  world.faults.reset_counts();
  std::string failed_entry;
  world.faults.observe([&](const char* entry) {
    if (world.faults.failures() == 0) failed_entry = entry;
  });
  world.faults.fail_nth_of_any(point.call, point.result, point.repeat);
  if (point.second != 0) world.faults.fail_nth_of_any(point.call + point.second, point.result);
  const cumempool_status status = scenario.act(world);
  const std::uint64_t failures = world.faults.failures();
  const std::string message = status == CUMEMPOOL_OK ? "" : cumempool_last_error()->message;
  world.faults.fail_nothing();
  world.faults.observe(nullptr);
  SCOPED_TRACE("at or before " + failed_entry + ": status " + std::to_string(status) + " " +
               message);

  EXPECT_TRUE(failures != 0 || status == CUMEMPOOL_OK);
  EXPECT_EQ(status == CUMEMPOOL_OK, message.empty());
  expect_exact_numbers(world.pool, world.host);
  if (status == CUMEMPOOL_OK) {
    EXPECT_EQ(world.state(), reference.after);
  } else if (point.alone() && !scenario.closes) {
    EXPECT_EQ(world.state(), reference.before);
  }
  const bool nothing_lost = scenario.sleeps && status != CUMEMPOOL_OK;
  world.expect_contents(nothing_lost);

  if (point.recovery == Recovery::kRetry) {
    EXPECT_EQ(scenario.again(world), CUMEMPOOL_OK) << cumempool_last_error()->message;
    EXPECT_EQ(world.state(), status == CUMEMPOOL_OK ? reference.after_retry : reference.after);
    EXPECT_EQ(world.pool.snapshot().totals.pending_free_bytes, 0U);
    for (const auto& tag : world.pool.snapshot().tags) EXPECT_EQ(tag.unreleased_bytes, 0U);
    if (scenario.finally) scenario.finally(world);
    expect_exact_numbers(world.pool, world.host);
  }
  if (!scenario.closes) {
    EXPECT_EQ(world.pool.wake().status, CUMEMPOOL_OK) << cumempool_last_error()->message;
    world.expect_contents(nothing_lost && point.recovery == Recovery::kWake);
    expect_exact_numbers(world.pool, world.host);
  }
  return failures >= (point.second == 0 ? 1U : 2U);
}

class FailureSweep : public ::testing::TestWithParam<Scenario> {};

// All points of a scenario; stops at the first that fails, for it tells enough.
class Sweep {
 public:
  explicit Sweep(const Scenario& scenario) : scenario_(scenario), reference_(scenario) {}

  std::uint64_t points() const { return points_; }

  void single(cumempool_result result, Repeat repeat, Recovery recovery) {
    for (std::uint64_t call = 1; try_at({call, 0, result, repeat, recovery}); ++call) {
    }
  }

  void pairs(cumempool_result result, Recovery recovery) {
    for (std::uint64_t call = 1;; ++call) {
      std::uint64_t second = 1;
      while (try_at({call, second, result, Repeat::kOnce, recovery})) ++second;
      // Not even the very next call was made: either none is left, or this one ended the operation.
      if (second == 1 && !try_at({call, 0, result, Repeat::kOnce, recovery})) return;
    }
  }

 private:
  bool try_at(const Point& point) {
    if (::testing::Test::HasFailure()) return false;
    SCOPED_TRACE(point.text());
    if (!run(scenario_, reference_, point)) return false;
    ++points_;
    return true;
  }

  const Scenario& scenario_;
  const Reference reference_;
  std::uint64_t points_ = 0;
};

TEST_P(FailureSweep, R4_R13_EveryFailedCallLeavesAllOrNothing) {
  Sweep sweep(GetParam());
  for (const Recovery recovery : {Recovery::kRetry, Recovery::kWake}) {
    if (recovery == Recovery::kWake && !GetParam().sleeps) continue;
    for (const cumempool_result result : {kOutOfMemory, kLaunchFailed}) {
      sweep.single(result, Repeat::kOnce, recovery);
      sweep.single(result, Repeat::kFromThenOn, recovery);
    }
    sweep.pairs(kLaunchFailed, recovery);
  }
  std::cout << GetParam() << ": " << sweep.points() << " points\n";
  EXPECT_GT(sweep.points(), 0U);
}

// ---- the operations ----------------------------------------------------------------------------

cumempool_status allocate(World& world, int device) {
  cumempool_address address = 0;
  return world.pool.try_malloc("zero", kPage, device, address);
}

void nothing_is_pinned(const World& world) {
  EXPECT_EQ(world.host.counters().registered_bytes, 0U);
}

void nothing_physical_is_left(const World& world) {
  const auto counters = world.host.counters();
  EXPECT_EQ(counters.charged_bytes + counters.handles + counters.mapped_bytes, 0U);
  EXPECT_EQ(counters.registered_bytes + counters.streams + counters.events, 0U);
  EXPECT_EQ(counters.retained_contexts, 0U);
}

void free_everything(World& world) {
  for (const Block& block : world.blocks) must(cumempool_free(block.address));
}

// A free always succeeds; what the driver does not take back goes with the next one.
Scenario free_scenario(std::string name, std::size_t block,
                       const std::function<void(World&)>& prepare) {
  return {std::move(name),
          [prepare](World& world) {
            world.add_blocks();
            prepare(world);
          },
          [block](World& world) { return cumempool_free(world.blocks[block].address); },
          [](World& world) { return cumempool_free(world.blocks.back().address); }};
}

Scenario sleep_scenario(std::string name, const std::function<SleepCall(World&)>& request,
                        const std::function<void(World&)>& prepare = {}) {
  Scenario scenario{std::move(name),
                    [prepare](World& world) {
                      world.add_blocks();
                      if (prepare) prepare(world);
                    },
                    [request](World& world) { return world.pool.sleep(request(world)).status; },
                    {}};
  scenario.sleeps = true;
  return scenario;
}

Scenario close_scenario(std::string name, const std::function<void(World&)>& prepare, bool force) {
  Scenario scenario{std::move(name),
                    [prepare](World& world) {
                      world.add_blocks();
                      prepare(world);
                    },
                    [force](World& world) { return world.pool.close(force); },
                    {},
                    nothing_physical_is_left};
  scenario.closes = true;
  return scenario;
}

std::vector<Scenario> scenarios() {
  const auto sleep_all = [](World& world) { must(world.pool.sleep(world.mixed()).status); };
  const auto cycle = [sleep_all](World& world) {
    sleep_all(world);
    must(world.pool.wake().status);
    world.write_patterns();
  };
  // The trial of a device's properties takes a granule and gives it back; a release that fails
  // there is left out, for the trial has nobody to keep it for, and there is nothing to tell the
  // caller.
  Scenario first_malloc{
      "FirstMalloc", [](World&) {}, [](World& world) { return allocate(world, 1); }, {}};
  first_malloc.excluded = {"release"};
  const Scenario malloc{"Malloc",
                        [](World& world) { world.add_blocks(); },
                        [](World& world) { return allocate(world, 1); },
                        {}};
  const Scenario wake_all{"WakeAll",
                          [sleep_all](World& world) {
                            world.add_blocks();
                            sleep_all(world);
                          },
                          [](World& world) { return world.pool.wake().status; },
                          {}};
  const Scenario wake_one{"WakeOneTag",
                          [sleep_all](World& world) {
                            world.add_blocks();
                            sleep_all(world);
                          },
                          [](World& world) { return world.pool.wake({{"weights"}}).status; },
                          {}};
  const Scenario release_host{"ReleaseHostMemory",
                              [cycle](World& world) {
                                world.add_blocks();
                                cycle(world);
                              },
                              [](World& world) {
                                std::uint64_t released = 0;
                                return cumempool_release_host_memory(world.pool.get(), &released);
                              },
                              {},
                              nothing_is_pinned};
  const Scenario prepare{"Prepare",
                         [](World& world) { world.add_blocks(); },
                         [](World& world) {
                           std::uint64_t pinned = 0;
                           return world.pool.prepare(
                               SleepCall{{{"weights", kOffload}, {"kv", kDiscard}}}, pinned);
                         },
                         {},
                         {}};
  const Scenario forget = sleep_scenario(
      "SleepDropBackups",
      [](World&) { return SleepCall{{{"kv", kDiscard}, {"weights", kOffload}}, {}, {}, true}; },
      [](World& world) { must(world.pool.sleep("kv", kOffload).status); });
  return {
      first_malloc,
      malloc,
      free_scenario("FreeAwake", 0, [](World&) {}),
      free_scenario("FreeBackedUp", 0, sleep_all),
      free_scenario("FreeDiscarded", 1, sleep_all),
      sleep_scenario("SleepOffload", [](World&) { return SleepCall{{{"weights", kOffload}}}; }),
      sleep_scenario("SleepDiscard", [](World&) { return SleepCall{{{"zero", kDiscard}}}; }),
      sleep_scenario("SleepMixed", [](World& world) { return world.mixed(); }),
      sleep_scenario(
          "SleepAgain", [](World& world) { return world.mixed(); }, cycle),
      forget,
      wake_all,
      wake_one,
      release_host,
      prepare,
      close_scenario(
          "CloseUnused",
          [cycle](World& world) {
            cycle(world);
            free_everything(world);
          },
          false),
      close_scenario("CloseByForceAwake", cycle, true),
      close_scenario("CloseByForceAsleep", sleep_all, true),
  };
}

INSTANTIATE_TEST_SUITE_P(Operations, FailureSweep, ::testing::ValuesIn(scenarios()),
                         [](const auto& tested) { return tested.param.name; });

}  // namespace
}  // namespace cumempool::tests
