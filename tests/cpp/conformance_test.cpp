// The contract of driver.h held to account on any driver, first part: results, threads, contexts
// and memory (C1 to C8, C12). conformance_work_test.cpp has the work (C9 to C11).
//
// Not here: C4 is in conformance_capture_test.cpp, C14 in conformance_digest_test.cpp, and kinds of
// memory and access in conformance_memory_test.cpp. C13 forbids use, so there is nothing to call.
// Misuse that may crash libcuda, such as releasing a handle twice, is in host_driver_test.cpp.
#include <fcntl.h>

#include <array>
#include <cstring>
#include <thread>

#include "conformance_fixture.hpp"

namespace cumempool::conformance {
namespace {

INSTANTIATE_TEST_SUITE_P(Host, DriverConformance, ::testing::ValuesIn(host_drivers()),
                         name_of_driver);
INSTANTIATE_TEST_SUITE_P(Gpu, DriverConformance, ::testing::ValuesIn(cuda_drivers()),
                         name_of_driver);

// ---- the table, devices and contexts --------------------------------------------------------

TEST_P(DriverConformance, TableSaysItsVersionAndSize) {
  EXPECT_EQ(table().version, CUMEMPOOL_DRIVER_VERSION);
  EXPECT_EQ(table().size, sizeof(cumempool_driver));
  EXPECT_STRNE(table().name, "");
  EXPECT_EQ(table().init(table().self), CUMEMPOOL_RESULT_SUCCESS) << "init is idempotent";
}

TEST_P(DriverConformance, DevicesDescribeThemselves) {
  int version = 0;
  EXPECT_EQ(CALL(table(), driver_version, &version), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_GE(version, 11080);
  int count = 0;
  EXPECT_EQ(CALL(table(), device_count, &count), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_GE(count, 1);
  std::array<char, 64> name{};
  EXPECT_EQ(CALL(table(), device_name, 0, name.data(), name.size()), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_GT(std::strlen(name.data()), 0u);
  int supported = 0;
  EXPECT_EQ(CALL(table(), device_attribute, 0, CUMEMPOOL_ATTRIBUTE_VIRTUAL_MEMORY, &supported),
            CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(supported, 1);
  for (int attribute = CUMEMPOOL_ATTRIBUTE_POSIX_FD; attribute <= CUMEMPOOL_ATTRIBUTE_COMPUTE_MINOR;
       ++attribute) {
    int value = -1;
    EXPECT_EQ(CALL(table(), device_attribute, 0, static_cast<cumempool_device_attribute>(attribute),
                   &value),
              CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_GE(value, 0);
  }
  int node = -2;
  EXPECT_EQ(CALL(table(), device_attribute, 0, CUMEMPOOL_ATTRIBUTE_HOST_NUMA, &node),
            CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_GE(node, -1);
}

TEST_P(DriverConformance, DevicesReachThemselves) {
  int count = 0;
  must(CALL(table(), device_count, &count), "device_count");
  for (int device = 0; device < count; ++device) {
    for (int peer = 0; peer < count; ++peer) {
      int possible = -1;
      EXPECT_EQ(CALL(table(), peer_access, device, peer, &possible), CUMEMPOOL_RESULT_SUCCESS);
      EXPECT_TRUE(possible == 1 || (possible == 0 && device != peer));
    }
  }
}

TEST_P(DriverConformance, C1_FailedCallsHaveNoEffect) {
  const std::uint64_t before = free_bytes();
  std::uint64_t total = 0;
  std::uint64_t unused = 0;
  must(CALL(table(), memory_info, 0, &unused, &total), "memory_info");
  cumempool_physical physical = 0;
  const std::size_t too_much = (total / granule() + 1) * granule();
  EXPECT_NE(CALL(table(), create, too_much, &properties(), &physical), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_NE(CALL(table(), create, granule() + 1, &properties(), &physical),
            CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_GE(free_bytes() + granule(), before);
}

TEST_P(DriverConformance, C1_DevicesThatDoNotExistAreErrors) {
  int count = 0;
  must(CALL(table(), device_count, &count), "device_count");
  for (const int device : {-1, count}) {
    cumempool_memory_properties elsewhere = properties();
    elsewhere.device = device;
    std::size_t bytes = 0;
    int value = 0;
    cumempool_physical physical = 0;
    cumempool_context_token token{};
    std::array<char, 64> name{};
    EXPECT_NE(CALL(table(), granularity, &elsewhere, &bytes), CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_NE(CALL(table(), create, granule(), &elsewhere, &physical), CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_NE(CALL(table(), context_active, device, &value), CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_NE(CALL(table(), context_retain, device), CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_NE(CALL(table(), context_release, device), CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_NE(CALL(table(), context_enter, device, &token), CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_NE(CALL(table(), device_name, device, name.data(), name.size()),
              CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_NE(CALL(table(), device_attribute, device, CUMEMPOOL_ATTRIBUTE_RDMA, &value),
              CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_NE(CALL(table(), peer_access, device, 0, &value), CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_NE(CALL(table(), peer_access, 0, device, &value), CUMEMPOOL_RESULT_SUCCESS);
  }
}

TEST_P(DriverConformance, C2_ThreadsUseTheTableAtTheSameTime) {
  constexpr std::uint32_t thread_count = 8;
  constexpr std::uint32_t rounds = 10;
  std::vector<int> good(thread_count, 0);
  const auto work = [&](std::uint32_t thread) {
    const Inside inside(table());
    const Stream stream(table());
    const Event event(table());
    const HostBuffer out(table(), granule());
    const HostBuffer back(table(), granule());
    for (std::uint32_t round = 0; round < rounds; ++round) {
      const Block block(table(), granule(), properties());
      write_pattern(out.data(), granule(), thread * rounds + round);
      must(CALL(table(), copy_to_device, 0, block.address(), out.data(), granule(), stream.get()),
           "copy_to_device");
      must(CALL(table(), copy_to_host, 0, back.data(), block.address(), granule(), stream.get()),
           "copy_to_host");
      must(CALL(table(), event_record, 0, event.get(), stream.get()), "event_record");
      must(CALL(table(), event_synchronize, 0, event.get()), "event_synchronize");
      if (std::memcmp(out.data(), back.data(), granule()) == 0) ++good[thread];
    }
  };
  std::vector<std::thread> threads;
  for (std::uint32_t i = 0; i < thread_count; ++i) {
    threads.emplace_back([&work, i] {
      try {
        work(i);
      } catch (const std::runtime_error& error) {
        ADD_FAILURE() << error.what();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(good, std::vector<int>(thread_count, rounds));
}

constexpr int kContextEntries = 18;

// Calls every [context] entry with what would be good arguments inside; returns how many said 201.
int count_invalid_context(const cumempool_driver& table, const Block& block,
                          const HostBuffer& pages, const Stream& stream, const Event& event) {
  std::uint64_t bytes = 0;
  int flag = 0;
  std::uint64_t made = 0;
  auto* const extents = reinterpret_cast<cumempool_extent*>(pages.data());
  auto* const digests = reinterpret_cast<cumempool_digest*>(extents + 1);
  *extents = {block.address(), 16};
  const std::array<cumempool_result, kContextEntries> results{
      CALL(table, memory_info, 0, &bytes, &bytes),
      CALL(table, allocate, 0, std::size_t{1}, &made),
      CALL(table, deallocate, 0, block.address()),
      CALL(table, host_register, 0, pages.data(), std::size_t{65536}),
      CALL(table, host_unregister, 0, pages.data()),
      CALL(table, stream_create, 0, &made),
      CALL(table, stream_is_capturing, 0, stream.get(), &flag),
      CALL(table, event_create, 0, &made),
      CALL(table, event_record, 0, event.get(), stream.get()),
      CALL(table, copy_to_host, 0, pages.data(), block.address(), std::size_t{1}, stream.get()),
      CALL(table, copy_to_device, 0, block.address(), pages.data(), std::size_t{1}, stream.get()),
      CALL(table, copy_on_device, 0, block.address(), block.address() + 1, std::size_t{1},
           stream.get()),
      CALL(table, fill, 0, block.address(), std::uint8_t{1}, std::size_t{1}, stream.get()),
      CALL(table, digest, 0, std::uint64_t{1}, extents, std::size_t{1}, digests, stream.get()),
      CALL(table, event_query, 0, event.get()),
      CALL(table, stream_wait_event, 0, stream.get(), event.get()),
      CALL(table, stream_synchronize, 0, stream.get()),
      CALL(table, event_synchronize, 0, event.get())};
  return static_cast<int>(
      std::count(results.begin(), results.end(), CUMEMPOOL_RESULT_INVALID_CONTEXT));
}

TEST_P(DriverConformance, C3_ContextEntriesFailOutsideTheContext) {
  const Block block(table(), granule(), properties());
  const HostBuffer pages(table(), 65536);
  const Stream stream(table());
  const Event event(table());
  int refused = 0;
  std::thread([&] {
    refused = count_invalid_context(table(), block, pages, stream, event);
  }).join();
  EXPECT_EQ(refused, kContextEntries);
}

TEST_P(DriverConformance, C3_ContextEntriesFailInsideAnotherDevicesContext) {
  int count = 0;
  must(CALL(table(), device_count, &count), "device_count");
  if (count < 2) GTEST_SKIP() << "needs two devices";
  const Block block(table(), granule(), properties());
  const HostBuffer pages(table(), 65536);
  const Stream stream(table());
  const Event event(table());
  must(CALL(table(), context_retain, 1), "context_retain");
  {
    const Inside other(table(), 1);
    EXPECT_EQ(count_invalid_context(table(), block, pages, stream, event), kContextEntries);
    const Inside again(table(), 0);
    EXPECT_EQ(CALL(table(), stream_synchronize, 0, cumempool_stream{0}), CUMEMPOOL_RESULT_SUCCESS);
  }
  EXPECT_EQ(CALL(table(), stream_synchronize, 0, cumempool_stream{0}), CUMEMPOOL_RESULT_SUCCESS)
      << "restored by context_leave";
  EXPECT_EQ(CALL(table(), context_release, 1), CUMEMPOOL_RESULT_SUCCESS);
}

TEST_P(DriverConformance, C3_MemoryEntriesNeedNoContext) {
  std::thread([&] {
    try {
      const Block block(table(), granule(), properties());
      EXPECT_EQ(block.address() % granule(), 0u);
    } catch (const std::runtime_error& error) {
      ADD_FAILURE() << error.what();
    }
  }).join();
}

TEST_P(DriverConformance, C3_RetainsAreCountedAndContextsNest) {
  must(CALL(table(), context_retain, 0), "context_retain");
  {
    const Inside once_more(table());
    EXPECT_EQ(CALL(table(), stream_synchronize, 0, cumempool_stream{0}), CUMEMPOOL_RESULT_SUCCESS);
  }
  must(CALL(table(), context_release, 0), "context_release");
  int active = 0;
  EXPECT_EQ(CALL(table(), context_active, 0, &active), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(active, 1);
  EXPECT_EQ(CALL(table(), stream_synchronize, 0, cumempool_stream{0}), CUMEMPOOL_RESULT_SUCCESS);
}

// ---- granularity and exact pairs ------------------------------------------------------------

TEST_P(DriverConformance, GranularityIsAPowerOfTwoOfPages) {
  EXPECT_EQ(granule() & (granule() - 1), 0u);
  EXPECT_EQ(granule() % static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), 0u);
  cumempool_memory_properties exportable = properties();
  exportable.handle_types = CUMEMPOOL_HANDLE_POSIX_FD;
  std::size_t bytes = 0;
  EXPECT_EQ(CALL(table(), granularity, &exportable, &bytes), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(bytes & (bytes - 1), 0u);
}

TEST_P(DriverConformance, C5_SizesAreMultiplesOfTheGranularity) {
  cumempool_address address = 0;
  cumempool_physical physical = 0;
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, granule() + 1}) {
    EXPECT_EQ(CALL(table(), reserve, bytes, &address), CUMEMPOOL_RESULT_INVALID_VALUE) << bytes;
    EXPECT_EQ(CALL(table(), create, bytes, &properties(), &physical),
              CUMEMPOOL_RESULT_INVALID_VALUE)
        << bytes;
  }
  const Range range(table(), 2 * granule());
  physical = create(granule());
  const int device = 0;
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, granule() - 1}) {
    EXPECT_NE(CALL(table(), map, range.address(), bytes, physical), CUMEMPOOL_RESULT_SUCCESS);
  }
  map_at(table(), range.address(), granule(), physical);
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, granule() - 1}) {
    EXPECT_EQ(
        CALL(table(), set_access, range.address(), bytes, &device, std::size_t{1}, kReadWrite),
        CUMEMPOOL_RESULT_INVALID_VALUE);
    EXPECT_EQ(CALL(table(), unmap, range.address(), bytes), CUMEMPOOL_RESULT_INVALID_VALUE);
    EXPECT_EQ(CALL(table(), unreserve, range.address(), bytes), CUMEMPOOL_RESULT_INVALID_VALUE);
  }
  EXPECT_EQ(CALL(table(), unmap, range.address(), granule()), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(CALL(table(), release, physical), CUMEMPOOL_RESULT_SUCCESS);
}

TEST_P(DriverConformance, C5_AddressesAreMultiplesOfTheGranularity) {
  const Range range(table(), 2 * granule());
  EXPECT_EQ(range.address() % granule(), 0u);
  const cumempool_physical physical = create(granule());
  EXPECT_EQ(CALL(table(), map, range.address() + 4096, granule(), physical),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table(), release, physical), CUMEMPOOL_RESULT_SUCCESS);
}

TEST_P(DriverConformance, C6_UnmapTakesExactlyTheMappedPair) {
  const Range range(table(), 4 * granule());
  const cumempool_address first = range.address();
  const cumempool_address second = first + 2 * granule();
  for (const cumempool_address address : {first, second}) {
    const cumempool_physical physical = create(2 * granule());
    map_at(table(), address, 2 * granule(), physical);
    must(CALL(table(), release, physical), "release");
  }
  EXPECT_NE(CALL(table(), unmap, first, granule()), CUMEMPOOL_RESULT_SUCCESS) << "the head";
  EXPECT_NE(CALL(table(), unmap, first + granule(), granule()), CUMEMPOOL_RESULT_SUCCESS) << "tail";
  EXPECT_NE(CALL(table(), unmap, first, 4 * granule()), CUMEMPOOL_RESULT_SUCCESS) << "the union";
  EXPECT_NE(CALL(table(), unmap, first + granule(), 2 * granule()), CUMEMPOOL_RESULT_SUCCESS);

  const HostBuffer out(table(), 4 * granule());
  const HostBuffer back(table(), 4 * granule());
  write_pattern(out.data(), 4 * granule(), 6);
  upload(first, out, 4 * granule());
  download(back, first, 4 * granule());
  EXPECT_EQ(std::memcmp(out.data(), back.data(), 4 * granule()), 0) << "still mapped";

  EXPECT_EQ(CALL(table(), unmap, second, 2 * granule()), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(CALL(table(), unmap, first, 2 * granule()), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_NE(CALL(table(), unmap, first, 2 * granule()), CUMEMPOOL_RESULT_SUCCESS) << "twice";
}

TEST_P(DriverConformance, C6_UnreserveTakesExactlyTheReservedPair) {
  cumempool_address address = 0;
  must(CALL(table(), reserve, 2 * granule(), &address), "reserve");
  EXPECT_NE(CALL(table(), unreserve, address, granule()), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_NE(CALL(table(), unreserve, address + granule(), granule()), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(CALL(table(), unreserve, address, 2 * granule()), CUMEMPOOL_RESULT_SUCCESS);
}

// ---- the life of physical memory ------------------------------------------------------------

TEST_P(DriverConformance, C7_MemoryGoesBackWithItsLastMapping) {
  const std::size_t bytes = kManyGranules * granule();
  const std::size_t slack = is_cuda() ? bytes / 4 : 0;
  const std::uint64_t before = free_bytes();
  const Range range(table(), bytes);
  const cumempool_physical physical = create(bytes);
  EXPECT_LE(free_bytes(), before - bytes + slack) << "create takes it";
  map_at(table(), range.address(), bytes, physical);
  must(CALL(table(), release, physical), "release");
  EXPECT_LE(free_bytes(), before - bytes + slack) << "the mapping keeps it";
  must(CALL(table(), unmap, range.address(), bytes), "unmap");
  EXPECT_GE(free_bytes() + slack, before);
}

TEST_P(DriverConformance, C7_ReleaseGivesUnmappedMemoryBack) {
  const std::size_t bytes = kManyGranules * granule();
  const std::size_t slack = is_cuda() ? bytes / 4 : 0;
  const std::uint64_t before = free_bytes();
  const cumempool_physical physical = create(bytes);
  EXPECT_LE(free_bytes(), before - bytes + slack);
  must(CALL(table(), release, physical), "release");
  EXPECT_GE(free_bytes() + slack, before);
}

TEST_P(DriverConformance, C7_DescriptorsAndImportsKeepMemoryAlive) {
  if (!exports_descriptors()) GTEST_SKIP() << "the device exports no file descriptors";
  cumempool_memory_properties exportable = properties();
  exportable.handle_types = CUMEMPOOL_HANDLE_POSIX_FD;
  const Range range(table(), granule());
  const HostBuffer out(table(), granule());
  const HostBuffer back(table(), granule());
  write_pattern(out.data(), granule(), 7);

  cumempool_physical made = 0;
  must(CALL(table(), create, granule(), &exportable, &made), "create");
  map_at(table(), range.address(), granule(), made);
  upload(range.address(), out, granule());
  int descriptor = -1;
  must(CALL(table(), export_handle, made, CUMEMPOOL_HANDLE_POSIX_FD, &descriptor), "export_handle");
  EXPECT_NE(fcntl(descriptor, F_GETFD) & FD_CLOEXEC, 0);
  must(CALL(table(), unmap, range.address(), granule()), "unmap");
  must(CALL(table(), release, made), "release");

  cumempool_physical imported = 0;
  must(CALL(table(), import_handle, &descriptor, CUMEMPOOL_HANDLE_POSIX_FD, &imported), "import");
  EXPECT_EQ(close(descriptor), 0) << "the caller keeps the descriptor";
  map_at(table(), range.address(), granule(), imported);
  download(back, range.address(), granule());
  EXPECT_EQ(std::memcmp(out.data(), back.data(), granule()), 0);
  must(CALL(table(), unmap, range.address(), granule()), "unmap");
  EXPECT_EQ(CALL(table(), release, imported), CUMEMPOOL_RESULT_SUCCESS);
}

TEST_P(DriverConformance, C8_ContentsFollowTheHandle) {
  const Range range(table(), 2 * granule());
  const cumempool_address here = range.address();
  const cumempool_address there = here + granule();
  const HostBuffer out(table(), granule());
  const HostBuffer back(table(), granule());
  write_pattern(out.data(), granule(), 8);

  const cumempool_physical physical = create(granule());
  const cumempool_physical other = create(granule());
  map_at(table(), here, granule(), physical);
  upload(here, out, granule());
  must(CALL(table(), unmap, here, granule()), "unmap");
  map_at(table(), here, granule(), other);
  map_at(table(), there, granule(), physical);
  download(back, there, granule());
  EXPECT_EQ(std::memcmp(out.data(), back.data(), granule()), 0);

  must(CALL(table(), unmap, here, granule()), "unmap");
  must(CALL(table(), unmap, there, granule()), "unmap");
  must(CALL(table(), release, physical), "release");
  EXPECT_EQ(CALL(table(), release, other), CUMEMPOOL_RESULT_SUCCESS);
}

TEST_P(DriverConformance, C8_OneSetAccessCoversSeveralMappings) {
  const Range range(table(), 3 * granule());
  for (std::size_t i = 0; i < 3; ++i) {
    const cumempool_physical physical = create(granule());
    must(CALL(table(), map, range.address() + i * granule(), granule(), physical), "map");
    must(CALL(table(), release, physical), "release");
  }
  const int device = 0;
  must(CALL(table(), set_access, range.address(), 3 * granule(), &device, std::size_t{1},
            kReadWrite),
       "set_access");
  const HostBuffer out(table(), 3 * granule());
  const HostBuffer back(table(), 3 * granule());
  write_pattern(out.data(), 3 * granule(), 9);
  upload(range.address(), out, 3 * granule());
  download(back, range.address(), 3 * granule());
  EXPECT_EQ(std::memcmp(out.data(), back.data(), 3 * granule()), 0);
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(CALL(table(), unmap, range.address() + i * granule(), granule()),
              CUMEMPOOL_RESULT_SUCCESS);
  }
}

TEST_P(DriverConformance, C8_AccessNeedsAMapping) {
  const Range range(table(), granule());
  const int device = 0;
  EXPECT_NE(
      CALL(table(), set_access, range.address(), granule(), &device, std::size_t{1}, kReadWrite),
      CUMEMPOOL_RESULT_SUCCESS);
}

TEST_P(DriverConformance, C8_TwoMappingsDoNotShareAnAddress) {
  const Block block(table(), granule(), properties());
  const cumempool_physical physical = create(granule());
  EXPECT_NE(CALL(table(), map, block.address(), granule(), physical), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(CALL(table(), release, physical), CUMEMPOOL_RESULT_SUCCESS);
}

TEST_P(DriverConformance, C12_OutOfMemoryLeavesTheDriverUsable) {
  std::uint64_t free = 0;
  std::uint64_t total = 0;
  must(CALL(table(), memory_info, 0, &free, &total), "memory_info");
  EXPECT_LE(free, total);
  cumempool_physical physical = 0;
  const std::size_t too_much = (total / granule() + 1) * granule();
  EXPECT_EQ(CALL(table(), create, too_much, &properties(), &physical),
            CUMEMPOOL_RESULT_OUT_OF_MEMORY);

  const Block block(table(), granule(), properties());
  const HostBuffer back(table(), granule());
  must(CALL(table(), fill, 0, block.address(), std::uint8_t{12}, granule(), cumempool_stream{0}),
       "fill");
  download(back, block.address(), granule());
  EXPECT_TRUE(back.all_are(12));
}

}  // namespace
}  // namespace cumempool::conformance
