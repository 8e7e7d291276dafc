// One allocation of the vmm layer: its states, what a failing step undoes, and its statistics
// (R13).
#include "vmm/allocation.hpp"

#include <gtest/gtest.h>

#include <array>
#include <string>
#include <utility>

#include "fault_driver.hpp"
#include "host_fixture.hpp"

namespace cumempool::tests {
namespace {

using driver::FaultDriver;
using vmm::Allocation;

class AllocationTest : public ::testing::Test {
 protected:
  static constexpr std::size_t kBytes = 2 * kGranule;

  Allocation make(std::size_t bytes = kBytes) {
    Allocation allocation(driver::Driver(faults.table()), stats, properties, bytes);
    allocation.map();
    return allocation;
  }

  void expect_stats(std::uint64_t reserved, std::uint64_t physical, std::uint64_t mapped) const {
    EXPECT_EQ(stats.reserved_bytes, reserved);
    EXPECT_EQ(stats.physical_bytes, physical);
    EXPECT_EQ(stats.mapped_bytes, mapped);
    const auto counters = host.counters();
    EXPECT_EQ(counters.reserved_bytes, reserved);
    EXPECT_EQ(counters.charged_bytes, physical);
    EXPECT_EQ(counters.mapped_bytes, mapped);
  }

  void fail_next(const char* entry) { faults.fail_nth(entry, 1, CUMEMPOOL_RESULT_OUT_OF_MEMORY); }

