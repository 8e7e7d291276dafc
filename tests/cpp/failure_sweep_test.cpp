// Fails every driver call that an operation makes: alone, with every later one, and in pairs. Holds
// the outcome to the rules: all or nothing (R4), contents kept, numbers exact (R13), a retry that
// succeeds, and nothing left in the end.
//
// Alone, a failure must leave all or nothing; memory that had gone already is taken again for it
// and has a new generation. Where undoing fails as well, allocations may be left asleep with their
// contents kept, and the error's secondary failures say so; then a retry, and in its place a wake,
// must bring everything back. What a swap discards may have been reused before it failed: then it
// sleeps, and the error says so. A `release` that fails once all contents are safe is no failure of
// a sleep but a problem in its report: the memory is counted as unreleased and goes with the next
// sleep, which is held to that.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <iostream>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "driver/fault_driver.hpp"
#include "host_fixture.hpp"
#include "temporary_directory.hpp"

namespace cumempool::tests {
namespace {

using driver::FaultDriver;
using Repeat = FaultDriver::Repeat;

// The granularity here: small, for there are thousands of worlds.
constexpr std::size_t kPage = 4096;
constexpr std::size_t kPages = 64;  // of each device
constexpr std::int32_t kPeer = 2;   // holds backups, and nothing else
constexpr cumempool_result kOutOfMemory = CUMEMPOOL_RESULT_OUT_OF_MEMORY;
constexpr cumempool_result kLaunchFailed = 719;
constexpr std::uint64_t kMostPairs = 120;  // of one kind; more are sampled evenly

struct Block {
  std::string tag;
  std::size_t bytes;
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
bool same(const State& left, const State& right, bool regrown) {
  return std::equal(
      left.begin(), left.end(), right.begin(), right.end(),
      [regrown](const AllocationState& now, const AllocationState& then) {
        return now.state == then.state && now.backup_bytes == then.backup_bytes &&
               (regrown ? now.generation >= then.generation : now.generation == then.generation);
      });
}

std::ostream& operator<<(std::ostream& out, const AllocationState& state) {
  return out << "(" << state.state << ", " << state.generation << ", " << state.backup_bytes << ")";
}

// A driver that can fail, an allocator, and blocks with known contents. What a sleep does to them:
// "weights" and "next" are offloaded but for the dead ranges, "kv" is lost, "zero" comes back as
// zeros.
class World {
 public:
  explicit World(bool retain_backups = false)
      : pool(faults.table(), pool_options(0, retain_backups)) {
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
      const cumempool_allocation_info info = pool.find(block.address);
      if (info.state != CUMEMPOOL_AWAKE) continue;
      write_pattern(block.address, block.bytes, block.seed);
      block.generation = info.generation;
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
    dead = {{second, kPage}, {first + 500, 700}, {first + 1000, 600}, {first - 10, 20}};
  }

  // A peer is used before, as it is by programs: see FirstMalloc.
  void set_tier(const cumempool_backup_policy& policy) const {
    must(pool.set_backup("weights", policy));
    if (policy.tier == CUMEMPOOL_BACKUP_PEER) must(cumempool_free(pool.malloc("kv", kPage, kPeer)));
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
      const bool offloaded = block.tag == "weights" || block.tag == "next";
      if (info.generation == block.generation || (whole && !offloaded)) {
        EXPECT_TRUE(holds_pattern(block.address, block.bytes, block.seed)) << block.tag;
      } else if (block.tag == "zero") {
        EXPECT_TRUE(all_are(block.address, block.bytes, 0));
      } else if (offloaded) {
        EXPECT_TRUE(live_bytes_hold(block)) << block.tag;
      }
    }
  }

  State state() const {
    State state;
    for (const auto& info : pool.snapshot().allocations) {
      state.push_back(
          {info.state, info.generation, info.state == CUMEMPOOL_AWAKE ? 0 : info.backup_bytes});
    }
    return state;
  }

  Host host{kPages, 3, kPage};
  FaultDriver faults{host.table()};
  Pool pool;
  std::vector<Block> blocks;
  std::vector<cumempool_extent> dead;
  // Kept past the failures: that its end cannot enter a context has no remedy either.
  std::unique_ptr<Waking> waking;

