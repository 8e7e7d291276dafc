// What the tests of the host driver's own promises stand on: a small driver of two devices, with
// device 0 entered, and no check that everything was given back.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>

#include "conformance_fixture.hpp"
#include "driver/builtin.hpp"
#include "driver/host_driver.hpp"

namespace cumempool::driver {

using conformance::fence;

constexpr std::size_t kGranule = 64u << 10;
constexpr std::size_t kBudget = 16 * kGranule;
constexpr cumempool_stream kLegacyStream = 0;

inline cumempool_host_driver_options good_options() {
  cumempool_host_driver_options options{};
  options.size = sizeof options;
  options.device_count = 2;
  options.bytes_per_device = kBudget;
  options.granularity = kGranule;
  options.handle_types = CUMEMPOOL_HANDLE_POSIX_FD;
  return options;
}

class HostDriverTest : public ::testing::Test {
 protected:
  HostDriverTest() : table_(*make_host_driver(good_options())) {
    conformance::must(table_.init(table_.self), "init");
    conformance::must(CALL(table_, context_retain, 0), "context_retain");
    conformance::must(CALL(table_, context_enter, 0, &token_), "context_enter");
  }
  void TearDown() override { destroy_host_driver(&table_); }

  cumempool_physical create(std::size_t bytes) {
    cumempool_physical physical = 0;
    conformance::must(CALL(table_, create, bytes, &properties_, &physical), "create");
    return physical;
  }

  std::uint64_t free_bytes() {
    std::uint64_t free = 0;
    std::uint64_t total = 0;
    conformance::must(CALL(table_, memory_info, 0, &free, &total), "memory_info");
    EXPECT_EQ(total, kBudget);
    return free;
  }

  cumempool_result fill(cumempool_address address, std::uint8_t byte, std::size_t bytes = kGranule,
                        cumempool_stream stream = kLegacyStream) {
    return CALL(table_, fill, 0, address, byte, bytes, stream);
  }

  static std::uint8_t first_byte(const conformance::Block& block) {
    return *reinterpret_cast<const std::uint8_t*>(block.address());  // NOLINT
  }

  const cumempool_driver& table_;
  cumempool_memory_properties properties_{0, CUMEMPOOL_HANDLE_POSIX_FD, 0, 0};
  cumempool_context_token token_{};
};

}  // namespace cumempool::driver
