// Fails every allocation of host memory that an operation makes, or a sample where a world takes
// long: alone, and with every later one, in the calling thread and in all threads. The process
// lives, an operation is all or nothing (R4), what it says is what it did, nothing is lost, and a
// retry succeeds (R13).
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include "allocation_failure.hpp"
#include "host_root.hpp"
#include "sweep_world.hpp"
#include "temporary_directory.hpp"

namespace cumempool::tests {
namespace {

constexpr std::array<cumempool_tag_action, 3> kMixed{
    {{"weights", kOffload}, {"kv", kDiscard}, {"zero", kDiscard}}};

constexpr std::array<cumempool_tag_action, 3> kNothing{
    {{"weights", kDiscard}, {"kv", kDiscard}, {"zero", kDiscard}}};

// An operation whose own code takes no memory but in the library.
struct Operation {
  std::string name;
  std::function<void(World&)> prepare;
  cumempool_status (*act)(World&);
  bool retains = false;
  std::uint64_t stride = 1;  // of the allocations that fail
  bool loses = false;        // all contents, as it is told to
  bool closes = false;       // the allocator: half of a close is gone on with by the next
};

std::ostream& operator<<(std::ostream& out, const Operation& operation) {
  return out << operation.name;
}

// ---- calls that take no memory of their own -----------------------------------------------------

cumempool_sleep_request mixed_request(const World& world) {
  cumempool_sleep_request request{};
  request.size = sizeof request;
  request.tags = kMixed.data();
  request.tag_count = kMixed.size();
  request.dead = world.dead.data();
  request.dead_count = world.dead.size();
  return request;
}

cumempool_status sleep(World& world) {
  const cumempool_sleep_request request = mixed_request(world);
  cumempool_report* report = nullptr;
  const cumempool_status status = cumempool_sleep(world.pool.get(), &request, &report);
  cumempool_report_destroy(report);
  return status;
}

cumempool_status discard(World& world) {
  cumempool_sleep_request request = mixed_request(world);
  request.tags = kNothing.data();
  request.drop_backups = 1;
  cumempool_report* report = nullptr;
  const cumempool_status status = cumempool_sleep(world.pool.get(), &request, &report);
  cumempool_report_destroy(report);
  return status;
}

cumempool_status wake(World& world) {
  cumempool_report* report = nullptr;
  const cumempool_status status = cumempool_wake(world.pool.get(), nullptr, 0, nullptr, 0, &report);
  cumempool_report_destroy(report);
  return status;
}

cumempool_status wake_in_a_thread(World& world) {
  cumempool_waking* waking = nullptr;
  cumempool_status status =
      cumempool_wake_begin(world.pool.get(), nullptr, 0, nullptr, 0, nullptr, 0, &waking);
  if (status != CUMEMPOOL_OK) return status;
  cumempool_report* report = nullptr;
  status = cumempool_waking_finish(waking, &report);
  cumempool_report_destroy(report);
  cumempool_waking_destroy(waking);
  return status;
}

// A wait that is refused changes nothing of the wake.
cumempool_status wake_and_wait(World& world) {
  const cumempool_address first = world.blocks[4].address;
  cumempool_waking* waking = nullptr;
  cumempool_status status =
      cumempool_wake_begin(world.pool.get(), nullptr, 0, &first, 1, nullptr, 0, &waking);
  if (status != CUMEMPOOL_OK) return status;
  const cumempool_status waited = cumempool_waking_wait(waking, first, world.stream->get());
  cumempool_report* report = nullptr;
  status = cumempool_waking_finish(waking, &report);
  const bool told = (report != nullptr) == (status == CUMEMPOOL_OK) &&
                    (waited == CUMEMPOOL_OK || waited == CUMEMPOOL_OUT_OF_HOST_MEMORY);
  cumempool_report_destroy(report);
  cumempool_waking_destroy(waking);
  return told ? status : CUMEMPOOL_INTERNAL;
}

cumempool_status swap(World& world) {
  const cumempool_sleep_request leaves = mixed_request(world);
  const char* const comes = "next";
  cumempool_swap_request request{};
  request.size = sizeof request;
  request.sleep = &leaves;
  request.wake_tags = &comes;
  request.wake_tag_count = 1;
  cumempool_report* report = nullptr;
  const cumempool_status status = cumempool_swap(world.pool.get(), &request, &report);
  cumempool_report_destroy(report);
  return status;
}

cumempool_status close_by_force(World& world) {
  return cumempool_allocator_close(world.pool.get(), 1);
}

cumempool_status close_unused(World& world) {
  return cumempool_allocator_close(world.pool.get(), 0);
}

// It has to be refused.
cumempool_status close_in_use(World& world) {
  const cumempool_status status = close_unused(world);
  return status == CUMEMPOOL_IN_USE ? CUMEMPOOL_OK
         : status == CUMEMPOOL_OK   ? CUMEMPOOL_INTERNAL
                                    : status;
}

cumempool_status export_first(World& world, int& descriptor, std::uint64_t& bytes) {
  cumempool_allocation_info info{};
  info.size = sizeof info;
  const cumempool_status status = cumempool_export(world.pool.get(), world.blocks[0].address,
                                                   CUMEMPOOL_HANDLE_POSIX_FD, &descriptor, &info);
  bytes = info.bytes;
  if (status != CUMEMPOOL_OK && descriptor >= 0) return CUMEMPOOL_INTERNAL;  // nobody closes it
  return status;
}

cumempool_status export_memory(World& world) {
  int descriptor = -1;
  std::uint64_t bytes = 0;
  const cumempool_status status = export_first(world, descriptor, bytes);
  if (status == CUMEMPOOL_OK) close(descriptor);
  return status;
}

cumempool_status share(World& world) {
  int descriptor = -1;
  std::uint64_t bytes = 0;
  cumempool_status status = export_first(world, descriptor, bytes);
  if (status != CUMEMPOOL_OK) return status;
  cumempool_shared* shared = nullptr;
  status = cumempool_shared_open(&world.faults.table(), 0, CUMEMPOOL_HANDLE_POSIX_FD, &descriptor,
                                 bytes, CUMEMPOOL_ACCESS_READ_WRITE, &shared);
  close(descriptor);
  if (status != CUMEMPOOL_OK) return status;
  status = cumempool_shared_close(shared);
  cumempool_shared_destroy(shared);
  return status;
}

cumempool_status declare(World& world) {
  return cumempool_declare_tag(world.pool.get(), "a tag with a name that is not a short one",
                               CUMEMPOOL_ON_SLEEP_DISCARD, CUMEMPOOL_ON_WAKE_ZERO);
}

cumempool_status pin(World& world) {
  std::uint64_t pin = 0;
  const cumempool_status status =
      cumempool_pin(world.pool.get(), "kv", "a holder with a name that is not a short one", &pin);
  return status == CUMEMPOOL_OK ? cumempool_unpin(world.pool.get(), pin) : status;
}

// Of a tag without memory.
cumempool_status choose_memory(World& world) {
  const auto peer = static_cast<std::int32_t>(world.peer);
  cumempool_memory_policy policy{};
  policy.size = sizeof policy;
  policy.peer_count = 1;
  policy.peers = &peer;
  return cumempool_set_memory(world.pool.get(), "next", &policy);
}

cumempool_status allocate(World& world) {
  cumempool_address address = 0;
  return cumempool_malloc(world.pool.get(), "zero", world.second, world.page, &address);
}

cumempool_status free_first(World& world) {
  // Once is all: a retry frees another one.
  const auto status = cumempool_free(world.blocks[0].address);
  return status == CUMEMPOOL_NOT_OWNED ? CUMEMPOOL_OK : status;
}

cumempool_status make_ready(World& world) {
  const cumempool_sleep_request request = mixed_request(world);
  std::uint64_t pinned = 0;
  return cumempool_prepare(world.pool.get(), &request, nullptr, 0, &pinned);
}

cumempool_status look(World& world) {
  cumempool_snapshot* snapshot = nullptr;
  const cumempool_status status = cumempool_take_snapshot(world.pool.get(), 1, &snapshot);
  cumempool_snapshot_destroy(snapshot);
  return status;
}

cumempool_status view(World& world) {
  cumempool_backup_view lent{};
  lent.size = sizeof lent;
  const cumempool_status status =
      cumempool_view_backup(world.pool.get(), world.blocks[4].address, world.page, 0, &lent);
  cumempool_end_backup_view(lent.lease);
  return status;
}

cumempool_status bind_slot(World& world) {
  std::uint32_t slot = 0;
  const cumempool_status status = cumempool_bind_slot(world.pool.get(), "weights", &slot);
  return status == CUMEMPOOL_OK ? cumempool_unbind_slot(slot) : status;
}

cumempool_status choose_a_file(World& world) {
  const cumempool_backup_policy policy =
      backup_in(CUMEMPOOL_BACKUP_FILE, "/a/directory/of/more/than/a/few/characters");
  return cumempool_set_backup(world.pool.get(), "kv", &policy);
}

// ---- states -------------------------------------------------------------------------------------

std::vector<Operation> operations() {
  static const TemporaryDirectory directory;
  const auto awake = [](World& world) { world.add_blocks(); };
  const auto asleep = [](World& world) {
    world.add_blocks();
    must(world.pool.sleep(world.mixed()).status);
  };
  const auto changed = [](World& world) {
    world.add_blocks();
    must(world.pool.sleep(world.mixed()).status);
    must(world.pool.wake().status);
    world.blocks[4].seed += 50;
    world.write_patterns();
  };
  const auto waited_for = [asleep](World& world) {
    asleep(world);
    world.stream = std::make_unique<ProgramStream>(world.machine->table(), 0);
  };
  const auto two_sets = [](World& world) {
    world.add("next", 2 * world.page, 0);
    world.add("next", world.page, world.second);
    world.write_patterns();
    must(world.pool.sleep("next", kOffload).status);
    world.add_blocks();
  };
  const auto freed = [](World& world) {
    world.add_blocks();
    must(world.pool.sleep(world.mixed()).status);
    must(world.pool.wake().status);
    for (const Block& block : world.blocks) must(cumempool_free(block.address));
  };
  const auto declared = [](World& world) {
    world.add_blocks();
    world.pool.declare("next");
  };
  std::vector<Operation> all{
      {"FirstMalloc", [](World&) {}, allocate},
      {"Malloc", awake, allocate},
      {"FreeAwake", awake, free_first},
      {"FreeAsleep", asleep, free_first},
      {"Sleep", awake, sleep},
      {"SleepAgain", changed, sleep},
      {"SleepRetaining", awake, sleep, true},
      {"SleepDirty", changed, sleep, true},
      {"Discard", asleep, discard, false, 1, true},
      {"Wake", asleep, wake},
      {"WakeRetaining", asleep, wake, true},
      {"AsynchronousWake", asleep, wake_in_a_thread},
      {"AsynchronousWakeAndWait", waited_for, wake_and_wait},
      {"Swap", two_sets, swap},
      {"SwapRetaining", two_sets, swap, true},
      {"CloseByForceAwake", awake, close_by_force, false, 1, true, true},
      {"CloseByForceAsleep", asleep, close_by_force, false, 1, true, true},
      {"CloseUnused", freed, close_unused, false, 1, true, true},
      {"CloseInUse", awake, close_in_use},
      {"Export", awake, export_memory},
      {"ExportOpenAndClose", awake, share},
      {"SetMemory", declared, choose_memory},
      {"DeclareTag", awake, declare},
      {"Pin", awake, pin},
      {"Prepare", awake, make_ready},
      {"Snapshot", asleep, look},
      {"ReadBackup", asleep, view},
      {"BindSlot", awake, bind_slot},
      {"SetBackup", awake, choose_a_file},
  };
  for (const auto& [name, policy] : std::vector<std::pair<std::string, cumempool_backup_policy>>{
           {"Pageable", backup_in(CUMEMPOOL_BACKUP_PAGEABLE)},
           {"File", backup_in(CUMEMPOOL_BACKUP_FILE, directory.path().c_str())},
           {"Peer", backup_in(CUMEMPOOL_BACKUP_PEER, nullptr, HostSite().devices() - 1)}}) {
    const auto chosen = [policy = policy](World& world) {
      world.add_blocks();
      world.set_tier(policy);
    };
    const auto slept = [chosen](World& world) {
      chosen(world);
      must(world.pool.sleep(world.mixed()).status);
    };
    // Each world of a tier with buffers pins 256 MiB of them: a sample.
    const std::uint64_t stride = policy.tier == CUMEMPOOL_BACKUP_PEER ? 1 : 7;
    all.push_back({"Sleep" + name, chosen, sleep, false, stride});
    all.push_back({"Wake" + name, slept, wake, false, stride});
  }
  return all;
}

// ---- the sweep ----------------------------------------------------------------------------------

class AllocationSweep : public ::testing::TestWithParam<Operation> {
 protected:
  using Where = AllocationFailure::Where;

