// What the host driver promises beyond the contract about ordinary memory and about access to read
// alone: who may use it, what it takes from the budget, and what breaks the device.
#include <gtest/gtest.h>
#include <sys/random.h>
#include <unistd.h>

#include <cerrno>
#include <string>

#include "driver/driver.hpp"
#include "driver/error.hpp"
#include "host_driver_fixture.hpp"

namespace cumempool::driver {
namespace {

using conformance::Allocation;
using conformance::Block;
using conformance::HostBuffer;
using conformance::Inside;
using conformance::kRead;
using conformance::kReadWrite;
using conformance::map_at;
using conformance::must;
using conformance::Range;

class HostDriverMemoryTest : public HostDriverTest {
 protected:
  cumempool_result give_access(cumempool_address address, int device, cumempool_access access) {
    return CALL(table_, set_access, address, kGranule, &device, std::size_t{1}, access);
  }

  // The device's context ended and made anew, as after a program's mistake.
  void renew_context() {
    must(CALL(table_, context_release, 0), "context_release");
    must(CALL(table_, context_retain, 0), "context_retain");
  }
};

std::uint8_t byte_at(cumempool_address address) {
  return *reinterpret_cast<const std::uint8_t*>(address);  // NOLINT
}

// The kernel says so without a signal.
bool cpu_may_write(cumempool_address address) {
  if (getrandom(reinterpret_cast<void*>(address), 1, 0) == 1) return true;  // NOLINT
  EXPECT_EQ(errno, EFAULT);
  return false;
}

// ---- allocations ----------------------------------------------------------------------------

TEST_F(HostDriverMemoryTest, AllocationsTakeWholeGranulesOfTheBudget) {
  {
    const Allocation memory(table_, kGranule + 1);
    const auto held = host_driver_counters(&table_);
    EXPECT_EQ(held.allocations, 1u);
    EXPECT_EQ(held.charged_bytes, 2 * kGranule);
    EXPECT_EQ(held.reservations + held.handles + held.mappings, 0u);
    EXPECT_EQ(held.reserved_bytes + held.mapped_bytes, 0u);
    EXPECT_EQ(free_bytes(), kBudget - 2 * kGranule);
  }
  EXPECT_EQ(host_driver_counters(&table_).allocations, 0u);
  EXPECT_EQ(free_bytes(), kBudget);
}

TEST_F(HostDriverMemoryTest, C12_AllocationsShareTheBudgetWithMappings) {
  const Block block(table_, kGranule, properties_);
  cumempool_address address = 0;
  cumempool_physical physical = 0;
  for (const std::size_t bytes : {kBudget - kGranule + 1, kBudget + 1, ~std::size_t{0}}) {
    EXPECT_EQ(CALL(table_, allocate, 0, bytes, &address), CUMEMPOOL_RESULT_OUT_OF_MEMORY) << bytes;
  }
  const Allocation rest(table_, kBudget - kGranule);
  EXPECT_EQ(free_bytes(), 0u);
  EXPECT_EQ(CALL(table_, allocate, 0, std::size_t{1}, &address), CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  EXPECT_EQ(CALL(table_, create, kGranule, &properties_, &physical),
            CUMEMPOOL_RESULT_OUT_OF_MEMORY);
}

TEST_F(HostDriverMemoryTest, AllocationsHaveTheirBytesAndNoMore) {
  const Allocation memory(table_, kGranule + 100);
  EXPECT_NE(byte_at(memory.address()), 0) << "new memory is not zero";
  EXPECT_EQ(fill(memory.address(), 1, kGranule + 101), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(fill(memory.address() - 1, 1, 2), CUMEMPOOL_RESULT_INVALID_VALUE);
  must(fill(memory.address(), 1, kGranule + 100), "fill");
  must(fence(table_, 0), "fence");
  EXPECT_EQ(byte_at(memory.address()), 1);
  EXPECT_EQ(byte_at(memory.address() + kGranule + 99), 1);
  EXPECT_TRUE(cpu_may_write(memory.address()));
}

TEST_F(HostDriverMemoryTest, C6_AllocationsAreNeitherMappingsNorReservationsNorHandles) {
  const Allocation memory(table_, 2 * kGranule);
  const cumempool_physical physical = create(kGranule);
  const cumempool_address address = memory.address();
  int descriptor = -1;
  EXPECT_EQ(CALL(table_, unmap, address, 2 * kGranule), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, unreserve, address, 2 * kGranule), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, map, address, kGranule, physical), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(give_access(address, 0, kReadWrite), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(give_access(address, 0, kRead), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, release, address), CUMEMPOOL_RESULT_INVALID_HANDLE);
  EXPECT_EQ(CALL(table_, export_handle, address, CUMEMPOOL_HANDLE_POSIX_FD, &descriptor),
            CUMEMPOOL_RESULT_INVALID_HANDLE);
  EXPECT_EQ(host_driver_counters(&table_).allocations, 1u);
  must(fill(address, 1), "still there");
}

TEST_F(HostDriverMemoryTest, MappingsAreNotDeallocated) {
  const Block block(table_, kGranule, properties_);
  const Range range(table_, kGranule);
  EXPECT_EQ(CALL(table_, deallocate, 0, block.address()), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, deallocate, 0, range.address()), CUMEMPOOL_RESULT_INVALID_VALUE);
}

TEST_F(HostDriverMemoryTest, AllocationsAreForTheirDeviceAlone) {
  const Allocation memory(table_, kGranule);
  must(CALL(table_, context_retain, 1), "context_retain");
  const Inside other(table_, 1);
  EXPECT_EQ(CALL(table_, fill, 1, memory.address(), std::uint8_t{1}, kGranule, kLegacyStream),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, deallocate, 1, memory.address()), CUMEMPOOL_RESULT_INVALID_VALUE);
  const Inside again(table_, 0);  // for the owner above
}

TEST_F(HostDriverMemoryTest, DeallocateRunsTheWorkOfItsDevice) {
  cumempool_address address = 0;
  must(CALL(table_, allocate, 0, kGranule, &address), "allocate");
  const Block block(table_, kGranule, properties_);
  const conformance::Stream stream(table_);
  must(fill(address, 7), "fill");
  must(fill(block.address(), 8, kGranule, stream.get()), "fill");
  EXPECT_EQ(CALL(table_, deallocate, 0, address + 1), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(host_driver_counters(&table_).queued_commands, 2u) << "refused without a wait";
  must(CALL(table_, deallocate, 0, address), "deallocate");
  EXPECT_EQ(host_driver_counters(&table_).queued_commands, 0u);
  EXPECT_EQ(first_byte(block), 8);
}

TEST_F(HostDriverMemoryTest, DeallocateOnABrokenDeviceHasNoEffect) {
  cumempool_address address = 0;
  must(CALL(table_, allocate, 0, kGranule, &address), "allocate");
  {
    const Block block(table_, kGranule, properties_);
    must(fill(block.address(), 1), "fill");
  }
  EXPECT_EQ(CALL(table_, deallocate, 0, address), kIllegalAddress) << "the work it waited for";
  EXPECT_EQ(CALL(table_, deallocate, 0, address), kIllegalAddress);
  EXPECT_EQ(host_driver_counters(&table_).allocations, 1u);
  EXPECT_EQ(host_driver_counters(&table_).charged_bytes, kGranule);
}

TEST_F(HostDriverMemoryTest, AllocationsAreLostWithTheirContextAndCountedAsLeaks) {
  cumempool_address address = 0;
  must(CALL(table_, allocate, 0, kGranule, &address), "allocate");
  renew_context();
  EXPECT_EQ(free_bytes(), kBudget);
  EXPECT_EQ(host_driver_counters(&table_).allocations, 1u);
  EXPECT_EQ(fill(address, 1), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, deallocate, 0, address), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_FALSE(cpu_may_write(address));
  renew_context();
  EXPECT_EQ(host_driver_counters(&table_).allocations, 1u);
}

TEST_F(HostDriverMemoryTest, DriverThrowsWhatAllocateAndDeallocateSay) {
  const Driver driver(table_);
  const cumempool_address address = driver.allocate(0, kGranule);
  must(CALL(table_, deallocate, 0, address), "deallocate");
  try {
    (void)driver.allocate(0, 2 * kBudget);
    ADD_FAILURE() << "allocated more than there is";
  } catch (const Error& error) {
    EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_MEMORY);
    EXPECT_EQ(error.driver_call, "host.allocate");
    EXPECT_EQ(error.bytes, 2 * kBudget);
    EXPECT_EQ(error.free_bytes, kBudget);
  }
}

TEST_F(HostDriverMemoryTest, DriverNamesTheCudaFunctions) {
  cumempool_driver named = table_;
  named.name = "cuda";
  const auto call_of = [&](const char* entry) {
    try {
      check(named, entry, CUMEMPOOL_RESULT_INVALID_VALUE);
    } catch (const Error& error) {
      return error.driver_call;
    }
    return std::string("success");
  };
  EXPECT_EQ(call_of("allocate"), "cuMemAlloc");
  EXPECT_EQ(call_of("deallocate"), "cuMemFree");
}

TEST_F(HostDriverMemoryTest, AllocateNeedsSomewhereToPutTheAddress) {
  EXPECT_EQ(CALL(table_, allocate, 0, kGranule, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, allocate, 2, kGranule, nullptr), CUMEMPOOL_RESULT_INVALID_DEVICE);
  EXPECT_EQ(host_driver_counters(&table_).charged_bytes, 0u);
}

// ---- access to read alone -------------------------------------------------------------------

TEST_F(HostDriverMemoryTest, C8_WritesWithReadAccessAreRefused) {
  const Block block(table_, kGranule, properties_);
  const Block other(table_, kGranule, properties_);
  const HostBuffer pages(table_, kGranule);
  must(give_access(block.address(), 0, kRead), "set_access");
  EXPECT_EQ(fill(block.address(), 1), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, copy_to_device, 0, block.address(), pages.data(), kGranule, kLegacyStream),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(
      CALL(table_, copy_on_device, 0, block.address(), other.address(), kGranule, kLegacyStream),
      CUMEMPOOL_RESULT_INVALID_VALUE);
  must(CALL(table_, copy_on_device, 0, other.address(), block.address(), kGranule, kLegacyStream),
       "copy_on_device");
  must(CALL(table_, copy_to_host, 0, pages.data(), block.address(), kGranule, kLegacyStream),
       "copy_to_host");
  EXPECT_EQ(fence(table_, 0), CUMEMPOOL_RESULT_SUCCESS) << "refused, not submitted";
}

TEST_F(HostDriverMemoryTest, C8_WritesThatLostTheirAccessBreakTheDevice) {
  const Range range(table_, kGranule);
  const Range other_range(table_, kGranule);
  map_at(table_, range.address(), kGranule, create(kGranule));
  map_at(table_, other_range.address(), kGranule, create(kGranule));
  for (int kind = 0; kind < 2; ++kind) {
    must(give_access(range.address(), 0, kReadWrite), "set_access");
    const std::uint8_t before = byte_at(range.address());
    must(kind == 0 ? fill(range.address(), 1)
                   : CALL(table_, copy_on_device, 0, range.address(), other_range.address(),
                          kGranule, kLegacyStream),
         "write");
    must(give_access(range.address(), 0, kRead), "set_access");
    EXPECT_EQ(fence(table_, 0), kIllegalAddress) << kind;
    EXPECT_EQ(byte_at(range.address()), before) << kind;
    renew_context();
  }
  for (const auto address : {range.address(), other_range.address()}) {
    must(CALL(table_, unmap, address, kGranule), "unmap");
  }
}

TEST_F(HostDriverMemoryTest, C8_ReadsThatLostOnlyTheirAccessToWriteGoOn) {
  const Block block(table_, kGranule, properties_);
  const HostBuffer pages(table_, kGranule);
  must(fill(block.address(), 9), "fill");
  must(fence(table_, 0), "fence");
  must(CALL(table_, copy_to_host, 0, pages.data(), block.address(), kGranule, kLegacyStream),
       "copy_to_host");
  must(give_access(block.address(), 0, kRead), "set_access");
  must(fence(table_, 0), "fence");
  EXPECT_TRUE(pages.all_are(9));
}

TEST_F(HostDriverMemoryTest, C8_TheCpuWritesWhatSomeDeviceMayWrite) {
  const Range range(table_, kGranule);
  must(CALL(table_, map, range.address(), kGranule, create(kGranule)), "map");
  EXPECT_FALSE(cpu_may_write(range.address()));
  must(give_access(range.address(), 0, kRead), "set_access");
  EXPECT_FALSE(cpu_may_write(range.address()));
  EXPECT_NE(byte_at(range.address()), 0) << "but may be read";
  must(give_access(range.address(), 1, kReadWrite), "set_access");
  EXPECT_TRUE(cpu_may_write(range.address())) << "device 1 may";
  EXPECT_EQ(fill(range.address(), 1), CUMEMPOOL_RESULT_INVALID_VALUE) << "device 0 may not";
  must(give_access(range.address(), 1, kRead), "set_access");
  EXPECT_FALSE(cpu_may_write(range.address()));
  must(CALL(table_, unmap, range.address(), kGranule), "unmap");
}

TEST_F(HostDriverMemoryTest, C8_OneSetAccessKeepsWhatOtherDevicesMayDoWithEachMapping) {
  const Range range(table_, 2 * kGranule);
  const int first = 0;
  for (const cumempool_address address : {range.address(), range.address() + kGranule}) {
    must(CALL(table_, map, address, kGranule, create(kGranule)), "map");
  }
  must(give_access(range.address() + kGranule, 1, kReadWrite), "set_access");
  must(CALL(table_, set_access, range.address(), 2 * kGranule, &first, std::size_t{1}, kRead),
       "set_access");
  EXPECT_FALSE(cpu_may_write(range.address()));
  EXPECT_TRUE(cpu_may_write(range.address() + kGranule)) << "device 1 still may";
  for (const cumempool_address address : {range.address(), range.address() + kGranule}) {
    must(CALL(table_, unmap, address, kGranule), "unmap");
  }
}

TEST_F(HostDriverMemoryTest, C8_EachMappingOfAnImportHasAnAccessOfItsOwn) {
  const Range range(table_, kGranule);
  const Range imported_range(table_, kGranule);
  const cumempool_physical made = create(kGranule);
  cumempool_physical imported = 0;
  int descriptor = -1;
  must(CALL(table_, export_handle, made, CUMEMPOOL_HANDLE_POSIX_FD, &descriptor), "export_handle");
  must(CALL(table_, import_handle, &descriptor, CUMEMPOOL_HANDLE_POSIX_FD, &imported), "import");
  close(descriptor);
  map_at(table_, range.address(), kGranule, made);
  must(CALL(table_, map, imported_range.address(), kGranule, imported), "map");
  Driver(table_).set_access(imported_range.address(), kGranule, {0, 1}, kRead);
  EXPECT_FALSE(cpu_may_write(imported_range.address()));
  EXPECT_EQ(fill(imported_range.address(), 1), CUMEMPOOL_RESULT_INVALID_VALUE);
  must(fill(range.address(), 2), "fill");
  must(fence(table_, 0), "fence");
  EXPECT_EQ(byte_at(imported_range.address()), 2);
  must(CALL(table_, unmap, imported_range.address(), kGranule), "unmap");
  must(CALL(table_, unmap, range.address(), kGranule), "unmap");
}

}  // namespace
}  // namespace cumempool::driver
