// Memory handed to others as a descriptor or a fabric handle: what is exported and what is refused,
// what an importer sees and for how long, and that neither side leaks.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "fault_driver.hpp"
#include "host_fixture.hpp"
#include "temporary_directory.hpp"

namespace cumempool::tests {
namespace {

using driver::FaultDriver;
using Repeat = FaultDriver::Repeat;

constexpr std::size_t kBytes = 2 * kGranule;
constexpr cumempool_access kReadWrite = CUMEMPOOL_ACCESS_READ_WRITE;

std::string last_message() { return cumempool_last_error()->message; }

// A descriptor of exported memory, closed with its owner.
class Export {
 public:
  Export(const Pool& pool, cumempool_address address,
         std::uint32_t handle_type = CUMEMPOOL_HANDLE_POSIX_FD) {
    info_.size = sizeof info_;
    status_ = cumempool_export(pool.get(), address, handle_type, &number_, &info_);
  }
  ~Export() { close(); }
  Export(const Export&) = delete;
  Export(Export&&) = delete;
  Export& operator=(const Export&) = delete;
  Export& operator=(Export&&) = delete;

  cumempool_status status() const { return status_; }
  const int* get() const { return &number_; }
  const cumempool_allocation_info& info() const { return info_; }
  void close() {
    if (number_ >= 0) ::close(number_);
    number_ = -1;
  }

 private:
  int number_ = -1;
  cumempool_allocation_info info_{};
  cumempool_status status_;
};

// Memory of somebody else, until its end.
class Shared {
 public:
  Shared(const cumempool_driver& table, const int* descriptor, std::uint64_t bytes = kBytes,
         int device = 0, cumempool_access access = kReadWrite)
      : status_(cumempool_shared_open(&table, device, CUMEMPOOL_HANDLE_POSIX_FD, descriptor, bytes,
                                      access, &shared_)) {}
  ~Shared() { destroy(); }
  Shared(const Shared&) = delete;
  Shared(Shared&&) = delete;
  Shared& operator=(const Shared&) = delete;
  Shared& operator=(Shared&&) = delete;

  cumempool_status status() const { return status_; }
  const cumempool_shared* get() const { return shared_; }
  cumempool_address address() const {
    must(status_);
    return cumempool_shared_address(shared_);
  }
  cumempool_status close() const { return cumempool_shared_close(shared_); }
  void destroy() {
    cumempool_shared_destroy(shared_);
    shared_ = nullptr;
  }