  Host host;
  FaultDriver faults{host.table()};
  vmm::MemoryStats stats;
  cumempool_memory_properties properties{0, 0, 0, 0};
};

TEST_F(AllocationTest, R2_IsUsableAtOneAddressThroughAllItsStates) {
  Allocation allocation = make();
  const cumempool_address address = allocation.address();
  EXPECT_TRUE(allocation.mapped());
  EXPECT_EQ(allocation.bytes(), kBytes);
  write_pattern(address, kBytes, 1);
  expect_stats(kBytes, kBytes, kBytes);

  allocation.unmap();
  EXPECT_FALSE(allocation.mapped());
  EXPECT_TRUE(allocation.holds_physical());
  expect_stats(kBytes, kBytes, 0);

  EXPECT_EQ(allocation.release_physical(), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_FALSE(allocation.holds_physical());
  expect_stats(kBytes, 0, 0);

  allocation.map();
  EXPECT_EQ(allocation.address(), address);
  EXPECT_FALSE(holds_pattern(address, kBytes, 1)) << "other physical memory";
  expect_stats(kBytes, kBytes, kBytes);
}

TEST_F(AllocationTest, R4_DetachedMemoryKeepsItsContentsAndNeedsNoMemoryToComeBack) {
  Allocation allocation = make();
  write_pattern(allocation.address(), kBytes, 1);
  allocation.unmap();
  const Allocation rest = make((kDeviceGranules - 2) * kGranule);  // the device is full now
  allocation.map();
  EXPECT_TRUE(holds_pattern(allocation.address(), kBytes, 1));
}

TEST_F(AllocationTest, RepeatedStepsDoNothing) {
  Allocation allocation = make();
  allocation.map();
  allocation.unmap();
  allocation.unmap();
  EXPECT_EQ(allocation.release_physical(), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(allocation.release_physical(), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(allocation.teardown(), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(allocation.teardown(), CUMEMPOOL_RESULT_SUCCESS);
  expect_stats(0, 0, 0);
}

TEST_F(AllocationTest, R13_AFailedMakingHoldsNothing) {
  for (const char* entry : {"reserve", "create", "map", "set_access"}) {
    fail_next(entry);
    EXPECT_THROW(make(), Error) << entry;
    expect_stats(0, 0, 0);
  }
  EXPECT_EQ(faults.failures(), 4U);
}

TEST_F(AllocationTest, R4_AFailedMapUndoesOnlyItsOwnSteps) {
  Allocation allocation = make();
  write_pattern(allocation.address(), kBytes, 1);
  allocation.unmap();
  for (const char* entry : {"map", "set_access"}) {
    fail_next(entry);
    EXPECT_THROW(allocation.map(), Error) << entry;
    EXPECT_TRUE(allocation.holds_physical()) << entry;
    expect_stats(kBytes, kBytes, 0);
  }
  allocation.map();
  EXPECT_TRUE(holds_pattern(allocation.address(), kBytes, 1));

  allocation.unmap();
  EXPECT_EQ(allocation.release_physical(), CUMEMPOOL_RESULT_SUCCESS);
  for (const char* entry : {"create", "map", "set_access"}) {
    fail_next(entry);
    EXPECT_THROW(allocation.map(), Error) << entry;
    EXPECT_FALSE(allocation.holds_physical()) << entry;
    expect_stats(kBytes, 0, 0);
  }
}

TEST_F(AllocationTest, R4_WhatAFailedMapCouldNotUndoIsUsedByTheNextOne) {
  Allocation allocation = make();
  allocation.unmap();
  EXPECT_EQ(allocation.release_physical(), CUMEMPOOL_RESULT_SUCCESS);
  fail_next("set_access");
  fail_next("unmap");
  EXPECT_THROW(allocation.map(), Error);
  EXPECT_FALSE(allocation.mapped()) << "mapped without access is not usable";
  expect_stats(kBytes, kBytes, kBytes);
  allocation.map();
  EXPECT_TRUE(allocation.mapped());
  expect_stats(kBytes, kBytes, kBytes);
  write_pattern(allocation.address(), kBytes, 1);
}

TEST_F(AllocationTest, R4_AFailedUnmapLeavesItMapped) {
  Allocation allocation = make();
  write_pattern(allocation.address(), kBytes, 1);
  fail_next("unmap");
  EXPECT_THROW(allocation.unmap(), Error);
  EXPECT_TRUE(allocation.mapped());
  EXPECT_TRUE(holds_pattern(allocation.address(), kBytes, 1));
  expect_stats(kBytes, kBytes, kBytes);
}

TEST_F(AllocationTest, R13_ATeardownStopsAtTheFirstFailureAndGoesOnLater) {
  const std::pair<const char*, std::array<std::uint64_t, 3>> steps[] = {
      {"unmap", {kBytes, kBytes, kBytes}},
      {"release", {kBytes, kBytes, 0}},
      {"unreserve", {kBytes, 0, 0}},
  };
  for (const auto& [entry, left] : steps) {
    Allocation allocation = make();
    fail_next(entry);
    EXPECT_EQ(allocation.teardown(), CUMEMPOOL_RESULT_OUT_OF_MEMORY) << entry;
    expect_stats(left[0], left[1], left[2]);
    EXPECT_EQ(allocation.teardown(), CUMEMPOOL_RESULT_SUCCESS) << entry;
    expect_stats(0, 0, 0);
  }
}

TEST_F(AllocationTest, R13_MovingKeepsOneOwner) {
  Allocation first = make();
  {
    const Allocation second = std::move(first);
    EXPECT_TRUE(second.mapped());
    expect_stats(kBytes, kBytes, kBytes);
  }
  expect_stats(0, 0, 0);
}

// ---- cudaMalloc, peers --------------------------------------------------------------------------

class CudaMallocAllocation : public AllocationTest {
 protected:
  Allocation make_cuda_malloc() {
    const driver::Driver driver(faults.table());
    return {driver, stats, 0, kBytes};
  }
  void expect_held(std::uint64_t bytes) const {
    EXPECT_EQ(stats.physical_bytes, bytes);
    EXPECT_EQ(stats.mapped_bytes, bytes);
    EXPECT_EQ(stats.reserved_bytes, 0U);
    EXPECT_EQ(host.counters().charged_bytes, bytes);
    EXPECT_EQ(host.counters().allocations, bytes / kBytes);
  }

  driver::RetainedContext context{driver::Driver(host.table()), 0};
};

TEST_F(CudaMallocAllocation, IsMappedForLife) {
  Allocation allocation = make_cuda_malloc();
  EXPECT_EQ(allocation.kind(), CUMEMPOOL_BACKING_CUDA_MALLOC);
  EXPECT_FALSE(allocation.can_sleep());
  EXPECT_FALSE(allocation.can_export());
  EXPECT_FALSE(allocation.can_extend());
  EXPECT_TRUE(allocation.free_waits());
  EXPECT_TRUE(allocation.mapped());
  EXPECT_TRUE(allocation.holds_physical());
  EXPECT_EQ(allocation.bytes(), kBytes);
  const cumempool_address address = allocation.address();
  write_pattern(address, kBytes, 1);
  allocation.map();
  try {
    allocation.unmap();
    FAIL() << "it cannot be detached";
  } catch (const Error& error) {
    EXPECT_EQ(error.status, CUMEMPOOL_INTERNAL);
  }
  EXPECT_EQ(allocation.release_physical(), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_TRUE(allocation.mapped()) << "only a teardown takes it away";
  EXPECT_EQ(allocation.address(), address);
  EXPECT_TRUE(holds_pattern(address, kBytes, 1));
  expect_held(kBytes);
}

TEST_F(CudaMallocAllocation, R13_AFailedMakingHoldsNothing) {
  for (const char* entry : {"context_enter", "allocate"}) {
    fail_next(entry);
    EXPECT_THROW(make_cuda_malloc(), Error) << entry;
    expect_held(0);
  }
}

TEST_F(CudaMallocAllocation, R13_AFailedTeardownLeavesItHeldAndMayBeRepeated) {
  for (const char* entry : {"context_enter", "deallocate"}) {
    Allocation allocation = make_cuda_malloc();
    write_pattern(allocation.address(), kBytes, 1);
    fail_next(entry);
    EXPECT_EQ(allocation.teardown(), CUMEMPOOL_RESULT_OUT_OF_MEMORY) << entry;
    EXPECT_TRUE(allocation.mapped());
    EXPECT_TRUE(holds_pattern(allocation.address(), kBytes, 1));
    expect_held(kBytes);
    EXPECT_EQ(allocation.teardown(), CUMEMPOOL_RESULT_SUCCESS) << entry;
    EXPECT_FALSE(allocation.mapped());
    EXPECT_FALSE(allocation.holds_physical());
    EXPECT_EQ(allocation.teardown(), CUMEMPOOL_RESULT_SUCCESS);
    expect_held(0);
  }
}

TEST_F(CudaMallocAllocation, R13_MovingKeepsOneOwner) {
  Allocation first = make_cuda_malloc();
  {
    const Allocation second = std::move(first);
    EXPECT_TRUE(second.mapped());
    expect_held(kBytes);
  }
  expect_held(0);
}

TEST_F(AllocationTest, R4_AMapWhoseSecondDeviceGetsNoAccessIsUndone) {
  Allocation allocation(driver::Driver(faults.table()), stats, properties, kBytes, {0, 1});
  driver::host_driver_set_peer_access(&host.table(), false);
  EXPECT_THROW(allocation.map(), Error);
  EXPECT_FALSE(allocation.mapped());
  expect_stats(kBytes, 0, 0);
  driver::host_driver_set_peer_access(&host.table(), true);
  allocation.map();
  EXPECT_TRUE(allocation.mapped());
  expect_stats(kBytes, kBytes, kBytes);
}

TEST_F(AllocationTest, R12_OutOfMemoryTellsTheCallAndTheDevice) {
  try {
    make((kDeviceGranules + 1) * kGranule);
    FAIL() << "there is no room for it";
  } catch (const Error& error) {
    EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_MEMORY);
    EXPECT_EQ(error.driver_call, "host.create");
    EXPECT_EQ(error.device, 0);
    EXPECT_EQ(error.bytes, (kDeviceGranules + 1) * kGranule);
  }
  expect_stats(0, 0, 0);
}

}  // namespace
}  // namespace cumempool::tests
