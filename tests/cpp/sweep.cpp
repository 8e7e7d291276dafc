// The failure sweep: see sweep.hpp.
#include "sweep.hpp"

#include <atomic>

#include "temporary_directory.hpp"

namespace cumempool::tests {
namespace {

constexpr std::uint64_t kMostPairs = 120;  // of one kind; more are sampled evenly

void wake_and_look(const World& world, bool whole) {
  EXPECT_EQ(world.pool.wake().status, CUMEMPOOL_OK) << cumempool_last_error()->message;
  world.expect_contents(whole);
}

// Holds a world to what must hold right after the operation.
void expect_all_or_nothing(const World& world, const Scenario& scenario, const Reference& reference,
                           const Point& point, bool succeeded, std::size_t secondary_count) {
  world.expect_exact(point.alone() && !scenario.gathers);
  if (succeeded) {
    EXPECT_TRUE(same(world.state(), reference.after, false))
        << ::testing::PrintToString(world.state());
  } else if (!scenario.closes && !same(world.state(), reference.before, true)) {
    EXPECT_TRUE(!point.alone() || scenario.reuses) << ::testing::PrintToString(world.state());
    EXPECT_GT(secondary_count, 0U) << "what could not be undone is told";
  }
  world.expect_contents(scenario.sleeps && !succeeded && !scenario.reuses);
}

// What is leaked does not come back before the end.
void make_room_for_leaks(const World& world, const Scenario& scenario) {
  if (scenario.make_room && world.leaked() != 0) scenario.make_room(world);
}

void expect_retry_succeeds(World& world, const Scenario& scenario, const State& expected,
                           bool regrown, bool settled) {
  make_room_for_leaks(world, scenario);
  EXPECT_EQ(scenario.again(world), CUMEMPOOL_OK) << cumempool_last_error()->message;
  EXPECT_TRUE(same(world.state(), expected, regrown)) << ::testing::PrintToString(world.state());
  EXPECT_EQ(world.pool.snapshot().totals.pending_free_bytes, 0U);
  for (const auto& tag : world.pool.snapshot().tags) EXPECT_EQ(tag.unreleased_bytes, 0U);
  if (scenario.finally) scenario.finally(world);
  world.expect_exact(settled && !scenario.gathers);
}

// What the operation did with these failures.
struct Ending {
  bool succeeded;
  std::uint64_t failures;
  std::string message;
  std::size_t secondary_count;
  std::string failed_entry;
};

Ending act_with_failures(World& world, const Scenario& scenario, const Point& point) {
  for (const std::string& entry : scenario.excluded) world.faults.exclude(entry);
  world.faults.reset_counts();
  std::atomic<const char*> failed_entry{""};
  world.faults.observe([&](const char* entry) {
    if (world.faults.failures() == 0) failed_entry = entry;
  });
  world.faults.fail_nth_of_any(point.call, point.result, point.repeat);
  if (point.second != 0) world.faults.fail_nth_of_any(point.call + point.second, point.result);
  const bool succeeded = scenario.act(world) == CUMEMPOOL_OK;
  const cumempool_error& error = *cumempool_last_error();
  Ending ending{succeeded, world.faults.failures(), succeeded ? "" : error.message,
                succeeded ? 0 : error.secondary_count, failed_entry.load()};
  world.faults.fail_nothing();
  world.faults.observe(nullptr);
  world.opened.reset();
  return ending;
}

// Nothing is lost for good: what was leaked is tried once more.
void expect_close_gives_all_back(const World& world) {
  EXPECT_EQ(world.pool.close(true), CUMEMPOOL_OK) << cumempool_last_error()->message;
  const cumempool_totals totals = world.pool.snapshot().totals;
  EXPECT_EQ(totals.leaked_bytes + totals.pending_free_bytes + totals.peer_bytes, 0U);
  for (const auto& block : world.pool.snapshot().allocations) must(cumempool_free(block.address));
  EXPECT_EQ(world.counters().charged_bytes + world.counters().handles, 0U);
  EXPECT_EQ(world.counters().mapped_bytes + world.counters().reserved_bytes, 0U);
}

// Runs the operation with these failures. Returns whether all of them were reached.
bool run(const Site& site, const Scenario& scenario, const Reference& reference,
         const Point& point) {
  World world(site, scenario.retains);
  scenario.prepare(world);
  const Ending ending = act_with_failures(world, scenario, point);
  const bool succeeded = ending.succeeded;
  SCOPED_TRACE("at or before " + ending.failed_entry + ": " + ending.message);

  EXPECT_TRUE(ending.failures != 0 || succeeded);
  EXPECT_EQ(succeeded, ending.message.empty());
  expect_all_or_nothing(world, scenario, reference, point, succeeded, ending.secondary_count);
  if (point.recovery == Recovery::kRetry) {
    expect_retry_succeeds(world, scenario, succeeded ? reference.after_retry : reference.after,
                          !succeeded, point.alone());
  }
  world.opened.reset();
  if (!scenario.closes) {
    make_room_for_leaks(world, scenario);
    const bool lost = succeeded || scenario.reuses || point.recovery == Recovery::kRetry;
    (scenario.look ? scenario.look : wake_and_look)(world, scenario.sleeps && !lost);
    world.expect_exact(point.alone());
    world.pool.release_host_memory();  // and what copies may have been using
    world.expect_exact();
  }
  expect_close_gives_all_back(world);
  return ending.failures >= (point.second == 0 ? 1U : 2U);
}

}  // namespace

std::string Point::text() const {
  return "call " + std::to_string(call) + (repeat == Repeat::kOnce ? "" : " and all later") +
         (second == 0 ? "" : " and the " + std::to_string(second) + ". after it") + ": " +
         cumempool_result_name(result) + (recovery == Recovery::kRetry ? "" : ", then wake");
}

Reference::Reference(const Site& site, const Scenario& scenario) {
  World world(site, scenario.retains);
  scenario.prepare(world);
  before = world.state();
  for (const std::string& entry : scenario.excluded) world.faults.exclude(entry);
  world.faults.reset_counts();
  EXPECT_EQ(scenario.act(world), CUMEMPOOL_OK) << cumempool_last_error()->message;
  calls = world.faults.calls();
  world.opened.reset();
  after = world.state();
  EXPECT_EQ(scenario.again(world), CUMEMPOOL_OK) << cumempool_last_error()->message;
  after_retry = world.state();
  if (scenario.finally) scenario.finally(world);
}

void Sweep::all() {
  for (const Recovery recovery : {Recovery::kRetry, Recovery::kWake}) {
    if (recovery == Recovery::kWake && !scenario_.sleeps) continue;
    for (const cumempool_result result : {kOutOfMemory, kLaunchFailed}) {
      single(result, Repeat::kOnce, recovery);
      single(result, Repeat::kFromThenOn, recovery);
    }
    pairs(kLaunchFailed, recovery);
  }
}

void Sweep::single(cumempool_result result, Repeat repeat, Recovery recovery) {
  for (std::uint64_t call = 1; try_at({call, 0, result, repeat, recovery}); ++call) {
  }
}

// Every pair, or an even sample of them.
void Sweep::pairs(cumempool_result result, Recovery recovery) {
  const std::uint64_t calls = reference_.calls;
  const std::uint64_t stride = 1 + calls * calls / 2 / kMostPairs;
  for (std::uint64_t call = 1; call <= calls; ++call) {
    // A step that no short cycle of calls shares.
    for (std::uint64_t later = 1 + call * 7 % stride;; later += stride) {
      if (!try_at({call, later, result, Repeat::kOnce, recovery})) break;
    }
  }
}

// Single calls that fail once come twice as often as each other kind: they are what happens.
std::vector<Point> Sweep::planned() const {
  std::vector<Point> points;
  for (std::uint64_t call = 1; call <= reference_.calls; ++call) {
    const bool even = call % 2 == 0;
    const Recovery recovery =
        scenario_.sleeps && call % 3 == 0 ? Recovery::kWake : Recovery::kRetry;
    const cumempool_result result = even ? kOutOfMemory : kLaunchFailed;
    points.push_back({call, 0, result, Repeat::kOnce, recovery});
    points.push_back({call, 0, kLaunchFailed, Repeat::kFromThenOn, recovery});
    points.push_back({call, 0, even ? kLaunchFailed : kOutOfMemory, Repeat::kOnce, recovery});
    points.push_back({call, 1 + call * 7 % 11, kLaunchFailed, Repeat::kOnce, recovery});
  }
  return points;
}

void Sweep::sample(std::uint64_t most) {
  const std::vector<Point> points = planned();
  // Odd, so that no kind is always left out.
  const std::uint64_t stride = (points.size() + most - 1) / most | 1U;
  for (std::size_t at = 0; at < points.size(); at += stride) {
    if (::testing::Test::HasFailure()) return;
    try_at(points[at]);
  }
}

bool Sweep::try_at(const Point& point) {
  if (::testing::Test::HasFailure()) return false;
  SCOPED_TRACE(point.text());
  const std::size_t descriptors = open_descriptors();
  const bool reached = run(site_, scenario_, reference_, point);
  EXPECT_EQ(open_descriptors(), descriptors);
  if (!reached) return false;
  ++tried_;
  if (!::testing::Test::HasFailure()) ++passed_;
  return true;
}

}  // namespace cumempool::tests