  cumempool_status begin_wake() {
    waking = std::make_unique<Waking>(pool.get(), std::nullopt, std::vector<cumempool_address>{},
                                      std::vector<cumempool_device_stream>{});
    return waking->status();
  }

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
  bool sleeps = false;   // if it fails, a wake must bring everything back as well
  bool closes = false;   // a close that fails has closed nevertheless
  bool reuses = false;   // what it discards may be lost although it fails
  bool retains = false;  // backups, while awake
  bool gathers = false;  // leaves host memory that older views may still be on
  std::vector<std::string> excluded{};
  // What a program would do next, so that all contents are seen; none = wakes everything. For
  // worlds that have not the room.
  std::function<void(const World&, bool whole)> look{};

  cumempool_status again(World& world) const { return retry ? retry(world) : act(world); }
};

std::ostream& operator<<(std::ostream& out, const Scenario& scenario) {
  return out << scenario.name;
}

// How the operation ends when nothing fails.
struct Reference {
  explicit Reference(const Scenario& scenario) {
    World world(scenario.retains);
    scenario.prepare(world);
    before = world.state();
    for (const std::string& entry : scenario.excluded) world.faults.exclude(entry);
    world.faults.reset_counts();
    EXPECT_EQ(scenario.act(world), CUMEMPOOL_OK);
    calls = world.faults.calls();
    after = world.state();
    EXPECT_EQ(scenario.again(world), CUMEMPOOL_OK);
    after_retry = world.state();
    if (scenario.finally) scenario.finally(world);
  }

