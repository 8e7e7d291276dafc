// Runs one operation with some of its driver calls failing, and holds the outcome to the rules: all
// or nothing (R4), contents kept, numbers exact (R13), a retry that succeeds, and nothing left in
// the end.
//
// Alone, a failure must leave all or nothing; memory that had gone already is taken again for it
// and has a new generation. Where undoing fails as well, allocations may be left asleep with their
// contents kept, and the error's secondary failures say so; then a retry, and in its place a wake,
// must bring everything back. What a swap discards may have been reused before it failed: then it
// sleeps, and the error says so. A `release` that fails once all contents are safe is no failure of
// a sleep but a problem in its report. What the driver refuses to take back is leaked: it may be
// missing where a device is full, and closing gives it back.
#pragma once

#include <cstdint>
#include <functional>
#include <ostream>
#include <string>
#include <vector>

#include "sweep_world.hpp"

namespace cumempool::tests {

using Repeat = driver::FaultDriver::Repeat;

constexpr cumempool_result kOutOfMemory = CUMEMPOOL_RESULT_OUT_OF_MEMORY;
constexpr cumempool_result kLaunchFailed = 719;

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
  std::function<void(const World&)> make_room{};  // for as much as may be leaked; none = there is

  cumempool_status again(World& world) const { return retry ? retry(world) : act(world); }
};

inline std::ostream& operator<<(std::ostream& out, const Scenario& scenario) {
  return out << scenario.name;
}

enum class Recovery { kRetry, kWake };

// Which calls fail, and how the program goes on.
struct Point {
  std::uint64_t call;
  std::uint64_t second;  // one more, so many calls later; 0 = none
  cumempool_result result;
  Repeat repeat;
  Recovery recovery;

  bool alone() const { return second == 0 && repeat == Repeat::kOnce; }
  std::string text() const;
};

// How the operation ends when nothing fails.
struct Reference {
  Reference(const Site& site, const Scenario& scenario);

  State before;
  State after;
  State after_retry;
  std::uint64_t calls = 0;  // that can fail
};

// All points of a scenario, or a sample; stops at the first that fails, for it tells enough.
class Sweep {
 public:
  Sweep(const Site& site, const Scenario& scenario)
      : site_(site), scenario_(scenario), reference_(site, scenario) {}

  // Every call alone, every call with all later ones, and pairs.
  void all();
  // At most `most` of the points of all(), spread evenly over calls, pairs, results and recoveries.
  void sample(std::uint64_t most);

  std::uint64_t tried() const { return tried_; }    // that were reached
  std::uint64_t passed() const { return passed_; }  // of those

 private:
  void single(cumempool_result result, Repeat repeat, Recovery recovery);
  void pairs(cumempool_result result, Recovery recovery);
  std::vector<Point> planned() const;
  bool try_at(const Point& point);

  const Site& site_;
  const Scenario& scenario_;
  const Reference reference_;
  std::uint64_t tried_ = 0;
  std::uint64_t passed_ = 0;
};

// Every operation that a site has the devices for.
std::vector<Scenario> sweep_scenarios(int devices);

}  // namespace cumempool::tests
