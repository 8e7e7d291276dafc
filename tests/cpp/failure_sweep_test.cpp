// Fails every driver call of every operation: alone, with every later one, and in pairs, on the
// host driver; and a sample of them on the host and on the cuda driver. sweep.hpp says what must
// hold.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iostream>

#include "conformance_fixture.hpp"
#include "sweep.hpp"

namespace cumempool::tests {
namespace {

class FailureSweep : public ::testing::TestWithParam<Scenario> {};

TEST_P(FailureSweep, R4_R13_EveryFailedCallLeavesAllOrNothing) {
  const HostSite site;
  Sweep sweep(site, GetParam());
  sweep.all();
  std::cout << GetParam() << ": " << sweep.tried() << " points tried, " << sweep.passed()
            << " passed\n";
  RecordProperty("points_tried", std::to_string(sweep.tried()));
  RecordProperty("points_passed", std::to_string(sweep.passed()));
  EXPECT_GT(sweep.tried(), 0U);
  EXPECT_EQ(sweep.passed(), sweep.tried());
}

INSTANTIATE_TEST_SUITE_P(Operations, FailureSweep,
                         ::testing::ValuesIn(sweep_scenarios(HostSite().devices())),
                         [](const auto& tested) { return tested.param.name; });

// ---- a sample, on any driver ------------------------------------------------------------------

// Points of an operation, at most. TEST_SWEEP_POINTS names another number, for slower machines.
std::uint64_t sampled() {
  const char* const given = std::getenv("TEST_SWEEP_POINTS");
  return given == nullptr ? 16 : std::max(1ULL, std::strtoull(given, nullptr, 10));
}

// All operations in one test, for they share the contexts of the devices. The sample is the same
// each time, as far as the driver's calls are.
class SampledSweep : public ::testing::Test {
 protected:
  void sweep(const std::string& name, const Site& site) {
    const auto begin = std::chrono::steady_clock::now();
    std::uint64_t tried = 0;
    std::uint64_t passed = 0;
    const std::vector<Scenario> scenarios = sweep_scenarios(site.devices());
    for (const Scenario& scenario : scenarios) {
      SCOPED_TRACE(scenario.name);
      Sweep sweep(site, scenario);
      sweep.sample(sampled());
      tried += sweep.tried();
      passed += sweep.passed();
      std::cout << "  " << scenario.name << ": " << sweep.tried() << std::endl;  // seen if killed
      if (HasFailure()) break;
    }
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
    std::cout << "sampled sweep on " << name << " (" << site.devices() << " devices): " << passed
              << " of " << tried << " passed, " << scenarios.size() << " operations, "
              << taken.count() << " s\n";
    RecordProperty("points_tried", std::to_string(tried));
    RecordProperty("points_passed", std::to_string(passed));
    EXPECT_GE(tried, scenarios.size());
    EXPECT_EQ(passed, tried);
  }
};

TEST_F(SampledSweep, R4_R13_OnTheHostDriver) { sweep("host", HostSite()); }

// As many devices as there are GPUs in a small machine: backups on a peer want two.
TEST_F(SampledSweep, R4_R13_OnAHostDriverOfOneDevice) { sweep("host", HostSite(1)); }

TEST_F(SampledSweep, R4_R13_OnAHostDriverOfTwoDevices) { sweep("host", HostSite(2)); }

TEST_F(SampledSweep, R4_R13_OnTheCudaDriver) {
  if (conformance::cuda_drivers().empty()) GTEST_SKIP() << "there is no GPU in this machine";
  try {
    const CudaSite site;
    sweep("cuda", site);
  } catch (const Error& error) {
    if (conformance::gpu_required()) FAIL() << error.message();
    GTEST_SKIP() << "the cuda driver does not open here: " << error.message();
  }
}

}  // namespace
}  // namespace cumempool::tests