  // False where the operation takes less memory than that.
  bool try_at(std::uint64_t nth, Lack lack, Where where) {
    const Operation& operation = GetParam();
    World world(site_, operation.retains);
    operation.prepare(world);
    const State before = world.state();
    cumempool_status status = CUMEMPOOL_OK;
    bool reached = false;
    {
      const AllocationFailure failure(nth, lack, where);
      status = operation.act(world);
      reached = AllocationFailure::reached();
    }
    const std::size_t secondary =
        status == CUMEMPOOL_OK ? 0 : cumempool_last_error()->secondary_count;
    EXPECT_TRUE(reached || status == CUMEMPOOL_OK) << cumempool_last_error()->message;
    world.expect_exact(false);
    if (status == CUMEMPOOL_OK) {
      EXPECT_TRUE(same(world.state(), after_, true)) << ::testing::PrintToString(world.state());
    } else if (!GetParam().closes && !same(world.state(), before, true)) {
      // What cannot be taken back without memory sleeps, with its backup.
      EXPECT_TRUE(lack == Lack::kForGood || secondary != 0)
          << ::testing::PrintToString(world.state());
    }
    if (!operation.loses) world.expect_contents(false);
    EXPECT_EQ(operation.act(world), CUMEMPOOL_OK) << cumempool_last_error()->message;
    if (operation.closes) {
      nothing_physical_is_left(world);
    } else {
      EXPECT_EQ(world.pool.wake().status, CUMEMPOOL_OK) << cumempool_last_error()->message;
      world.pool.release_host_memory();  // and backups that copies may have been using
    }
    if (!operation.loses) world.expect_contents(false);
    world.expect_exact();
    return reached;
  }