 private:
  cumempool_shared* shared_ = nullptr;
  cumempool_status status_;
};

constexpr std::uint32_t kBothTypes = CUMEMPOOL_HANDLE_POSIX_FD | CUMEMPOOL_HANDLE_FABRIC;
using FabricHandle = std::array<unsigned char, CUMEMPOOL_FABRIC_HANDLE_BYTES>;

// `importer` stands for the driver of another process: it knows nothing of the owner's memory.
class Sharing : public ::testing::Test {
 protected:
  explicit Sharing(std::uint32_t handle_types = CUMEMPOOL_HANDLE_POSIX_FD)
      : importer(kDeviceGranules, 2, kGranule, handle_types),
        host(kDeviceGranules, 2, kGranule, handle_types) {}
  void SetUp() override {
    for (const char* entry : {"context_leave", "context_release"}) importing.exclude(entry);
    address = filled("kv", 1);
  }
  cumempool_address filled(const char* tag, std::uint32_t seed, int device = 0) const {
    const cumempool_address made = pool.malloc(tag, kBytes, device);
    write_pattern(made, kBytes, seed);
    return made;
  }
  cumempool_status refused(cumempool_address at,
                           std::uint32_t handle_type = CUMEMPOOL_HANDLE_POSIX_FD) const {
    const std::size_t descriptors = open_descriptors();
    const Export none(pool, at, handle_type);
    EXPECT_EQ(*none.get(), -1);
    EXPECT_EQ(none.info().address, 0U);
    EXPECT_EQ(open_descriptors(), descriptors);
    return none.status();
  }
  // The result of a fill by `device` of `importer`: INVALID_VALUE where it has no access.
  cumempool_result fill(int device, cumempool_address at) const {
    const cumempool_driver& table = importer.table();
    cumempool_context_token token{};
    cumempool_stream stream = 0;
    EXPECT_EQ(table.context_retain(table.self, device), CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_EQ(table.context_enter(table.self, device, &token), CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_EQ(table.stream_create(table.self, device, &stream), CUMEMPOOL_RESULT_SUCCESS);
    cumempool_result result = table.fill(table.self, device, at, 7, kBytes, stream);
    if (result == CUMEMPOOL_RESULT_SUCCESS) {
      result = table.stream_synchronize(table.self, device, stream);
    }
    table.stream_destroy(table.self, device, stream);
    table.context_leave(table.self, &token);
    table.context_release(table.self, device);
    return result;
  }

  Host importer;
  FaultDriver importing{importer.table()};
  Host host;
  FaultDriver faults{host.table()};
  Pool pool{faults.table()};
  cumempool_address address = 0;
};

// ---- export ------------------------------------------------------------------------------------

TEST_F(Sharing, AnExportTellsTheAllocationAndIsCloseOnExec) {
  const Export exported(pool, address + kBytes - 1);
  must(exported.status());
  EXPECT_EQ(exported.info().address, address);
  EXPECT_EQ(exported.info().bytes, kBytes);
  EXPECT_STREQ(exported.info().tag, "kv");
  EXPECT_EQ(exported.info().generation, 1U);
  EXPECT_EQ(exported.info().state, CUMEMPOOL_AWAKE);
  EXPECT_NE(fcntl(*exported.get(), F_GETFD) & FD_CLOEXEC, 0);
  const Export again(pool, address);
  must(again.status());
  EXPECT_NE(*again.get(), *exported.get());
  expect_exact_numbers(pool, host);
}

TEST_F(Sharing, R12_WhatCannotBeExportedIsRefusedByStatus) {
  must(pool.set_memory("plain", CUMEMPOOL_BACKING_CUDA_MALLOC));
  const cumempool_address plain = filled("plain", 2);
  EXPECT_EQ(refused(plain), CUMEMPOOL_UNSUPPORTED);
  EXPECT_NE(last_message().find("cudaMalloc"), std::string::npos) << last_message();
  EXPECT_STREQ(cumempool_last_error()->tag, "plain");
  for (const std::uint32_t type : {CUMEMPOOL_HANDLE_FABRIC + 0U, 0U, 2U}) {
    EXPECT_EQ(refused(address, type), CUMEMPOOL_UNSUPPORTED) << type;
  }
  EXPECT_EQ(refused(1), CUMEMPOOL_NOT_OWNED);
  {
    const Pool other(host);
    EXPECT_EQ(refused(other.malloc("kv", 1)), CUMEMPOOL_NOT_OWNED);
  }
  for (const cumempool_on_sleep action : {kOffload, kDiscard}) {
    must(pool.sleep("kv", action).status);
    EXPECT_EQ(refused(address), CUMEMPOOL_INVALID_ARGUMENT);
    EXPECT_NE(last_message().find("asleep"), std::string::npos) << last_message();
    must(pool.wake().status);
  }
  must(cumempool_free(address));
  EXPECT_EQ(refused(address), CUMEMPOOL_NOT_OWNED);
  expect_exact_numbers(pool, host, false);
  must(pool.close(true));
  EXPECT_EQ(refused(plain), CUMEMPOOL_CLOSED);
}

TEST_F(Sharing, R4_AnExportThatTheDriverFailsChangesNothing) {
  faults.fail_nth("export_handle", 1, CUMEMPOOL_RESULT_OPERATING_SYSTEM);
  EXPECT_EQ(refused(address), CUMEMPOOL_DRIVER_ERROR);
  EXPECT_STREQ(cumempool_last_error()->operation, "export");
  EXPECT_STREQ(cumempool_last_error()->tag, "kv");
  const Export exported(pool, address);
  must(exported.status());
  must(pool.sleep("kv", kOffload).status);  // nothing is claimed
}

TEST_F(Sharing, MemoryFreedDuringItsExportGoesBehindIt) {
  for (const bool fails : {false, true}) {
    const cumempool_address freed = filled("kv", 3);
    faults.observe([&](const char* entry) {
      if (std::string(entry) == "export_handle") must(cumempool_free(freed));
    });
    if (fails) faults.fail_nth("export_handle", 1, CUMEMPOOL_RESULT_OPERATING_SYSTEM);
    Export exported(pool, freed);
    faults.observe(nullptr);
    EXPECT_EQ(exported.status(), fails ? CUMEMPOOL_DRIVER_ERROR : CUMEMPOOL_OK);
    EXPECT_EQ(cumempool_free(freed), CUMEMPOOL_NOT_OWNED);
    EXPECT_EQ(pool.snapshot().totals.pending_free_bytes, 0U);
    EXPECT_EQ(host.counters().charged_bytes, fails ? kBytes : 2 * kBytes) << "the fd keeps it";
    exported.close();
    EXPECT_EQ(host.counters().charged_bytes, kBytes);
    expect_exact_numbers(pool, host);
  }
}

TEST_F(Sharing, R7_AnExportWaitsForATransitionOfAnotherThread) {
  std::atomic<bool> inside{false};
  std::atomic<bool> go_on{false};
  std::atomic<int> nested{-1};
  faults.observe([&](const char* entry) {
    if (std::string(entry) != "unmap" || inside) return;
    nested = Export(pool, address).status();
    inside = true;
    while (!go_on) std::this_thread::yield();
  });
  std::thread sleeper([&] { must(pool.sleep("kv", kOffload).status); });
  while (!inside) std::this_thread::yield();
  std::atomic<int> exported{-1};
  std::thread exporter([&] { exported = Export(pool, address).status(); });
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  EXPECT_EQ(exported, -1);
  go_on = true;
  sleeper.join();
  exporter.join();
  faults.observe(nullptr);
  EXPECT_EQ(nested, CUMEMPOOL_BUSY);
  EXPECT_EQ(exported, CUMEMPOOL_INVALID_ARGUMENT) << "it found the memory asleep";
}

TEST_F(Sharing, R2_AWakeGivesTheAddressOtherMemoryAndANewGeneration) {
  Export before(pool, address);
  must(before.status());
  const Shared old(importer.table(), before.get());
  before.close();
  must(pool.sleep("kv", kOffload).status);
  must(pool.wake().status);
  const Export after(pool, address);
  must(after.status());
  EXPECT_EQ(after.info().address, before.info().address);
  EXPECT_GT(after.info().generation, before.info().generation);
  const Shared current(importer.table(), after.get());
  write_pattern(address, kBytes, 2);
  EXPECT_TRUE(holds_pattern(current.address(), kBytes, 2));
  EXPECT_TRUE(holds_pattern(old.address(), kBytes, 1)) << "the memory of before";
}

// ---- import ------------------------------------------------------------------------------------

TEST_F(Sharing, BothSidesSeeTheSameBytes) {
  for (const cumempool_driver* table : {&importer.table(), &host.table()}) {
    Export exported(pool, address);
    must(exported.status());
    const Shared shared(*table, exported.get());
    exported.close();
    EXPECT_NE(shared.address(), address);
    write_pattern(address, kBytes, 2);
    EXPECT_TRUE(holds_pattern(shared.address(), kBytes, 2));
    write_pattern(shared.address(), kBytes, 3);
    EXPECT_TRUE(holds_pattern(address, kBytes, 3));
    EXPECT_EQ(host.counters().charged_bytes, kBytes) << "charged once";
    must(shared.close());
  }
  expect_exact_numbers(pool, host);
}

TEST_F(Sharing, ReadOnlyMemoryIsReadAndNotWritten) {
  const Export exported(pool, address);
  must(exported.status());
  const Shared readable(importer.table(), exported.get(), kBytes, 1, CUMEMPOOL_ACCESS_READ);
  EXPECT_TRUE(holds_pattern(readable.address(), kBytes, 1));
  const Shared writable(importer.table(), exported.get(), kBytes, 0);
  EXPECT_EQ(fill(0, readable.address()), CUMEMPOOL_RESULT_INVALID_VALUE);
}

TEST_F(Sharing, MemoryOpenedForReadAndWriteIsWrittenByItsDevice) {
  const Export exported(pool, address);
  must(exported.status());
  const Shared writable(importer.table(), exported.get(), kBytes, 1);
  EXPECT_EQ(fill(1, writable.address()), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_TRUE(all_are(address, kBytes, 7));
  EXPECT_EQ(fill(0, writable.address()), CUMEMPOOL_RESULT_INVALID_VALUE) << "it has no access";
}

TEST_F(Sharing, R13_ADriverThatRefusesReadAloneIsUnsupportedAndHoldsNothing) {
  const Export exported(pool, address);
  must(exported.status());
  importing.fail_nth("set_access", 1, CUMEMPOOL_RESULT_NOT_SUPPORTED);
  const Shared shared(importing.table(), exported.get(), kBytes, 0, CUMEMPOOL_ACCESS_READ);
  EXPECT_EQ(shared.status(), CUMEMPOOL_UNSUPPORTED);
  EXPECT_EQ(shared.get(), nullptr);
  importer.expect_empty();
}

TEST_F(Sharing, R13_WhatCannotBeOpenedIsRefusedAndHoldsNothing) {
  const Export exported(pool, address);
  must(exported.status());
  const auto refused = [&](const int* descriptor, std::uint64_t bytes, int device) {
    const Shared shared(importer.table(), descriptor, bytes, device);
    EXPECT_EQ(shared.get(), nullptr);
    importer.expect_empty();
    return shared.status();
  };
  for (const std::uint64_t bytes : {kGranule, 3 * kGranule, kBytes - 1}) {
    EXPECT_EQ(refused(exported.get(), bytes, 0), CUMEMPOOL_DRIVER_ERROR) << bytes;
  }
  for (const int device : {-1, 2}) {
    EXPECT_EQ(refused(exported.get(), kBytes, device), CUMEMPOOL_DRIVER_ERROR) << device;
  }
  const int closed = -1;
  EXPECT_EQ(refused(&closed, kBytes, 0), CUMEMPOOL_DRIVER_ERROR);
  const int foreign = open("/dev/zero", O_RDWR | O_CLOEXEC);
  EXPECT_EQ(refused(&foreign, kBytes, 0), CUMEMPOOL_DRIVER_ERROR);
  close(foreign);
  cumempool_shared* none = nullptr;
  const unsigned char fabric[CUMEMPOOL_FABRIC_HANDLE_BYTES] = {};
  EXPECT_EQ(cumempool_shared_open(&importer.table(), 0, CUMEMPOOL_HANDLE_FABRIC, fabric, kBytes,
                                  kReadWrite, &none),
            CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(none, nullptr);
  const Shared shared(importer.table(), exported.get());
  EXPECT_EQ(shared.status(), CUMEMPOOL_OK) << "the descriptor stays the caller's";
}

// ---- the end of either side --------------------------------------------------------------------

TEST_F(Sharing, R5_ACloseWaitsForWorkInFlight) {
  const Export exported(pool, address);
  must(exported.status());
  const Shared shared(importer.table(), exported.get());
  UserStream stream(importer);
  stream.fill(shared.address(), kBytes, 7);
  EXPECT_TRUE(holds_pattern(address, kBytes, 1)) << "not run yet";
  must(shared.close());
  EXPECT_TRUE(all_are(address, kBytes, 7));
}

TEST_F(Sharing, R5_ADestroyWithoutACloseWaitsAsWell) {
  const Export exported(pool, address);
  must(exported.status());
  {
    Shared shared(importer.table(), exported.get());
    UserStream stream(importer);
    stream.fill(shared.address(), kBytes, 7);
    shared.destroy();
    EXPECT_TRUE(all_are(address, kBytes, 7));
  }
  importer.expect_empty();
  cumempool_shared_destroy(nullptr);
}

TEST_F(Sharing, TheOwnerMayGoWhileAnImporterLives) {
  Export exported(pool, address);
  must(exported.status());
  const Shared elsewhere(importer.table(), exported.get());
  const Shared here(host.table(), exported.get());
  exported.close();
  must(cumempool_free(address));
  EXPECT_EQ(pool.snapshot().totals.physical_bytes, 0U);
  EXPECT_EQ(host.counters().charged_bytes, kBytes) << "mapped here";
  EXPECT_TRUE(holds_pattern(elsewhere.address(), kBytes, 1));
  must(pool.close());
  pool.destroy();
  write_pattern(here.address(), kBytes, 2);
  EXPECT_TRUE(holds_pattern(elsewhere.address(), kBytes, 2));
  must(here.close());
  EXPECT_EQ(host.counters().charged_bytes, 0U);
  EXPECT_TRUE(holds_pattern(elsewhere.address(), kBytes, 2));
}

TEST_F(Sharing, R13_AThousandRoundsLeakNothing) {
  const std::size_t descriptors = open_descriptors();
  for (int round = 0; round < 1000; ++round) {
    const Export exported(pool, address);
    const Shared shared(importer.table(), exported.get());
    ASSERT_EQ(bytes_at(shared.address())[kBytes - 1], pattern_byte(kBytes - 1, 1));
    must(shared.close());
  }
  EXPECT_EQ(open_descriptors(), descriptors);
  importer.expect_empty();
  expect_exact_numbers(pool, host);
}

// ---- failures ----------------------------------------------------------------------------------

TEST_F(Sharing, R4_R13_AnOpenWhoseEveryCallFailsInTurnHoldsNothing) {
  const Export exported(pool, address);
  must(exported.status());
  const std::size_t descriptors = open_descriptors();
  for (const cumempool_result result : {CUMEMPOOL_RESULT_OUT_OF_MEMORY + 0, 719}) {
    std::uint64_t call = 1;
    for (bool reached = true; reached; ++call) {
      SCOPED_TRACE(call);
      importing.reset_counts();
      importing.fail_nth_of_any(call, result);
      {
        const Shared shared(importing.table(), exported.get());
        reached = importing.failures() != 0;
        importing.fail_nothing();
        EXPECT_EQ(shared.status() != CUMEMPOOL_OK, reached);
        EXPECT_EQ(shared.get() == nullptr, reached);
        if (reached) importer.expect_empty();
      }
      importer.expect_empty();
      EXPECT_EQ(open_descriptors(), descriptors);
      if (HasFailure()) return;
    }
    EXPECT_GT(call, 5U);
  }
  expect_exact_numbers(pool, host);
}

TEST_F(Sharing, R4_R13_ACloseWhoseEveryCallFailsInTurnIsRepeated) {
  const Export exported(pool, address);
  must(exported.status());
  for (const Repeat repeat : {Repeat::kOnce, Repeat::kFromThenOn}) {
    std::uint64_t call = 1;
    for (bool reached = true; reached; ++call) {
      SCOPED_TRACE(call);
      const Shared shared(importing.table(), exported.get());
      must(shared.status());
      importing.reset_counts();
      importing.fail_nth_of_any(call, 719, repeat);
      const cumempool_status status = shared.close();
      reached = importing.failures() != 0;
      EXPECT_EQ(status, reached ? CUMEMPOOL_DRIVER_ERROR : CUMEMPOOL_OK);
      EXPECT_EQ(shared.close(),
                repeat == Repeat::kOnce || !reached ? CUMEMPOOL_OK : CUMEMPOOL_DRIVER_ERROR);
      importing.fail_nothing();
      must(shared.close());
      const auto left = importer.counters();
      EXPECT_EQ(left.reserved_bytes + left.mapped_bytes + left.handles, 0U);
      must(shared.close());
      if (HasFailure()) return;
    }
    EXPECT_GT(call, 4U);
  }
  expect_exact_numbers(pool, host);
}

// A driver whose leaks go with it.
class LeakingSharing : public Sharing {
 protected:
  LeakingSharing() {
    cumempool_host_driver_options options{};
    options.size = sizeof options;
    options.device_count = 1;
    options.bytes_per_device = kBytes;
    options.granularity = kGranule;
    must(cumempool_host_driver_create(&options, &table_));
    leaking_.emplace(*table_);
    for (const char* entry : {"context_leave", "context_release"}) leaking_->exclude(entry);
  }
  ~LeakingSharing() override { cumempool_host_driver_destroy(table_); }

  driver::HostDriverCounters counters() const { return driver::host_driver_counters(table_); }

  const cumempool_driver* table_ = nullptr;
  std::optional<FaultDriver> leaking_;
};

TEST_F(LeakingSharing, R5_ADestroyThatCannotWaitLeavesTheMemoryMapped) {
  const Export exported(pool, address);
  must(exported.status());
  const cumempool_driver& table = *table_;
  Shared shared(leaking_->table(), exported.get());
  cumempool_context_token token{};
  cumempool_stream stream = 0;
  ASSERT_EQ(table.context_retain(table.self, 0), CUMEMPOOL_RESULT_SUCCESS);
  ASSERT_EQ(table.context_enter(table.self, 0, &token), CUMEMPOOL_RESULT_SUCCESS);
  ASSERT_EQ(table.stream_create(table.self, 0, &stream), CUMEMPOOL_RESULT_SUCCESS);
  ASSERT_EQ(table.fill(table.self, 0, shared.address(), 7, kBytes, stream),
            CUMEMPOOL_RESULT_SUCCESS);
  leaking_->fail_nth("fence", 1, 719);
  shared.destroy();
  EXPECT_EQ(leaking_->failures(), 1U);
  EXPECT_EQ(counters().queued_commands, 1U) << "nobody has waited";
  EXPECT_EQ(counters().mapped_bytes, kBytes);
  EXPECT_EQ(table.stream_synchronize(table.self, 0, stream), CUMEMPOOL_RESULT_SUCCESS)
      << "the work has its memory";
  EXPECT_TRUE(all_are(address, kBytes, 7));
  EXPECT_EQ(table.context_leave(table.self, &token), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(table.context_release(table.self, 0), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(counters().retained_contexts, 0U);
}

TEST_F(LeakingSharing, R13_WhatADestroyCannotGiveBackIsLeakedAndTheNextIsNot) {
  const Export exported(pool, address);
  must(exported.status());
  std::uint64_t leaked = 0;
  for (const char* entry : {"unmap", "release", "unreserve"}) {
    SCOPED_TRACE(entry);
    Shared shared(leaking_->table(), exported.get());
    must(shared.status());
    leaking_->fail_nth(entry, 1, 719);
    shared.destroy();
    leaked += kBytes;
    EXPECT_EQ(counters().reserved_bytes, leaked);
    must(Shared(leaking_->table(), exported.get()).close());
    EXPECT_EQ(counters().reserved_bytes, leaked);
    EXPECT_EQ(counters().retained_contexts, 0U);
  }
  EXPECT_EQ(leaking_->failures(), 3U);
}

TEST_F(LeakingSharing, R13_AFailedOpenThatGivesNothingBackLeavesTheNextOneAlone) {
  const Export exported(pool, address);
  must(exported.status());
  std::uint64_t call = 1;
  for (bool reached = true; reached; ++call) {
    SCOPED_TRACE(call);
    leaking_->reset_counts();
    leaking_->fail_nth_of_any(call, 719, Repeat::kFromThenOn);
    {
      const Shared shared(leaking_->table(), exported.get());
      reached = leaking_->failures() != 0;
      EXPECT_EQ(shared.status() != CUMEMPOOL_OK, reached);
      leaking_->fail_nothing();
    }
    const auto leaked = counters();
    must(Shared(leaking_->table(), exported.get()).close());
    EXPECT_EQ(counters().reserved_bytes, leaked.reserved_bytes);
    EXPECT_EQ(counters().handles, leaked.handles);
    if (HasFailure()) return;
  }
  EXPECT_GT(call, 5U);
}

TEST(SharingDrivers, LeaksOfABrokenDeviceGoWithTheirDriver) {
  const Host host;
  const Pool pool(host);
  const cumempool_address address = pool.malloc("kv", kBytes);
  const Export exported(pool, address);
  must(exported.status());
  cumempool_host_driver_options options{};
  options.size = sizeof options;
  options.device_count = 1;
  options.bytes_per_device = kBytes;
  options.granularity = kGranule;
  const cumempool_driver* table = nullptr;
  must(cumempool_host_driver_create(&options, &table));
  Shared shared(*table, exported.get());
  must(shared.status());
  cumempool_context_token token{};
  cumempool_stream stream = 0;
  ASSERT_EQ(table->context_enter(table->self, 0, &token), CUMEMPOOL_RESULT_SUCCESS);
  ASSERT_EQ(table->stream_create(table->self, 0, &stream), CUMEMPOOL_RESULT_SUCCESS);
  ASSERT_EQ(table->fill(table->self, 0, shared.address(), 7, kBytes, stream),
            CUMEMPOOL_RESULT_SUCCESS);
  ASSERT_EQ(table->context_leave(table->self, &token), CUMEMPOOL_RESULT_SUCCESS);
  // Somebody unmaps what work is to use.
  ASSERT_EQ(table->unmap(table->self, shared.address(), kBytes), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(shared.close(), CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(cumempool_last_error()->result, CUMEMPOOL_RESULT_ILLEGAL_ADDRESS);
  shared.destroy();
  EXPECT_EQ(driver::host_driver_counters(table).reserved_bytes, kBytes) << "leaked";
  cumempool_host_driver_destroy(table);
  must(cumempool_free(address));
  EXPECT_EQ(pool.snapshot().totals.physical_bytes, 0U);
}

// ---- fabric handles ----------------------------------------------------------------------------

class FabricSharing : public Sharing {
 protected:
  FabricSharing() : Sharing(kBothTypes) {}

  FabricHandle exported_of(cumempool_address at) const {
    FabricHandle handle{};
    cumempool_allocation_info info{};
    info.size = sizeof info;
    must(cumempool_export(pool.get(), at, CUMEMPOOL_HANDLE_FABRIC, handle.data(), &info));
    EXPECT_EQ(info.address, at);
    return handle;
  }
  static cumempool_shared* open(const cumempool_driver& table, const FabricHandle& handle) {
    cumempool_shared* shared = nullptr;
    const cumempool_status status = cumempool_shared_open(
        &table, 0, CUMEMPOOL_HANDLE_FABRIC, handle.data(), kBytes, kReadWrite, &shared);
    EXPECT_EQ(status == CUMEMPOOL_OK, shared != nullptr);
    return shared;
  }
};

TEST_F(FabricSharing, R8_MemoryHasBothHandlesWhereTheDriverGrantsThem) {
  EXPECT_EQ(pool.snapshot().tag("kv").handle_types, kBothTypes);
  cumempool_device_probe probe{};
  probe.size = sizeof probe;
  must(cumempool_probe_device(&host.table(), 0, &probe));
  EXPECT_EQ(probe.handle_types, kBothTypes);
  EXPECT_EQ(probe.handle_types_claimed, kBothTypes);
}

TEST_F(FabricSharing, R13_BothSidesSeeTheSameBytesAndNothingLeaks) {
  const std::size_t descriptors = open_descriptors();
  for (const cumempool_driver* table : {&importer.table(), &host.table()}) {
    for (int round = 0; round < 100; ++round) {
      write_pattern(address, kBytes, 1);
      cumempool_shared* shared = open(*table, exported_of(address));
      ASSERT_NE(shared, nullptr);
      const cumempool_address at = cumempool_shared_address(shared);
      EXPECT_TRUE(holds_pattern(at, kBytes, 1));
      write_pattern(at, kBytes, 2);
      EXPECT_TRUE(holds_pattern(address, kBytes, 2));
      EXPECT_EQ(host.counters().charged_bytes, kBytes) << "charged once";
      cumempool_shared_destroy(shared);
    }
  }
  EXPECT_EQ(open_descriptors(), descriptors);
  importer.expect_empty();
  expect_exact_numbers(pool, host);
}

TEST_F(FabricSharing, AHandleKeepsNothingAndIsNoGoodOnceTheMemoryIsGone) {
  const FabricHandle handle = exported_of(address);
  must(cumempool_free(address));
  EXPECT_EQ(host.counters().charged_bytes, 0U);
  EXPECT_EQ(open(importer.table(), handle), nullptr);
  const cumempool_address later = filled("kv", 2);
  EXPECT_EQ(open(importer.table(), handle), nullptr) << "another file with the same number";
  must(cumempool_free(later));
}

TEST_F(FabricSharing, AWakeMakesAnotherHandle) {
  const FabricHandle before = exported_of(address);
  must(pool.sleep("kv", kOffload).status);
  must(pool.wake().status);
  EXPECT_EQ(open(importer.table(), before), nullptr);
  cumempool_shared* shared = open(importer.table(), exported_of(address));
  ASSERT_NE(shared, nullptr);
  EXPECT_TRUE(holds_pattern(cumempool_shared_address(shared), kBytes, 1));
  cumempool_shared_destroy(shared);
}

TEST_F(FabricSharing, R13_WhatIsNoHandleIsRefused) {
  FabricHandle handle = exported_of(address);
  EXPECT_EQ(open(importer.table(), FabricHandle{}), nullptr);
  for (const std::size_t at : {0U, 8U, 16U, 24U, 32U}) {  // each field of it
    handle[at] = static_cast<unsigned char>(handle[at] ^ 0x55U);
    EXPECT_EQ(open(importer.table(), handle), nullptr) << at;
    handle[at] = static_cast<unsigned char>(handle[at] ^ 0x55U);
  }
  const Host without;
  EXPECT_EQ(open(without.table(), handle), nullptr);
  EXPECT_EQ(cumempool_last_error()->result, CUMEMPOOL_RESULT_NOT_PERMITTED);
  importer.expect_empty();
}

// ---- processes ---------------------------------------------------------------------------------

constexpr const char* kDescriptorVariable = "CUMEMPOOL_TEST_DESCRIPTOR";

// What the other process does: 0 where it saw the owner's bytes and wrote its own.
int answer(const cumempool_driver& table, std::uint32_t handle_type, const void* exported) {
  cumempool_shared* shared = nullptr;
  if (cumempool_shared_open(&table, 0, handle_type, exported, kBytes, kReadWrite, &shared) !=
      CUMEMPOOL_OK) {
    return 2;
  }
  const cumempool_address at = cumempool_shared_address(shared);
  const bool seen = holds_pattern(at, kBytes, 1);
  write_pattern(at, kBytes, 2);
  const bool closed = cumempool_shared_close(shared) == CUMEMPOOL_OK;
  cumempool_shared_destroy(shared);
  return seen && closed ? 0 : 3;
}

int import_and_answer(int descriptor) {
  const Host own;
  const int code = answer(own.table(), CUMEMPOOL_HANDLE_POSIX_FD, &descriptor);
  close(descriptor);
  return code;
}

// The same, with a fabric handle that comes through a pipe.
int import_fabric_and_answer(int pipe) {
  FabricHandle handle{};
  const bool whole =
      read(pipe, handle.data(), handle.size()) == static_cast<ssize_t>(handle.size());
  close(pipe);
  const Host own(kDeviceGranules, 2, kGranule, kBothTypes);
  return whole ? answer(own.table(), CUMEMPOOL_HANDLE_FABRIC, handle.data()) : 1;
}

// Runs this test in a process of its own, which inherits the descriptor; -1 where it crashed.
int run_again_with(int descriptor) {
  const std::string variable = std::string(kDescriptorVariable) + "=" + std::to_string(descriptor);
  const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
  const std::string filter =
      std::string("--gtest_filter=") + test->test_suite_name() + "." + test->name();
  std::vector<char*> environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (std::string(*entry).rfind("GTEST_", 0) != 0) environment.push_back(*entry);
  }
  std::string set = variable;
  environment.push_back(set.data());
  environment.push_back(nullptr);
  std::string program = "cumempool_tests";
  std::string option = filter;
  char* const arguments[] = {program.data(), option.data(), nullptr};
  const pid_t child = fork();
  if (child == 0) {
    fcntl(descriptor, F_SETFD, 0);
    execve("/proc/self/exe", arguments, environment.data());
    _exit(127);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) return -1;
  return WEXITSTATUS(status);
}

TEST(SharingProcesses, AnotherProcessSeesTheBytesAndAnswers) {
  if (const char* inherited = std::getenv(kDescriptorVariable)) {
    ASSERT_EQ(import_and_answer(std::atoi(inherited)), 0);
    return;
  }
  const Host host;
  const Pool pool(host);
  const cumempool_address address = pool.malloc("kv", kBytes);
  write_pattern(address, kBytes, 1);
  const Export exported(pool, address);
  must(exported.status());
  ASSERT_EQ(run_again_with(*exported.get()), 0);
  EXPECT_TRUE(holds_pattern(address, kBytes, 2));
}

TEST(SharingProcesses, AnotherProcessImportsByAFabricHandleAlone) {
  if (const char* inherited = std::getenv(kDescriptorVariable)) {
    ASSERT_EQ(import_fabric_and_answer(std::atoi(inherited)), 0);
    return;
  }
  const Host host(kDeviceGranules, 2, kGranule, kBothTypes);
  const Pool pool(host);
  const cumempool_address address = pool.malloc("kv", kBytes);
  write_pattern(address, kBytes, 1);
  FabricHandle handle{};
  cumempool_allocation_info info{};
  info.size = sizeof info;
  must(cumempool_export(pool.get(), address, CUMEMPOOL_HANDLE_FABRIC, handle.data(), &info));
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  ASSERT_EQ(write(ends[1], handle.data(), handle.size()), static_cast<ssize_t>(handle.size()));
  close(ends[1]);
  EXPECT_EQ(run_again_with(ends[0]), 0);
  close(ends[0]);
  EXPECT_TRUE(holds_pattern(address, kBytes, 2));
}

TEST(SharingProcesses, R14_AForkedChildIsToldSoAndTouchesNothing) {
  const Host host;
  const Pool pool(host);
  const cumempool_address address = pool.malloc("kv", kBytes);
  Export exported(pool, address);
  must(exported.status());
  Shared shared(host.table(), exported.get());
  must(shared.status());
  const pid_t child = fork();
  if (child == 0) {
    cumempool_shared* none = nullptr;
    const bool told =
        shared.close() == CUMEMPOOL_FORKED && Export(pool, address).status() == CUMEMPOOL_FORKED &&
        cumempool_shared_open(&host.table(), 0, CUMEMPOOL_HANDLE_POSIX_FD, exported.get(), kBytes,
                              kReadWrite, &none) == CUMEMPOOL_FORKED;
    shared.destroy();
    _exit(told ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  write_pattern(address, kBytes, 5);
  EXPECT_TRUE(holds_pattern(shared.address(), kBytes, 5));
}

}  // namespace
}  // namespace cumempool::tests