  State before;
  State after;
  State after_retry;
  std::uint64_t calls = 0;  // that can fail
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

void wake_and_look(const World& world, bool whole) {
  EXPECT_EQ(world.pool.wake().status, CUMEMPOOL_OK) << cumempool_last_error()->message;
  world.expect_contents(whole);
}

// Holds a world to what must hold right after the operation.
void expect_all_or_nothing(const World& world, const Scenario& scenario, const Reference& reference,
                           const Point& point, bool succeeded, std::size_t secondary_count) {
  expect_exact_numbers(world.pool, world.host, point.alone() && !scenario.gathers);
  if (succeeded) {
    EXPECT_TRUE(same(world.state(), reference.after, false))
        << ::testing::PrintToString(world.state());
  } else if (!scenario.closes && !same(world.state(), reference.before, true)) {
    EXPECT_TRUE(!point.alone() || scenario.reuses) << ::testing::PrintToString(world.state());
    EXPECT_GT(secondary_count, 0U) << "what could not be undone is told";
  }
  world.expect_contents(scenario.sleeps && !succeeded && !scenario.reuses);
}

void expect_retry_succeeds(World& world, const Scenario& scenario, const State& expected,
                           bool regrown) {
  EXPECT_EQ(scenario.again(world), CUMEMPOOL_OK) << cumempool_last_error()->message;
  EXPECT_TRUE(same(world.state(), expected, regrown)) << ::testing::PrintToString(world.state());
  EXPECT_EQ(world.pool.snapshot().totals.pending_free_bytes, 0U);
  for (const auto& tag : world.pool.snapshot().tags) EXPECT_EQ(tag.unreleased_bytes, 0U);
  if (scenario.finally) scenario.finally(world);
  expect_exact_numbers(world.pool, world.host, !scenario.gathers);
}

// Runs the operation with these failures. Returns whether all of them were reached.
bool run(const Scenario& scenario, const Reference& reference, const Point& point) {
  World world(scenario.retains);
  scenario.prepare(world);
  for (const std::string& entry : scenario.excluded) world.faults.exclude(entry);
  world.faults.reset_counts();
  std::atomic<const char*> failed_entry{""};
  world.faults.observe([&](const char* entry) {
    if (world.faults.failures() == 0) failed_entry = entry;
  });
  world.faults.fail_nth_of_any(point.call, point.result, point.repeat);
  if (point.second != 0) world.faults.fail_nth_of_any(point.call + point.second, point.result);
  const cumempool_status status = scenario.act(world);
  const bool succeeded = status == CUMEMPOOL_OK;
  const std::uint64_t failures = world.faults.failures();
  const std::string message = succeeded ? "" : cumempool_last_error()->message;
  const std::size_t secondary_count = succeeded ? 0 : cumempool_last_error()->secondary_count;
  world.faults.fail_nothing();
  world.faults.observe(nullptr);
  SCOPED_TRACE("at or before " + std::string(failed_entry.load()) + ": status " +
               std::to_string(status) + " " + message);

  EXPECT_TRUE(failures != 0 || succeeded);
  EXPECT_EQ(succeeded, message.empty());
  expect_all_or_nothing(world, scenario, reference, point, succeeded, secondary_count);
  if (point.recovery == Recovery::kRetry) {
    expect_retry_succeeds(world, scenario, succeeded ? reference.after_retry : reference.after,
                          !succeeded);
  }
  if (!scenario.closes) {
    const bool lost = succeeded || scenario.reuses || point.recovery == Recovery::kRetry;
    (scenario.look ? scenario.look : wake_and_look)(world, scenario.sleeps && !lost);
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

  // Every pair, or an even sample of them.
  void pairs(cumempool_result result, Recovery recovery) {
    const std::uint64_t calls = reference_.calls;
    const std::uint64_t stride = 1 + calls * calls / 2 / kMostPairs;
    for (std::uint64_t call = 1; call <= calls; ++call) {
      // A step that no short cycle of calls shares.
      for (std::uint64_t second = 1 + call * 7 % stride;; second += stride) {
        if (!try_at({call, second, result, Repeat::kOnce, recovery})) break;
      }
    }
  }

 private:
  bool try_at(const Point& point) {
    if (::testing::Test::HasFailure()) return false;
    SCOPED_TRACE(point.text());
    const std::size_t descriptors = open_descriptors();
    const bool reached = run(scenario_, reference_, point);
    EXPECT_EQ(open_descriptors(), descriptors);
    if (reached) ++points_;
    return reached;
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
  const Scenario waking{"AsynchronousWake",
                        [sleep_all](World& world) {
                          world.add_blocks();
                          sleep_all(world);
                        },
                        [](World& world) {
                          const cumempool_status begun = world.begin_wake();
                          if (begun != CUMEMPOOL_OK) return begun;
                          const UserStream stream(world.host);
                          (void)world.waking->wait(world.blocks[0].address, stream.get());
                          return world.waking->finish().status;
                        },
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
      waking,
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

// ---- tiers, retained backups, views -------------------------------------------------------------

struct Tier {
  const char* name;
  cumempool_backup_policy policy;
};

std::vector<Tier> tiers() {
  static const TemporaryDirectory directory;
  return {{"Pageable", backup_in(CUMEMPOOL_BACKUP_PAGEABLE)},
          {"File", backup_in(CUMEMPOOL_BACKUP_FILE, directory.path().c_str())},
          {"Peer", backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, kPeer)}};
}

std::vector<Scenario> scenarios_of(const Tier& tier) {
  const auto asleep = [policy = tier.policy](World& world) {
    world.add_blocks();
    world.set_tier(policy);
    must(world.pool.sleep(world.mixed()).status);
  };
  const std::string name = tier.name;
  const Scenario wake{
      "Wake" + name, asleep, [](World& world) { return world.pool.wake().status; }, {}};
  const Scenario waking{"AsynchronousWake" + name,
                        asleep,
                        [](World& world) {
                          const cumempool_status begun = world.begin_wake();
                          return begun == CUMEMPOOL_OK ? world.waking->finish().status : begun;
                        },
                        {}};
  const Scenario free{"FreeBackedUp" + name, asleep,
                      [](World& world) { return cumempool_free(world.blocks[0].address); },
                      [](World& world) { return cumempool_free(world.blocks.back().address); }};
  const Scenario prepare{"Prepare" + name,
                         [policy = tier.policy](World& world) {
                           world.add_blocks();
                           world.set_tier(policy);
                         },
                         [](World& world) {
                           std::uint64_t pinned = 0;
                           return world.pool.prepare(world.mixed(), pinned);
                         },
                         {}};
  Scenario close = close_scenario("CloseByForce" + name, [](World&) {}, true);
  close.prepare = asleep;
  return {sleep_scenario(
              "Sleep" + name, [](World& world) { return world.mixed(); },
              [policy = tier.policy](World& world) { world.set_tier(policy); }),
          wake,
          waking,
          free,
          prepare,
          close};
}

// Two sleeps and a wake between them, with backups that are kept; `dirty` of the blocks changes.
Scenario retained_scenario(std::string name, bool dirty, cumempool_backup_policy policy) {
  Scenario scenario = sleep_scenario(
      std::move(name), [](World& world) { return world.mixed(); },
      [dirty, policy](World& world) {
        world.set_tier(policy);
        must(world.pool.sleep(world.mixed()).status);
        must(world.pool.wake().status);
        if (dirty) world.blocks[4].seed += 50;
        world.write_patterns();
      });
  scenario.retains = true;
  return scenario;
}

// A backup in pieces, which a view of all of it has to gather.
void scatter_a_backup(World& world) {
  for (int i = 0; i < 8; ++i) {  // as many pages as a small block of pinned memory has
    world.add(i % 2 == 0 ? "hole" : "weights", kPage, 0);
    world.add("weights", kPage, 0);
  }
  world.write_patterns();
  must(world.pool.sleep({{{"hole", kOffload}, {"weights", kOffload}}}).status);
  must(world.pool.wake({{"hole"}}).status);
  world.add("next", 3 * kPage, 0);
  world.write_patterns();
  must(world.pool.sleep("next", kOffload).status);
}

Scenario view_scenario() {
  Scenario scenario{"ViewBackup",
                    scatter_a_backup,
                    [](World& world) {
                      const Block& block = world.blocks.back();
                      const View view(world.pool.get(), block.address, block.bytes);
                      if (view.status() == CUMEMPOOL_OK) {
                        EXPECT_TRUE(holds_pattern(view.address(), block.bytes, block.seed));
                      }
                      return view.status();
                    },
                    {}};
  scenario.gathers = true;
  return scenario;
}

// ---- swaps --------------------------------------------------------------------------------------

// "weights" awake and "next" asleep, on two devices; the rest of the memory is in use, but for
// `spare` pages.
void two_sets(World& world, std::size_t spare) {
  for (const int device : {0, 1}) {
    world.add("next", 2 * kPage, device);
    world.add("next", 3 * kPage, device);
  }
  world.write_patterns();
  must(world.pool.sleep("next", kOffload).status);
  const cumempool_address first = world.add("weights", 3 * kPage, 0).address;
  world.add("weights", 2 * kPage, 0);
  world.add("weights", 4 * kPage, 1);
  world.add("weights", kPage, 1);
  world.add("used", (kPages - spare - 5) * kPage, 0);
  world.add("used", (kPages - spare - 5) * kPage, 1);
  world.write_patterns();
  world.dead = {{first + kPage, kPage}};
}

cumempool_status swap_in(const World& world, const char* leaves, const char* comes) {
  return world.pool.swap({{{leaves, kOffload}}, world.dead}, {{comes}}).status;
}

// Whichever set is awake, then the other one: there may be no room for both.
void look_at_both_sets(const World& world, bool whole) {
  const bool next = world.pool.snapshot().tag("next").awake_bytes != 0;
  const char* const here = next ? "next" : "weights";
  const char* const there = next ? "weights" : "next";
  must(world.pool.sleep(there, kOffload).status);  // takes back what the driver would not
  EXPECT_EQ(world.pool.wake({{here}}).status, CUMEMPOOL_OK) << cumempool_last_error()->message;
  world.expect_contents(whole);
  EXPECT_EQ(swap_in(world, here, there), CUMEMPOOL_OK) << cumempool_last_error()->message;
  world.expect_contents(false);
}

Scenario swap_scenario(std::string name, std::size_t spare) {
  Scenario scenario{std::move(name),
                    [spare](World& world) { two_sets(world, spare); },
                    [](World& world) { return swap_in(world, "weights", "next"); },
                    {}};
  scenario.sleeps = true;
  scenario.look = look_at_both_sets;
  return scenario;
}

// What leaves is given up, and its memory is needed.
Scenario discarding_swap_scenario() {
  Scenario scenario = swap_scenario("SwapTightDiscarding", 0);
  scenario.act = [](World& world) {
    return world.pool.swap({{{"weights", kDiscard}}}, {{"next"}}).status;
  };
  scenario.reuses = true;
  scenario.look = [](const World& world, bool) {
    must(world.pool.sleep({{{"weights", kDiscard}}}).status);
    EXPECT_EQ(world.pool.wake({{"next"}}).status, CUMEMPOOL_OK) << cumempool_last_error()->message;
    for (std::size_t i = 0; i < 4; ++i) {
      const Block& block = world.blocks[i];
      EXPECT_TRUE(holds_pattern(block.address, block.bytes, block.seed));
    }
  };
  return scenario;
}

// ---- ordinary memory, exports -------------------------------------------------------------------

// As the blocks of the others, and some that cannot sleep.
void add_ordinary_blocks(World& world) {
  must(world.pool.set_memory("plain", CUMEMPOOL_BACKING_CUDA_MALLOC));
  world.add("plain", 2 * kPage, 0);
  world.add("plain", kPage, 1);
  world.write_patterns();
}

Scenario ordinary_malloc_scenario() {
  return {"MallocOrdinary",
          [](World& world) {
            world.add_blocks();
            must(world.pool.set_memory("plain", CUMEMPOOL_BACKING_CUDA_MALLOC));
          },
          [](World& world) {
            cumempool_address address = 0;
            return world.pool.try_malloc("plain", kPage, 1, address);
          },
          {}};
}

// It lives on until it is freed; all else is given back.
void only_ordinary_memory_is_left(const World& world) {
  const auto counters = world.host.counters();
  EXPECT_EQ(counters.allocations, 2U);
  EXPECT_EQ(counters.charged_bytes, 3 * kPage);
  EXPECT_EQ(counters.handles + counters.mapped_bytes, 0U);
  EXPECT_EQ(counters.registered_bytes + counters.streams + counters.events, 0U);
}

Scenario ordinary_close_scenario() {
  Scenario scenario = close_scenario("CloseByForceOrdinary", add_ordinary_blocks, true);
  scenario.finally = only_ordinary_memory_is_left;
  return scenario;
}

Scenario ordinary_neighbour_scenario() {
  return sleep_scenario(
      "SleepBesideOrdinary", [](World& world) { return world.mixed(); }, add_ordinary_blocks);
}

// The descriptor is closed at once: that none is left open is looked at from outside.
Scenario export_scenario() {
  return {"Export",
          [](World& world) { world.add_blocks(); },
          [](World& world) {
            int descriptor = -1;
            cumempool_allocation_info info{};
            const cumempool_status status =
                cumempool_export(world.pool.get(), world.blocks[0].address,
                                 CUMEMPOOL_HANDLE_POSIX_FD, &descriptor, &info);
            EXPECT_EQ(descriptor >= 0, status == CUMEMPOOL_OK);
            if (descriptor >= 0) close(descriptor);
            return status;
          },
          {}};
}

std::vector<Scenario> all_scenarios() {
  std::vector<Scenario> all = scenarios();
  all.push_back(ordinary_malloc_scenario());
  all.push_back(free_scenario("FreeOrdinary", 7, add_ordinary_blocks));
  all.push_back(ordinary_neighbour_scenario());
  all.push_back(ordinary_close_scenario());
  all.push_back(export_scenario());
  for (const Tier& tier : tiers()) {
    for (Scenario& scenario : scenarios_of(tier)) all.push_back(std::move(scenario));
  }
  const cumempool_backup_policy pinned = backup_in(CUMEMPOOL_BACKUP_PINNED);
  all.push_back(retained_scenario("SleepClean", false, pinned));
  all.push_back(retained_scenario("SleepDirty", true, pinned));
  for (const Tier& tier : tiers()) {
    all.push_back(retained_scenario(std::string("SleepDirty") + tier.name, true, tier.policy));
  }
  all.push_back(view_scenario());
  all.push_back(swap_scenario("SwapRoomy", 12));
  all.push_back(swap_scenario("SwapTight", 0));
  all.push_back(discarding_swap_scenario());
  Scenario retaining_swap = swap_scenario("SwapRetaining", 3);
  retaining_swap.retains = true;
  all.push_back(retaining_swap);
  return all;
}

INSTANTIATE_TEST_SUITE_P(Operations, FailureSweep, ::testing::ValuesIn(all_scenarios()),
                         [](const auto& tested) { return tested.param.name; });

}  // namespace
}  // namespace cumempool::tests