  void sweep(Lack lack, Where where) {
    for (std::uint64_t nth = 1; !HasFailure(); nth += GetParam().stride) {
      SCOPED_TRACE("allocation " + std::to_string(nth) +
                   (lack == Lack::kForGood ? " and all later ones" : "") +
                   (where == Where::kEverywhere ? ", in all threads" : ""));
      const std::size_t descriptors = open_descriptors();
      const bool reached = try_at(nth, lack, where);
      EXPECT_EQ(open_descriptors(), descriptors);
      if (!reached) return;
      ++tried_;
      passed_ += HasFailure() ? 0U : 1U;
    }
  }

  void find_out_what_it_does() {
    World world(site_, GetParam().retains);
    GetParam().prepare(world);
    must(GetParam().act(world));
    after_ = world.state();
  }

  const SmallHost host_{std::uint64_t{1} << 40};  // few files, which every sleep reads
  HostSite site_;
  State after_;
  std::uint64_t tried_ = 0;
  std::uint64_t passed_ = 0;
};

TEST_P(AllocationSweep, R4_R13_EveryFailedAllocationLeavesAllOrNothing) {
  if (!allocations_can_fail()) GTEST_SKIP() << "the sanitizer's operator new does not fail";
  find_out_what_it_does();
  for (const Lack lack : {Lack::kOnce, Lack::kForGood}) {
    sweep(lack, Where::kThisThread);
    sweep(lack, Where::kEverywhere);
  }
  std::cout << GetParam() << ": " << tried_ << " allocations tried, " << passed_ << " passed\n";
  EXPECT_EQ(passed_, tried_);
}

INSTANTIATE_TEST_SUITE_P(Operations, AllocationSweep, ::testing::ValuesIn(operations()),
                         [](const auto& tested) { return tested.param.name; });

}  // namespace
}  // namespace cumempool::tests
