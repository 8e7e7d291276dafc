// The operations that the failure sweep goes through, in the states that matter to them.
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "sweep.hpp"
#include "temporary_directory.hpp"

namespace cumempool::tests {
namespace {

// ---- the operations ----------------------------------------------------------------------------

cumempool_status allocate(World& world, int device) {
  cumempool_address address = 0;
  return world.pool.try_malloc("zero", world.page, device, address);
}

void nothing_is_pinned(const World& world) { EXPECT_EQ(world.counters().registered_bytes, 0U); }

void free_everything(World& world) {
  for (const Block& block : world.blocks) must(cumempool_free(block.address));
}

// A free always succeeds; what the driver does not take back is leaked.
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
      "FirstMalloc", [](World&) {}, [](World& world) { return allocate(world, world.second); }, {}};
  first_malloc.excluded = {"release"};
  const Scenario malloc{"Malloc",
                        [](World& world) { world.add_blocks(); },
                        [](World& world) { return allocate(world, world.second); },
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
                          const ProgramStream stream(world.machine->table(), 0);
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

std::vector<Tier> tiers(int devices) {
  static const TemporaryDirectory directory;
  std::vector<Tier> all{{"Pageable", backup_in(CUMEMPOOL_BACKUP_PAGEABLE)},
                        {"File", backup_in(CUMEMPOOL_BACKUP_FILE, directory.path().c_str())}};
  if (devices > 1) {
    all.push_back({"Peer", backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, devices - 1)});
  }
  return all;
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
    world.add(i % 2 == 0 ? "hole" : "weights", world.page, 0);
    world.add("weights", world.page, 0);
  }
  world.write_patterns();
  must(world.pool.sleep({{{"hole", kOffload}, {"weights", kOffload}}}).status);
  must(world.pool.wake({{"hole"}}).status);
  world.add("next", 3 * world.page, 0);
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
  for (const int device : {0, world.second}) {
    world.add("next", 2 * world.page, device);
    world.add("next", 3 * world.page, device);
  }
  world.write_patterns();
  must(world.pool.sleep("next", kOffload).status);
  const cumempool_address first = world.add("weights", 3 * world.page, 0).address;
  world.add("weights", 2 * world.page, 0);
  world.add("weights", 4 * world.page, world.second);
  world.add("weights", world.page, world.second);
  if (world.second == 0) {
    world.add("used", (world.pages - spare - 10) * world.page, 0);
  } else {
    world.add("used", (world.pages - spare - 5) * world.page, 0);
    world.add("used", (world.pages - spare - 5) * world.page, world.second);
  }
  world.write_patterns();
  world.dead = {{first + world.page, world.page}};
}

cumempool_status swap_in(const World& world, const char* leaves, const char* comes) {
  return world.pool.swap({{{leaves, kOffload}}, world.dead}, {{comes}}).status;
}

// Whichever set is awake, then the other one: there may be no room for both.
void look_at_both_sets(const World& world, bool whole) {
  const bool next = world.pool.snapshot().tag("next").awake_bytes != 0;
  const char* const here = next ? "next" : "weights";
  const char* const there = next ? "weights" : "next";
  must(world.pool.sleep(there, kOffload).status);
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
  scenario.make_room = [](const World& world) {
    for (const Block& block : world.blocks) {
      if (block.tag == "used") (void)cumempool_free(block.address);
    }
  };
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
      EXPECT_TRUE(world.holds(block));
    }
  };
  return scenario;
}

// ---- ordinary memory, exports -------------------------------------------------------------------

// As the blocks of the others, and some that cannot sleep.
void add_ordinary_blocks(World& world) {
  must(world.pool.set_memory("plain", CUMEMPOOL_BACKING_CUDA_MALLOC));
  world.add("plain", 2 * world.page, 0);
  world.add("plain", world.page, world.second);
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
            return world.pool.try_malloc("plain", world.page, world.second, address);
          },
          {}};
}

// It lives on until it is freed; all else is given back.
void only_ordinary_memory_is_left(const World& world) {
  const auto counters = world.counters();
  EXPECT_EQ(counters.allocations, 2U);
  EXPECT_EQ(counters.charged_bytes, 3 * world.page);
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
            info.size = sizeof info;
            const cumempool_status status =
                cumempool_export(world.pool.get(), world.blocks[0].address,
                                 CUMEMPOOL_HANDLE_POSIX_FD, &descriptor, &info);
            EXPECT_EQ(descriptor >= 0, status == CUMEMPOOL_OK);
            if (descriptor >= 0) close(descriptor);
            return status;
          },
          {}};
}

// What an importer does, on the same driver. It is gone before the numbers are looked at.
cumempool_status export_open_and_close(World& world) {
  const Block& block = world.blocks[0];
  int descriptor = -1;
  cumempool_allocation_info info{};
  info.size = sizeof info;
  cumempool_status status = cumempool_export(world.pool.get(), block.address,
                                             CUMEMPOOL_HANDLE_POSIX_FD, &descriptor, &info);
  if (status != CUMEMPOOL_OK) return status;
  world.opened = std::make_unique<Opened>(world.faults.table(), 0, descriptor, info.bytes);
  close(descriptor);
  status = world.opened->status();
  if (status != CUMEMPOOL_OK) return status;
  const Bytes seen = world.machine->read(0, world.opened->address(), block.bytes);
  EXPECT_TRUE(seen == world.machine->read(0, block.address, block.bytes));
  return world.opened->close();
}

// What an open that fails cannot give back it has nobody to keep for; closing is held to every
// failure in sharing_test.cpp.
Scenario open_scenario() {
  Scenario scenario{
      "OpenShared", [](World& world) { world.add_blocks(); }, export_open_and_close, {}};
  scenario.excluded = {"unmap", "release", "unreserve"};
  return scenario;
}

}  // namespace

std::vector<Scenario> sweep_scenarios(int devices) {
  std::vector<Scenario> all = scenarios();
  all.push_back(ordinary_malloc_scenario());
  all.push_back(free_scenario("FreeOrdinary", 7, add_ordinary_blocks));
  all.push_back(ordinary_neighbour_scenario());
  all.push_back(ordinary_close_scenario());
  all.push_back(export_scenario());
  all.push_back(open_scenario());
  for (const Tier& tier : tiers(devices)) {
    for (Scenario& scenario : scenarios_of(tier)) all.push_back(std::move(scenario));
  }
  const cumempool_backup_policy pinned = backup_in(CUMEMPOOL_BACKUP_PINNED);
  all.push_back(retained_scenario("SleepClean", false, pinned));
  all.push_back(retained_scenario("SleepDirty", true, pinned));
  for (const Tier& tier : tiers(devices)) {
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

}  // namespace cumempool::tests
