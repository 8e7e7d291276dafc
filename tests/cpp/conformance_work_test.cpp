// The contract of driver.h held to account on any driver, second part: copies, fills and waiting
// for them (C9 to C11). Nothing here says that work has not happened yet: on a GPU it may have.
#include <array>
#include <cstring>
#include <memory>
#include <thread>

#include "conformance_fixture.hpp"

namespace cumempool::conformance {
namespace {

constexpr cumempool_stream kLegacyStream = 0;

TEST_P(DriverConformance, C9_CommandsOfOneStreamRunInOrder) {
  const Block block(table(), granule(), properties());
  const HostBuffer first(table(), granule());
  const HostBuffer second(table(), granule());
  const Stream created(table());
  for (const cumempool_stream stream : {kLegacyStream, created.get()}) {
    std::memset(first.data(), 0, granule());
    std::memset(second.data(), 0, granule());
    must(CALL(table(), fill, 0, block.address(), std::uint8_t{1}, granule(), stream), "fill");
    must(CALL(table(), copy_to_host, 0, first.data(), block.address(), granule(), stream), "copy");
    must(CALL(table(), fill, 0, block.address(), std::uint8_t{2}, granule(), stream), "fill");
    must(CALL(table(), copy_to_host, 0, second.data(), block.address(), granule(), stream), "copy");
    must(CALL(table(), stream_synchronize, 0, stream), "stream_synchronize");
    EXPECT_TRUE(first.all_are(1));
    EXPECT_TRUE(second.all_are(2));
  }
}

TEST_P(DriverConformance, C9_CopiesTakePartsOfARange) {
  const Block block(table(), granule(), properties());
  const HostBuffer out(table(), granule());
  const HostBuffer back(table(), granule());
  write_pattern(out.data(), granule(), 3);
  must(CALL(table(), fill, 0, block.address(), std::uint8_t{0}, granule(), kLegacyStream), "fill");
  must(CALL(table(), copy_to_device, 0, block.address() + 5, out.data() + 100, std::size_t{1000},
            kLegacyStream),
       "copy_to_device");
  download(back, block.address(), granule());
  EXPECT_TRUE(back.all_are(0, 5, 0));
  EXPECT_EQ(std::memcmp(back.data() + 5, out.data() + 100, 1000), 0);
  EXPECT_TRUE(back.all_are(1005, granule() - 1005, 0));
}

TEST_P(DriverConformance, C9_EventsCoverWhatWasSubmittedBeforeThem) {
  const Block block(table(), granule(), properties());
  const HostBuffer back(table(), granule());
  const Stream stream(table());
  const Event event(table());
  for (std::uint8_t round = 1; round <= 3; ++round) {  // recorded again each time
    must(CALL(table(), fill, 0, block.address(), round, granule(), stream.get()), "fill");
    must(CALL(table(), copy_to_host, 0, back.data(), block.address(), granule(), stream.get()),
         "copy_to_host");
    must(CALL(table(), event_record, 0, event.get(), stream.get()), "event_record");
    must(CALL(table(), event_synchronize, 0, event.get()), "event_synchronize");
    EXPECT_TRUE(back.all_are(round));
  }
}

TEST_P(DriverConformance, C9_EventThatWasNeverRecordedIsDone) {
  const Event event(table());
  EXPECT_EQ(CALL(table(), event_synchronize, 0, event.get()), CUMEMPOOL_RESULT_SUCCESS);
}

TEST_P(DriverConformance, C9_EventsOutliveTheirStream) {
  const Block block(table(), granule(), properties());
  const HostBuffer back(table(), granule());
  const Event event(table());
  {
    const Stream stream(table());
    must(CALL(table(), fill, 0, block.address(), std::uint8_t{5}, granule(), stream.get()), "fill");
    must(CALL(table(), copy_to_host, 0, back.data(), block.address(), granule(), stream.get()),
         "copy_to_host");
    must(CALL(table(), event_record, 0, event.get(), stream.get()), "event_record");
  }
  must(CALL(table(), event_synchronize, 0, event.get()), "event_synchronize");
  EXPECT_TRUE(back.all_are(5));
}

// Asks until it is done; returns what was said last.
cumempool_result poll(const cumempool_driver& table, cumempool_event event) {
  cumempool_result result = CUMEMPOOL_RESULT_NOT_READY;
  while (result == CUMEMPOOL_RESULT_NOT_READY) result = CALL(table, event_query, 0, event);
  return result;
}

TEST_P(DriverConformance, C9_PollingAnEventComesToAnEnd) {
  const Block block(table(), granule(), properties());
  const HostBuffer back(table(), granule());
  const Stream stream(table());
  const Event event(table());
  EXPECT_EQ(CALL(table(), event_query, 0, event.get()), CUMEMPOOL_RESULT_SUCCESS)
      << "never recorded";
  for (std::uint8_t round = 1; round <= 3; ++round) {
    must(CALL(table(), fill, 0, block.address(), round, granule(), stream.get()), "fill");
    must(CALL(table(), copy_to_host, 0, back.data(), block.address(), granule(), stream.get()),
         "copy_to_host");
    must(CALL(table(), event_record, 0, event.get(), stream.get()), "event_record");
    EXPECT_EQ(poll(table(), event.get()), CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_TRUE(back.all_are(round)) << "a query that says done is as good as a wait";
  }
}

TEST_P(DriverConformance, C9_StreamsWaitForEventsOfOtherStreams) {
  const std::size_t bytes = 16 * granule();
  const Block block(table(), bytes, properties());
  const HostBuffer back(table(), bytes);
  const Stream first(table());
  const Stream second(table());
  const Event filled(table());
  const Event copied(table());
  for (std::uint8_t round = 1; round <= 8; ++round) {
    must(CALL(table(), stream_wait_event, 0, first.get(), copied.get()), "stream_wait_event");
    must(CALL(table(), fill, 0, block.address(), round, bytes, first.get()), "fill");
    must(CALL(table(), event_record, 0, filled.get(), first.get()), "event_record");
    must(CALL(table(), stream_wait_event, 0, second.get(), filled.get()), "stream_wait_event");
    must(CALL(table(), copy_to_host, 0, back.data(), block.address(), bytes, second.get()), "copy");
    must(CALL(table(), event_record, 0, copied.get(), second.get()), "event_record");
    if (round % 4 == 0) {
      must(CALL(table(), stream_synchronize, 0, second.get()), "stream_synchronize");
      EXPECT_TRUE(back.all_are(round)) << int{round};
    }
  }
}

TEST_P(DriverConformance, C9_AWaitStandsForTheEventAsItWasThen) {
  const Block block(table(), granule(), properties());
  const HostBuffer back(table(), granule());
  const Stream first(table());
  const Stream second(table());
  {
    const Event event(table());
    must(CALL(table(), fill, 0, block.address(), std::uint8_t{1}, granule(), first.get()), "fill");
    must(CALL(table(), event_record, 0, event.get(), first.get()), "event_record");
    must(CALL(table(), stream_wait_event, 0, second.get(), event.get()), "stream_wait_event");
    must(CALL(table(), event_record, 0, event.get(), second.get()), "event_record");
  }
  must(CALL(table(), copy_to_host, 0, back.data(), block.address(), granule(), second.get()),
       "copy_to_host");
  must(CALL(table(), stream_synchronize, 0, second.get()), "stream_synchronize");
  EXPECT_TRUE(back.all_are(1)) << "recorded again and destroyed since";
}

TEST_P(DriverConformance, C9_CopiesOnTheDeviceMoveBytesInStreamOrder) {
  const Block block(table(), 2 * granule(), properties());
  const HostBuffer out(table(), granule());
  const HostBuffer back(table(), granule());
  const Stream stream(table());
  const cumempool_address there = block.address() + granule();
  write_pattern(out.data(), granule(), 10);
  must(CALL(table(), copy_to_device, 0, block.address(), out.data(), granule(), stream.get()),
       "copy_to_device");
  must(CALL(table(), fill, 0, there, std::uint8_t{0}, granule(), stream.get()), "fill");
  must(CALL(table(), copy_on_device, 0, there + 3, block.address() + 100, std::size_t{5000},
            stream.get()),
       "copy_on_device");
  must(CALL(table(), fill, 0, block.address(), std::uint8_t{1}, granule(), stream.get()), "fill");
  must(CALL(table(), copy_to_host, 0, back.data(), there, granule(), stream.get()), "copy");
  must(CALL(table(), stream_synchronize, 0, stream.get()), "stream_synchronize");
  EXPECT_TRUE(back.all_are(0, 3, 0));
  EXPECT_EQ(std::memcmp(back.data() + 3, out.data() + 100, 5000), 0);
  EXPECT_TRUE(back.all_are(5003, granule() - 5003, 0));
}

TEST_P(DriverConformance, C9_CopiesOnTheDeviceCrossMappings) {
  constexpr std::size_t count = 3;
  const Range range(table(), 2 * count * granule());
  for (std::size_t i = 0; i < 2 * count; ++i) {
    const cumempool_physical physical = create(granule());
    map_at(table(), range.address() + i * granule(), granule(), physical);
    must(CALL(table(), release, physical), "release");
  }
  const std::size_t bytes = count * granule() - 100;
  const HostBuffer out(table(), count * granule());
  const HostBuffer back(table(), count * granule());
  write_pattern(out.data(), bytes, 11);
  upload(range.address() + 100, out, bytes);
  must(CALL(table(), copy_on_device, 0, range.address() + count * granule() + 7,
            range.address() + 100, bytes, kLegacyStream),
       "copy_on_device");
  download(back, range.address() + count * granule() + 7, bytes);
  EXPECT_EQ(std::memcmp(out.data(), back.data(), bytes), 0);
  for (std::size_t i = 0; i < 2 * count; ++i) {
    EXPECT_EQ(CALL(table(), unmap, range.address() + i * granule(), granule()),
              CUMEMPOOL_RESULT_SUCCESS);
  }
}

TEST_P(DriverConformance, C9_CopiesOnTheDeviceDoNotOverlap) {
  const Block block(table(), 2 * granule(), properties());
  EXPECT_EQ(CALL(table(), copy_on_device, 0, block.address() + 1, block.address(), granule(),
                 kLegacyStream),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table(), copy_on_device, 0, block.address(), block.address() + granule() - 1,
                 granule(), kLegacyStream),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table(), copy_on_device, 0, block.address(), block.address(), std::size_t{0},
                 kLegacyStream),
            CUMEMPOOL_RESULT_SUCCESS);
}

// Memory of device 1, a stream and an event there, with access for device 0.
TEST_P(DriverConformance, C9_DevicesWithAccessCopyAndWaitAcross) {
  int count = 0;
  must(CALL(table(), device_count, &count), "device_count");
  if (count < 2) GTEST_SKIP() << "needs two devices";
  int possible = 0;
  must(CALL(table(), peer_access, 0, 1, &possible), "peer_access");
  if (possible == 0) GTEST_SKIP() << "device 0 cannot reach device 1";

  cumempool_memory_properties elsewhere = properties();
  elsewhere.device = 1;
  const Block here(table(), granule(), properties());
  const Block there(table(), granule(), elsewhere);
  const std::array<int, 2> both{0, 1};
  must(CALL(table(), set_access, there.address(), granule(), both.data(), both.size(), kReadWrite),
       "set_access");
  const HostBuffer out(table(), granule());
  const HostBuffer back(table(), granule());
  const Stream stream(table());
  write_pattern(out.data(), granule(), 12);
  must(CALL(table(), context_retain, 1), "context_retain");
  {
    cumempool_stream other_stream = 0;
    cumempool_event arrived = 0;
    {
      const Inside other(table(), 1);
      must(CALL(table(), stream_create, 1, &other_stream), "stream_create");
      must(CALL(table(), event_create, 1, &arrived), "event_create");
      must(CALL(table(), copy_to_device, 1, there.address(), out.data(), granule(), other_stream),
           "copy_to_device");
      must(CALL(table(), event_record, 1, arrived, other_stream), "event_record");
    }
    must(CALL(table(), stream_wait_event, 0, stream.get(), arrived), "stream_wait_event");
    must(CALL(table(), copy_on_device, 0, here.address(), there.address(), granule(), stream.get()),
         "copy_on_device");
    must(CALL(table(), copy_to_host, 0, back.data(), here.address(), granule(), stream.get()),
         "copy_to_host");
    must(CALL(table(), stream_synchronize, 0, stream.get()), "stream_synchronize");
    EXPECT_EQ(std::memcmp(out.data(), back.data(), granule()), 0);
    const Inside other(table(), 1);
    EXPECT_EQ(CALL(table(), event_destroy, 1, arrived), CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_EQ(CALL(table(), stream_destroy, 1, other_stream), CUMEMPOOL_RESULT_SUCCESS);
  }
  EXPECT_EQ(CALL(table(), context_release, 1), CUMEMPOOL_RESULT_SUCCESS);
}

TEST_P(DriverConformance, C9_HostSideLiesInOneRegisteredRange) {
  const Block block(table(), granule(), properties());
  const std::size_t half = granule() / 2;
  const HostBuffer pages(table(), granule(), /*registered=*/false);
  std::uint8_t* const border = pages.data() + half;
  must(CALL(table(), host_register, 0, pages.data(), half), "host_register");
  must(CALL(table(), host_register, 0, border, half), "host_register");
  EXPECT_NE(CALL(table(), copy_to_host, 0, pages.data(), block.address(), granule(), kLegacyStream),
            CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_NE(CALL(table(), copy_to_device, 0, block.address(), border - 4096, std::size_t{8192},
                 kLegacyStream),
            CUMEMPOOL_RESULT_SUCCESS);
  must(CALL(table(), fill, 0, block.address(), std::uint8_t{9}, granule(), kLegacyStream), "fill");
  must(CALL(table(), copy_to_host, 0, pages.data(), block.address(), half, kLegacyStream), "copy");
  must(CALL(table(), copy_to_host, 0, border, block.address() + half, half, kLegacyStream), "copy");
  must(fence(table(), 0), "fence");
  EXPECT_TRUE(pages.all_are(9)) << "split at the border";
  must(CALL(table(), host_unregister, 0, pages.data()), "host_unregister");
  EXPECT_EQ(CALL(table(), host_unregister, 0, border), CUMEMPOOL_RESULT_SUCCESS);
}

TEST_P(DriverConformance, C9_HostMemoryIsRegisteredOnce) {
  const HostBuffer pages(table(), 2 * granule());
  EXPECT_EQ(CALL(table(), host_register, 0, pages.data(), 2 * granule()),
            CUMEMPOOL_RESULT_HOST_MEMORY_ALREADY_REGISTERED);
  EXPECT_NE(CALL(table(), host_unregister, 0, pages.data() + granule()), CUMEMPOOL_RESULT_SUCCESS);
}

TEST_P(DriverConformance, C9_HostMemoryThatIsNotRegisteredCannotBeUnregistered) {
  const HostBuffer pages(table(), granule(), /*registered=*/false);
  EXPECT_EQ(CALL(table(), host_unregister, 0, pages.data()),
            CUMEMPOOL_RESULT_HOST_MEMORY_NOT_REGISTERED);
}

TEST_P(DriverConformance, C9_UnregisteringWaitsForTheCopiesThatUseIt) {
  const Block block(table(), granule(), properties());
  const HostBuffer back(table(), granule(), /*registered=*/false);
  const Stream stream(table());
  must(CALL(table(), host_register, 0, back.data(), granule()), "host_register");
  must(CALL(table(), fill, 0, block.address(), std::uint8_t{4}, granule(), stream.get()), "fill");
  must(CALL(table(), copy_to_host, 0, back.data(), block.address(), granule(), stream.get()),
       "copy_to_host");
  must(CALL(table(), host_unregister, 0, back.data()), "host_unregister");
  EXPECT_TRUE(back.all_are(4));
}

// Host memory is pinned for all devices, whichever of them it was registered with.
TEST_P(DriverConformance, C9_UnregisteringWaitsForTheCopiesOfAnotherDevice) {
  int count = 0;
  must(CALL(table(), device_count, &count), "device_count");
  if (count < 2) GTEST_SKIP() << "needs two devices";
  cumempool_memory_properties elsewhere = properties();
  elsewhere.device = 1;
  const std::size_t bytes = 16 * granule();
  const Block there(table(), bytes, elsewhere);
  const HostBuffer back(table(), bytes, /*registered=*/false);
  must(CALL(table(), host_register, 0, back.data(), bytes), "host_register");
  must(CALL(table(), context_retain, 1), "context_retain");
  cumempool_stream stream = 0;
  {
    const Inside other(table(), 1);
    must(CALL(table(), stream_create, 1, &stream), "stream_create");
    must(CALL(table(), fill, 1, there.address(), std::uint8_t{4}, bytes, stream), "fill");
    must(CALL(table(), copy_to_host, 1, back.data(), there.address(), bytes, stream),
         "copy_to_host");
  }
  must(CALL(table(), host_unregister, 0, back.data()), "host_unregister");
  EXPECT_TRUE(back.all_are(4));
  {
    const Inside other(table(), 1);
    EXPECT_EQ(CALL(table(), stream_destroy, 1, stream), CUMEMPOOL_RESULT_SUCCESS);
  }
  EXPECT_EQ(CALL(table(), context_release, 1), CUMEMPOOL_RESULT_SUCCESS);
}

TEST_P(DriverConformance, C9_CreatedStreamsAreNotCapturing) {
  const Stream stream(table());
  int capturing = 1;
  EXPECT_EQ(CALL(table(), stream_is_capturing, 0, stream.get(), &capturing),
            CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(capturing, 0);
}

TEST_P(DriverConformance, C10_FenceWaitsForEveryStream) {
  constexpr std::uint8_t stream_count = 4;
  const Block block(table(), stream_count * granule(), properties());
  const HostBuffer back(table(), stream_count * granule());
  std::vector<std::unique_ptr<Stream>> created;
  std::array<cumempool_stream, stream_count> streams{kLegacyStream};
  for (std::size_t i = 1; i < stream_count; ++i) {
    created.push_back(std::make_unique<Stream>(table()));
    streams[i] = created.back()->get();
  }
  for (std::uint8_t i = 0; i < stream_count; ++i) {
    const std::size_t offset = i * granule();
    const auto byte = static_cast<std::uint8_t>(i + 1);
    must(CALL(table(), fill, 0, block.address() + offset, byte, granule(), streams[i]), "fill");
    must(CALL(table(), copy_to_host, 0, back.data() + offset, block.address() + offset, granule(),
              streams[i]),
         "copy_to_host");
  }
  must(fence(table(), 0), "fence");
  for (std::uint8_t i = 0; i < stream_count; ++i) {
    EXPECT_TRUE(back.all_are(i * granule(), granule(), static_cast<std::uint8_t>(i + 1))) << int{i};
  }
}

TEST_P(DriverConformance, C10_FenceWaitsForTheWorkOfOtherThreads) {
  const Block block(table(), granule(), properties());
  const HostBuffer back(table(), granule());
  const Stream stream(table());
  std::thread([&] {
    try {
      const Inside inside(table());
      must(CALL(table(), fill, 0, block.address(), std::uint8_t{6}, granule(), stream.get()),
           "fill");
      must(CALL(table(), copy_to_host, 0, back.data(), block.address(), granule(), stream.get()),
           "copy_to_host");
    } catch (const std::runtime_error& error) {
      ADD_FAILURE() << error.what();
    }
  }).join();
  must(fence(table(), 0), "fence");
  EXPECT_TRUE(back.all_are(6));
}

// From a thread that is inside no context: work of another device into memory of device 0, and of
// device 0 itself.
TEST_P(DriverConformance, C10_FenceWaitsForEachOfTheListedDevices) {
  int count = 0;
  int reaches = 0;
  must(CALL(table(), device_count, &count), "device_count");
  if (count > 1) must(CALL(table(), peer_access, 1, 0, &reaches), "peer_access");
  if (reaches == 0) GTEST_SKIP() << "needs two devices that reach each other's memory";
  const Block block(table(), 2 * granule(), properties());
  const HostBuffer back(table(), 2 * granule());
  const std::array<int, 2> both{1, 0};
  must(CALL(table(), set_access, block.address(), 2 * granule(), both.data(), both.size(),
            kReadWrite),
       "set_access");
  must(CALL(table(), context_retain, 1), "context_retain");
  for (const int device : both) {
    const Inside inside(table(), device);
    const std::size_t at = device == 1 ? granule() : 0;
    const cumempool_stream legacy = 0;
    must(CALL(table(), fill, device, block.address() + at, std::uint8_t{8}, granule(), legacy),
         "fill");
    must(CALL(table(), copy_to_host, device, back.data() + at, block.address() + at, granule(),
              legacy),
         "copy_to_host");
  }
  cumempool_result result = CUMEMPOOL_RESULT_NOT_READY;
  std::thread([&] { result = CALL(table(), fence, both.data(), both.size()); }).join();
  must(result, "fence");
  EXPECT_TRUE(back.all_are(8));
  must(CALL(table(), context_release, 1), "context_release");
}

TEST_P(DriverConformance, C10_ADeviceThatNobodyUsesCostsTheFenceNothing) {
  int count = 0;
  must(CALL(table(), device_count, &count), "device_count");
  int active = 0;
  const int last = count - 1;
  must(CALL(table(), context_active, last, &active), "context_active");
  if (active != 0) GTEST_SKIP() << "needs a device without a context";
  must(fence(table(), last), "fence");
  must(CALL(table(), context_active, last, &active), "context_active");
  EXPECT_EQ(active, 0) << "no context was made for it";
}

TEST_P(DriverConformance, C10_FenceWaitsForStreamsThatWereDestroyed) {
  const Block block(table(), granule(), properties());
  const HostBuffer back(table(), granule());
  {
    const Stream stream(table());
    must(CALL(table(), fill, 0, block.address(), std::uint8_t{7}, granule(), stream.get()), "fill");
    must(CALL(table(), copy_to_host, 0, back.data(), block.address(), granule(), stream.get()),
         "copy_to_host");
  }
  must(fence(table(), 0), "fence");
  EXPECT_TRUE(back.all_are(7));
}

TEST_P(DriverConformance, C11_AfterAFenceMemoryMayGo) {
  const HostBuffer back(table(), granule());
  const Stream stream(table());
  for (std::uint8_t round = 1; round <= 5; ++round) {
    const Block block(table(), granule(), properties());
    must(CALL(table(), fill, 0, block.address(), round, granule(), stream.get()), "fill");
    must(CALL(table(), copy_to_host, 0, back.data(), block.address(), granule(), stream.get()),
         "copy_to_host");
    must(fence(table(), 0), "fence");
  }
  EXPECT_TRUE(back.all_are(5));
  EXPECT_EQ(fence(table(), 0), CUMEMPOOL_RESULT_SUCCESS);
}

}  // namespace
}  // namespace cumempool::conformance
