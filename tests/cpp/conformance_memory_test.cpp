// The contract of driver.h held to account on any driver, fifth part: memory of the ordinary kind
// (allocate, deallocate), and access to read alone.
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <thread>

#include "conformance_fixture.hpp"

namespace cumempool::conformance {
namespace {

constexpr cumempool_stream kLegacyStream = 0;

// ---- memory of the ordinary kind ------------------------------------------------------------

TEST_P(DriverConformance, AllocationsHoldWhatIsCopiedThere) {
  constexpr std::size_t bytes = 100001;  // no multiple of anything
  constexpr std::size_t room = 102400;
  const Allocation memory(table(), bytes);
  const Allocation other(table(), bytes);
  const HostBuffer out(table(), room);
  const HostBuffer back(table(), room);
  write_pattern(out.data(), bytes, 1);
  upload(memory.address(), out, bytes);
  must(CALL(table(), fill, 0, other.address(), std::uint8_t{0}, bytes, kLegacyStream), "fill");
  must(CALL(table(), copy_on_device, 0, other.address() + 3, memory.address() + 3, bytes - 3,
            kLegacyStream),
       "copy_on_device");
  download(back, other.address(), bytes);
  EXPECT_TRUE(back.all_are(0, 3, 0));
  EXPECT_EQ(std::memcmp(out.data() + 3, back.data() + 3, bytes - 3), 0);
}

TEST_P(DriverConformance, AllocationsAndMappingsHaveCopiesAndDigestsInCommon) {
  const Allocation memory(table(), granule());
  const Block block(table(), granule(), properties());
  const HostBuffer out(table(), granule());
  write_pattern(out.data(), granule(), 2);
  upload(memory.address(), out, granule());
  must(
      CALL(table(), copy_on_device, 0, block.address(), memory.address(), granule(), kLegacyStream),
      "copy_on_device");
  const auto digests =
      digests_of(table(), 1, {{memory.address(), granule()}, {block.address(), granule()}});
  EXPECT_EQ(digests[0].low, digests[1].low);
  EXPECT_EQ(digests[0].high, digests[1].high);
}

TEST_P(DriverConformance, AllocationsTakeMemoryUntilTheyAreGivenBack) {
  const std::size_t bytes = kManyGranules * granule();
  const std::size_t slack = is_cuda() ? bytes / 4 : 0;
  const std::uint64_t before = free_bytes();
  {
    const Allocation memory(table(), bytes);
    EXPECT_LE(free_bytes(), before - bytes + slack);
  }
  EXPECT_GE(free_bytes() + slack, before);
}

TEST_P(DriverConformance, C12_AllocatingTooMuchLeavesTheDriverUsable) {
  std::uint64_t free = 0;
  std::uint64_t total = 0;
  must(CALL(table(), memory_info, 0, &free, &total), "memory_info");
  cumempool_address address = 0;
  EXPECT_EQ(CALL(table(), allocate, 0, total + granule(), &address),
            CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  EXPECT_EQ(CALL(table(), allocate, 0, std::size_t{0}, &address), CUMEMPOOL_RESULT_INVALID_VALUE);
  const Allocation memory(table(), granule());
  const HostBuffer back(table(), granule());
  must(CALL(table(), fill, 0, memory.address(), std::uint8_t{3}, granule(), kLegacyStream), "fill");
  download(back, memory.address(), granule());
  EXPECT_TRUE(back.all_are(3));
}

TEST_P(DriverConformance, DeallocateTakesExactlyOneAddressOfAllocate) {
  const HostBuffer pages(table(), 4096);
  const Block block(table(), granule(), properties());
  const auto in_host_memory = reinterpret_cast<std::uintptr_t>(pages.data());
  cumempool_address address = 0;
  must(CALL(table(), allocate, 0, granule(), &address), "allocate");
  for (const cumempool_address wrong :
       {cumempool_address{0}, address + 1, address + granule() / 2, address + granule(),
        block.address(), static_cast<cumempool_address>(in_host_memory)}) {
    EXPECT_EQ(CALL(table(), deallocate, 0, wrong), CUMEMPOOL_RESULT_INVALID_VALUE) << wrong;
  }
  EXPECT_NE(CALL(table(), unmap, address, granule()), CUMEMPOOL_RESULT_SUCCESS);
  must(CALL(table(), fill, 0, address, std::uint8_t{4}, granule(), kLegacyStream), "still there");
  must(CALL(table(), deallocate, 0, address), "deallocate");
  EXPECT_EQ(CALL(table(), deallocate, 0, address), CUMEMPOOL_RESULT_INVALID_VALUE) << "twice";
}

TEST_P(DriverConformance, DeallocateTakesNoMemoryOfAnotherDevice) {
  int count = 0;
  must(CALL(table(), device_count, &count), "device_count");
  if (count < 2) GTEST_SKIP() << "needs two devices";
  const Allocation memory(table(), granule());
  must(CALL(table(), context_retain, 1), "context_retain");
  {
    const Inside other(table(), 1);
    EXPECT_EQ(CALL(table(), deallocate, 1, memory.address()), CUMEMPOOL_RESULT_INVALID_VALUE);
  }
  EXPECT_EQ(CALL(table(), context_release, 1), CUMEMPOOL_RESULT_SUCCESS);
}

TEST_P(DriverConformance, DeallocateWaitsForWorkInFlight) {
  constexpr std::size_t count = 3;
  const HostBuffer back(table(), count * granule());
  const std::array<Stream, count> streams{Stream(table()), Stream(table()), Stream(table())};
  for (std::uint8_t round = 1; round <= 5; ++round) {
    cumempool_address address = 0;
    must(CALL(table(), allocate, 0, count * granule(), &address), "allocate");
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t offset = i * granule();
      const cumempool_stream stream = streams[i].get();
      must(CALL(table(), fill, 0, address + offset, round, granule(), stream), "fill");
      must(
          CALL(table(), copy_to_host, 0, back.data() + offset, address + offset, granule(), stream),
          "copy_to_host");
    }
    must(CALL(table(), deallocate, 0, address), "deallocate");
    EXPECT_TRUE(back.all_are(round)) << int{round};
  }
  EXPECT_EQ(fence(table(), 0), CUMEMPOOL_RESULT_SUCCESS);
}

TEST_P(DriverConformance, C2_ThreadsAllocateAtTheSameTime) {
  constexpr std::uint8_t thread_count = 4;
  constexpr int rounds = 20;
  const auto work = [&](std::uint8_t byte) {
    const Inside inside(table());
    const Stream stream(table());
    const HostBuffer back(table(), 65536);
    for (int round = 0; round < rounds; ++round) {
      const Allocation memory(table(), 65536);
      must(CALL(table(), fill, 0, memory.address(), byte, std::size_t{65536}, stream.get()),
           "fill");
      must(CALL(table(), copy_to_host, 0, back.data(), memory.address(), std::size_t{65536},
                stream.get()),
           "copy_to_host");
      must(CALL(table(), stream_synchronize, 0, stream.get()), "stream_synchronize");
      EXPECT_TRUE(back.all_are(byte));
    }
  };
  std::vector<std::thread> threads;
  for (std::uint8_t i = 1; i <= thread_count; ++i) {
    threads.emplace_back([&work, i] {
      try {
        work(i);
      } catch (const std::runtime_error& error) {
        ADD_FAILURE() << error.what();
      }
    });
  }
  for (auto& thread : threads) thread.join();
}

// ---- access to read alone -------------------------------------------------------------------

cumempool_result give_access(const cumempool_driver& table, cumempool_address address,
                             std::size_t bytes, cumempool_access access) {
  const int device = 0;
  return CALL(table, set_access, address, bytes, &device, std::size_t{1}, access);
}

constexpr const char* kNoReadAccess = "the driver gives no access to read alone";

TEST_P(DriverConformance, C8_AccessIsToReadOrToReadAndWrite) {
  const Block block(table(), granule(), properties());
  for (const int access : {0, 2}) {
    EXPECT_EQ(
        give_access(table(), block.address(), granule(), static_cast<cumempool_access>(access)),
        CUMEMPOOL_RESULT_INVALID_VALUE)
        << access;
  }
}

TEST_P(DriverConformance, C8_ReadAccessIsEnoughToRead) {
  const Block block(table(), granule(), properties());
  const Block other(table(), granule(), properties());
  const HostBuffer out(table(), granule());
  const HostBuffer back(table(), granule());
  write_pattern(out.data(), granule(), 5);
  upload(block.address(), out, granule());
  const auto result = give_access(table(), block.address(), granule(), kRead);
  if (result == CUMEMPOOL_RESULT_NOT_SUPPORTED) GTEST_SKIP() << kNoReadAccess;
  must(result, "set_access");

  download(back, block.address(), granule());
  EXPECT_EQ(std::memcmp(out.data(), back.data(), granule()), 0);
  must(CALL(table(), copy_on_device, 0, other.address(), block.address(), granule(), kLegacyStream),
       "copy_on_device");
  const auto digests =
      digests_of(table(), 1, {{block.address(), granule()}, {other.address(), granule()}});
  EXPECT_EQ(digests[0].low, digests[1].low);

  must(give_access(table(), block.address(), granule(), kReadWrite), "set_access");
  must(CALL(table(), fill, 0, block.address(), std::uint8_t{6}, granule(), kLegacyStream), "fill");
  download(back, block.address(), granule());
  EXPECT_TRUE(back.all_are(6)) << "access to write may be given again";
}

enum class Write { kCopyToDevice, kFill, kCopyOnDevice };

// Says whether the write went through. The device may be broken afterwards, so the process ends.
[[noreturn]] void try_to_write(const cumempool_driver& table, Write write, cumempool_address to,
                               cumempool_address from, const HostBuffer& pages) {
  const std::size_t bytes = 4096;
  cumempool_result result = CUMEMPOOL_RESULT_SUCCESS;
  switch (write) {
    case Write::kCopyToDevice:
      result = CALL(table, copy_to_device, 0, to, pages.data(), bytes, kLegacyStream);
      break;
    case Write::kFill:
      result = CALL(table, fill, 0, to, std::uint8_t{1}, bytes, kLegacyStream);
      break;
    case Write::kCopyOnDevice:
      result = CALL(table, copy_on_device, 0, to, from, bytes, kLegacyStream);
      break;
  }
  if (result == CUMEMPOOL_RESULT_SUCCESS) {
    result = CALL(table, stream_synchronize, 0, kLegacyStream);
  }
  std::fputs(result == CUMEMPOOL_RESULT_SUCCESS ? "written" : "refused", stderr);
  _exit(0);
}

TEST_P(DriverConformance, C8_ReadAccessIsNotEnoughToWrite) {
  // A process of its own for each write, started anew: a forked child could not use a GPU.
  ::testing::GTEST_FLAG(death_test_style) = "threadsafe";
  const Block block(table(), granule(), properties());
  const Block source(table(), granule(), properties());
  const HostBuffer pages(table(), 4096);
  const auto result = give_access(table(), block.address(), granule(), kRead);
  if (result == CUMEMPOOL_RESULT_NOT_SUPPORTED) GTEST_SKIP() << kNoReadAccess;
  must(result, "set_access");
  for (const Write write : {Write::kCopyToDevice, Write::kFill, Write::kCopyOnDevice}) {
    EXPECT_EXIT(try_to_write(table(), write, block.address(), source.address(), pages),
                ::testing::ExitedWithCode(0), "refused")
        << static_cast<int>(write);
  }
}

TEST_P(DriverConformance, C8_AnImportMayBeReadWhileItsMakerWrites) {
  if (!exports_descriptors()) GTEST_SKIP() << "the device exports no file descriptors";
  cumempool_memory_properties exportable = properties();
  exportable.handle_types = CUMEMPOOL_HANDLE_POSIX_FD;
  const Range made_range(table(), granule());
  const Range imported_range(table(), granule());
  const HostBuffer back(table(), granule());
  cumempool_physical made = 0;
  cumempool_physical imported = 0;
  int descriptor = -1;
  must(CALL(table(), create, granule(), &exportable, &made), "create");
  must(CALL(table(), export_handle, made, CUMEMPOOL_HANDLE_POSIX_FD, &descriptor), "export_handle");
  must(CALL(table(), import_handle, &descriptor, CUMEMPOOL_HANDLE_POSIX_FD, &imported), "import");
  close(descriptor);
  map_at(table(), made_range.address(), granule(), made);
  must(CALL(table(), map, imported_range.address(), granule(), imported), "map");
  const auto result = give_access(table(), imported_range.address(), granule(), kRead);
  if (result == CUMEMPOOL_RESULT_SUCCESS) {
    for (std::uint8_t round = 1; round <= 3; ++round) {
      must(CALL(table(), fill, 0, made_range.address(), round, granule(), kLegacyStream), "fill");
      download(back, imported_range.address(), granule());
      EXPECT_TRUE(back.all_are(round)) << int{round};
    }
  }
  must(CALL(table(), unmap, imported_range.address(), granule()), "unmap");
  must(CALL(table(), unmap, made_range.address(), granule()), "unmap");
  must(CALL(table(), release, imported), "release");
  must(CALL(table(), release, made), "release");
  if (result == CUMEMPOOL_RESULT_NOT_SUPPORTED) GTEST_SKIP() << kNoReadAccess;
  EXPECT_EQ(result, CUMEMPOOL_RESULT_SUCCESS);
}

}  // namespace
}  // namespace cumempool::conformance
