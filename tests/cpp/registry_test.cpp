// Which live allocation an address belongs to: anywhere inside it, whichever allocator made it.
#include "pool/records.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "host_fixture.hpp"

namespace cumempool::tests {
namespace {

class RegistryTest : public ::testing::Test {
 protected:
  static cumempool_status find(cumempool_allocator* allocator, cumempool_address address,
                               cumempool_allocation_info& info) {
    return cumempool_find(allocator, address, &info);
  }

  Host host;
  Pool pool{host};
};

TEST_F(RegistryTest, FindsAnAllocationFromItsFirstByteToItsLast) {
  const auto address = pool.malloc("weights", 2 * kGranule);
  for (const std::uint64_t offset : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{kGranule},
                                     std::uint64_t{2 * kGranule - 1}}) {
    EXPECT_EQ(pool.find(address + offset).address, address) << offset;
  }
}

TEST_F(RegistryTest, DoesNotFindWhatLiesBesideAnAllocation) {
  const auto address = pool.malloc("weights", kGranule);
  cumempool_allocation_info info{};
  info.size = sizeof info;
  info.bytes = 5;
  for (const cumempool_address outside : {address - 1, address + kGranule, cumempool_address{0},
                                          cumempool_address{1}, ~cumempool_address{0}}) {
    EXPECT_EQ(find(pool.get(), outside, info), CUMEMPOOL_NOT_OWNED) << outside;
  }
  EXPECT_EQ(info.bytes, 5U) << "outputs are untouched on failure";
  EXPECT_STREQ(cumempool_last_error()->operation, "find");
}

TEST_F(RegistryTest, FindsNeighboursApart) {
  std::vector<cumempool_address> addresses;
  addresses.reserve(10);
  for (int i = 0; i < 10; ++i) addresses.push_back(pool.malloc("weights", kGranule));
  for (const auto address : addresses) {
    EXPECT_EQ(pool.find(address).address, address);
    EXPECT_EQ(pool.find(address + kGranule - 1).address, address);
  }
}

TEST_F(RegistryTest, TellsAllocatorsApart) {
  const Pool other(host);
  const auto address = pool.malloc("weights", kGranule);
  cumempool_allocation_info info{};
  info.size = sizeof info;
  EXPECT_EQ(find(other.get(), address, info), CUMEMPOOL_NOT_OWNED);
  EXPECT_EQ(find(nullptr, address + 5, info), CUMEMPOOL_OK);
  EXPECT_EQ(info.address, address);
}

TEST_F(RegistryTest, AsleepAllocationsAreFoundToo) {
  const auto address = pool.malloc("weights", kGranule);
  must(pool.sleep("weights", kDiscard).status);
  EXPECT_EQ(pool.find(address + 9).state, CUMEMPOOL_ASLEEP_DISCARDED);
}

TEST_F(RegistryTest, FreeTakesTheFirstByteOnlyAndOnlyOnce) {
  const auto address = pool.malloc("weights", 2 * kGranule);
  EXPECT_EQ(cumempool_free(address + 1), CUMEMPOOL_NOT_OWNED);
  EXPECT_EQ(cumempool_free(0), CUMEMPOOL_NOT_OWNED);
  EXPECT_EQ(pool.find(address).address, address) << "nothing was lost";
  EXPECT_EQ(cumempool_free(address), CUMEMPOOL_OK);
  EXPECT_EQ(cumempool_free(address), CUMEMPOOL_NOT_OWNED);
  cumempool_allocation_info info{};
  info.size = sizeof info;
  EXPECT_EQ(find(nullptr, address, info), CUMEMPOOL_NOT_OWNED);
}

TEST_F(RegistryTest, TakeRemovesExactlyWhatStartsThere) {
  const auto address = pool.malloc("weights", kGranule);
  pool::Registry& registry = pool::Registry::instance();
  EXPECT_EQ(registry.take(address + 1), nullptr);
  const auto record = registry.take(address);
  ASSERT_NE(record, nullptr);
  EXPECT_EQ(record->address, address);
  EXPECT_EQ(registry.find(address), nullptr);
  EXPECT_EQ(registry.take(address), nullptr);
  registry.add(record);
  EXPECT_EQ(registry.find(address + 1), record);
}

}  // namespace
}  // namespace cumempool::tests
