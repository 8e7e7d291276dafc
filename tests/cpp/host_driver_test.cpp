// What the host driver promises beyond the contract: exact result codes for misuse, work that never
// runs before somebody waits, errors that stick, and a budget that adds up.
// host_driver_memory_test.cpp has allocations and read-only access.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <array>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "driver/digest.hpp"
#include "driver/driver.hpp"
#include "driver/error.hpp"
#include "host_driver_fixture.hpp"

namespace cumempool::driver {
namespace {

using conformance::Block;
using conformance::Event;
using conformance::HostBuffer;
using conformance::Inside;
using conformance::kReadWrite;
using conformance::map_at;
using conformance::must;
using conformance::Range;
using conformance::Stream;

// ---- options --------------------------------------------------------------------------------

std::string refusal(const cumempool_host_driver_options& options) {
  try {
    destroy_host_driver(make_host_driver(options));
  } catch (const Error& error) {
    EXPECT_EQ(error.status, CUMEMPOOL_INVALID_ARGUMENT);
    return error.problem;
  }
  return "taken";
}

TEST(HostDriverOptions, RefusesWhatItCannotSimulate) {
  EXPECT_EQ(refusal(good_options()), "taken");
  const auto with = [](auto change) {
    auto options = good_options();
    change(options);
    return refusal(options);
  };
  const auto has = [](const std::string& text, const char* part) {
    return text.find(part) != std::string::npos ? "" : "no '" + std::string(part) + "' in " + text;
  };
  EXPECT_EQ(has(with([](auto& o) { o.size = 4; }), "size"), "");
  EXPECT_EQ(has(with([](auto& o) { o.device_count = 0; }), "device_count"), "");
  EXPECT_EQ(has(with([](auto& o) { o.device_count = 65; }), "device_count"), "");
  EXPECT_EQ(has(with([](auto& o) { o.granularity = 512; }), "granularity"), "");
  EXPECT_EQ(has(with([](auto& o) { o.granularity = 3 * 4096; }), "granularity"), "");
  EXPECT_EQ(has(with([](auto& o) { o.bytes_per_device = 0; }), "bytes_per_device"), "");
  EXPECT_EQ(has(with([](auto& o) { o.bytes_per_device = kGranule + 1; }), "bytes_per_device"), "");
  EXPECT_EQ(has(with([](auto& o) { o.handle_types = 2; }), "handle_types"), "");
  EXPECT_EQ(has(with([](auto& o) { o.rdma = 2; }), "rdma"), "");
}

TEST(HostDriverOptions, NothingWorksBeforeInit) {
  const auto* table = make_host_driver(good_options());
  cumempool_address address = 0;
  int count = 0;
  EXPECT_EQ(CALL(*table, reserve, kGranule, &address), CUMEMPOOL_RESULT_NOT_INITIALIZED);
  EXPECT_EQ(CALL(*table, device_count, &count), CUMEMPOOL_RESULT_NOT_INITIALIZED);
  EXPECT_EQ(CALL(*table, context_retain, 0), CUMEMPOOL_RESULT_NOT_INITIALIZED);
  destroy_host_driver(table);
}

TEST_F(HostDriverTest, GrantsOnlyWhatItsOptionsSay) {
  cumempool_physical physical = 0;
  const auto result_of = [&](cumempool_memory_properties properties) {
    return CALL(table_, create, kGranule, &properties, &physical);
  };
  EXPECT_EQ(result_of({0, CUMEMPOOL_HANDLE_FABRIC, 0, 0}), CUMEMPOOL_RESULT_NOT_PERMITTED);
  EXPECT_EQ(result_of({0, CUMEMPOOL_HANDLE_FABRIC | CUMEMPOOL_HANDLE_POSIX_FD, 0, 0}),
            CUMEMPOOL_RESULT_NOT_PERMITTED);
  EXPECT_EQ(result_of({0, 0, 1, 0}), CUMEMPOOL_RESULT_NOT_SUPPORTED);
  EXPECT_EQ(result_of({0, 2, 0, 0}), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(result_of({0, 0, 0, 1}), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(result_of({2, 0, 0, 0}), CUMEMPOOL_RESULT_INVALID_DEVICE);

  auto poor = good_options();
  poor.handle_types = 0;
  const auto* other = make_host_driver(poor);
  must(other->init(other->self), "init");
  EXPECT_EQ(CALL(*other, create, kGranule, &properties_, &physical),
            CUMEMPOOL_RESULT_NOT_SUPPORTED);
  destroy_host_driver(other);
}

// ---- the budget -----------------------------------------------------------------------------

TEST_F(HostDriverTest, C12_EachDeviceHasItsOwnBudget) {
  const cumempool_physical all = create(kBudget);
  EXPECT_EQ(free_bytes(), 0u);
  cumempool_physical physical = 0;
  EXPECT_EQ(CALL(table_, create, kGranule, &properties_, &physical),
            CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  cumempool_memory_properties second = properties_;
  second.device = 1;
  EXPECT_EQ(CALL(table_, create, kGranule, &second, &physical), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(host_driver_counters(&table_).charged_bytes, kBudget + kGranule);
  must(CALL(table_, release, all), "release");
  EXPECT_EQ(free_bytes(), kBudget);
}

TEST_F(HostDriverTest, C7_OpenDescriptorsAndImportsStayCharged) {
  const cumempool_physical made = create(kGranule);
  int descriptor = -1;
  must(CALL(table_, export_handle, made, CUMEMPOOL_HANDLE_POSIX_FD, &descriptor), "export_handle");
  must(CALL(table_, release, made), "release");
  EXPECT_EQ(free_bytes(), kBudget - kGranule) << "the descriptor keeps it";
  cumempool_physical imported = 0;
  must(CALL(table_, import_handle, &descriptor, CUMEMPOOL_HANDLE_POSIX_FD, &imported), "import");
  close(descriptor);
  EXPECT_EQ(free_bytes(), kBudget - kGranule) << "the import keeps it, and is not charged again";
  must(CALL(table_, release, imported), "release");
  EXPECT_EQ(free_bytes(), kBudget);
}

TEST_F(HostDriverTest, ClosingTheLastDescriptorGivesTheBudgetBackToCreate) {
  const cumempool_physical made = create(kBudget);
  int descriptor = -1;
  must(CALL(table_, export_handle, made, CUMEMPOOL_HANDLE_POSIX_FD, &descriptor), "export_handle");
  must(CALL(table_, release, made), "release");
  close(descriptor);
  must(CALL(table_, release, create(kBudget)), "release");
}

TEST_F(HostDriverTest, ImportsOfAnotherDriverAreChargedThere) {
  const auto* other = make_host_driver(good_options());
  must(other->init(other->self), "init");
  cumempool_physical made = 0;
  must(CALL(*other, create, kGranule, &properties_, &made), "create");
  int descriptor = -1;
  must(CALL(*other, export_handle, made, CUMEMPOOL_HANDLE_POSIX_FD, &descriptor), "export_handle");
  cumempool_physical imported = 0;
  must(CALL(table_, import_handle, &descriptor, CUMEMPOOL_HANDLE_POSIX_FD, &imported), "import");
  EXPECT_EQ(free_bytes(), kBudget);
  destroy_host_driver(other);
  const Range range(table_, kGranule);
  map_at(table_, range.address(), kGranule, imported);
  must(CALL(table_, unmap, range.address(), kGranule), "unmap");
  must(CALL(table_, release, imported), "release");
  close(descriptor);
}

TEST_F(HostDriverTest, CountersSayWhatIsHeld) {
  const Block block(table_, 2 * kGranule, properties_);
  const HostBuffer pages(table_, kGranule);
  const Stream stream(table_);
  const Event event(table_);
  must(fill(block.address(), 1), "fill");
  const auto held = host_driver_counters(&table_);
  EXPECT_EQ(held.reservations, 1u);
  EXPECT_EQ(held.reserved_bytes, 2 * kGranule);
  EXPECT_EQ(held.handles, 0u) << "released once mapped";
  EXPECT_EQ(held.mappings, 1u);
  EXPECT_EQ(held.mapped_bytes, 2 * kGranule);
  EXPECT_EQ(held.allocations, 0u);
  EXPECT_EQ(held.charged_bytes, 2 * kGranule);
  EXPECT_EQ(held.registrations, 1u);
  EXPECT_EQ(held.registered_bytes, kGranule);
  EXPECT_EQ(held.streams, 1u);
  EXPECT_EQ(held.events, 1u);
  EXPECT_EQ(held.queued_commands, 1u);
  EXPECT_EQ(held.retained_contexts, 1u);
  EXPECT_EQ(held.entered_contexts, 1u);
}

// ---- misuse of memory -----------------------------------------------------------------------

TEST_F(HostDriverTest, HandlesAreReleasedOnceAndNeverReused) {
  const cumempool_physical physical = create(kGranule);
  must(CALL(table_, release, physical), "release");
  EXPECT_EQ(CALL(table_, release, physical), CUMEMPOOL_RESULT_INVALID_HANDLE);
  const cumempool_physical next = create(kGranule);
  EXPECT_NE(next, physical);
  const Range range(table_, kGranule);
  int descriptor = -1;
  EXPECT_EQ(CALL(table_, map, range.address(), kGranule, physical),
            CUMEMPOOL_RESULT_INVALID_HANDLE);
  EXPECT_EQ(CALL(table_, export_handle, physical, CUMEMPOOL_HANDLE_POSIX_FD, &descriptor),
            CUMEMPOOL_RESULT_INVALID_HANDLE);
}

TEST_F(HostDriverTest, MapTakesTheWholeHandleInsideOneReservation) {
  const Range range(table_, 2 * kGranule);
  const cumempool_physical physical = create(2 * kGranule);
  EXPECT_EQ(CALL(table_, map, range.address(), kGranule, physical), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, map, range.address() + kGranule, 2 * kGranule, physical),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, map, cumempool_address{kGranule}, 2 * kGranule, physical),
            CUMEMPOOL_RESULT_INVALID_VALUE);
}

TEST_F(HostDriverTest, MisuseOfMappingsHasItsOwnResults) {
  cumempool_address address = 0;
  must(CALL(table_, reserve, 4 * kGranule, &address), "reserve");
  const cumempool_physical physical = create(2 * kGranule);
  const int device = 0;
  EXPECT_EQ(CALL(table_, set_access, address, kGranule, &device, std::size_t{1}, kReadWrite),
            CUMEMPOOL_RESULT_NOT_MAPPED);
  EXPECT_EQ(CALL(table_, unmap, address, 2 * kGranule), CUMEMPOOL_RESULT_NOT_MAPPED);
  must(CALL(table_, map, address, 2 * kGranule, physical), "map");
  EXPECT_EQ(CALL(table_, map, address + kGranule, 2 * kGranule, physical),
            CUMEMPOOL_RESULT_ALREADY_MAPPED);
  EXPECT_EQ(CALL(table_, unreserve, address, 4 * kGranule), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, unmap, address, kGranule), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, set_access, address, kGranule, &device, std::size_t{1}, kReadWrite),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, set_access, address, 4 * kGranule, &device, std::size_t{1}, kReadWrite),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, set_access, address, 2 * kGranule, &device, std::size_t{0}, kReadWrite),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  const int nobody = 2;
  EXPECT_EQ(CALL(table_, set_access, address, 2 * kGranule, &nobody, std::size_t{1}, kReadWrite),
            CUMEMPOOL_RESULT_INVALID_DEVICE);
  EXPECT_EQ(fill(address, 1), CUMEMPOOL_RESULT_INVALID_VALUE) << "mapped without access";
  const int peer = 1;
  must(CALL(table_, set_access, address, 2 * kGranule, &peer, std::size_t{1}, kReadWrite),
       "set_access");
  EXPECT_EQ(fill(address, 1), CUMEMPOOL_RESULT_INVALID_VALUE) << "access for the peer only";
  must(CALL(table_, unmap, address, 2 * kGranule), "unmap");
  EXPECT_EQ(CALL(table_, unreserve, address + kGranule, kGranule), CUMEMPOOL_RESULT_INVALID_VALUE);
  must(CALL(table_, unreserve, address, 4 * kGranule), "unreserve");
  EXPECT_EQ(CALL(table_, unreserve, address, 4 * kGranule), CUMEMPOOL_RESULT_INVALID_VALUE);
}

TEST_F(HostDriverTest, C5_RangesThatWrapAroundAreRefused) {
  cumempool_address address = 0;
  const std::size_t nearly_all = ~std::size_t{0} - kGranule + 1;
  EXPECT_EQ(CALL(table_, reserve, nearly_all, &address), CUMEMPOOL_RESULT_INVALID_VALUE);
  const Block block(table_, kGranule, properties_);
  EXPECT_EQ(fill(block.address(), 1, ~std::size_t{0}), CUMEMPOOL_RESULT_INVALID_VALUE);
}

TEST_F(HostDriverTest, ImportTakesOnlyMemoryThatADriverMade) {
  cumempool_physical physical = 0;
  const int no_descriptor = -1;
  EXPECT_EQ(CALL(table_, import_handle, &no_descriptor, CUMEMPOOL_HANDLE_POSIX_FD, &physical),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  const int file = open("/dev/null", O_RDWR | O_CLOEXEC);
  EXPECT_EQ(CALL(table_, import_handle, &file, CUMEMPOOL_HANDLE_POSIX_FD, &physical),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  close(file);
  EXPECT_EQ(CALL(table_, import_handle, &file, CUMEMPOOL_HANDLE_FABRIC, &physical),
            CUMEMPOOL_RESULT_NOT_PERMITTED);
}

TEST_F(HostDriverTest, ExportNeedsAHandleTypeAskedForAtCreate) {
  properties_.handle_types = 0;
  const cumempool_physical physical = create(kGranule);
  int descriptor = -1;
  EXPECT_EQ(CALL(table_, export_handle, physical, CUMEMPOOL_HANDLE_POSIX_FD, &descriptor),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, export_handle, physical, CUMEMPOOL_HANDLE_FABRIC, &descriptor),
            CUMEMPOOL_RESULT_NOT_PERMITTED);
}

TEST_F(HostDriverTest, C8_NewMemoryIsNotZero) {
  const Block block(table_, kGranule, properties_);
  EXPECT_NE(first_byte(block), 0) << "it would hide a missing fill";
}

// ---- contexts -------------------------------------------------------------------------------

TEST_F(HostDriverTest, ContextsAreEnteredRetainedAndLeftInOrder) {
  cumempool_context_token inner{};
  EXPECT_EQ(CALL(table_, context_enter, 1, &inner), CUMEMPOOL_RESULT_INVALID_CONTEXT);
  must(CALL(table_, context_retain, 1), "context_retain");
  must(CALL(table_, context_enter, 1, &inner), "context_enter");
  EXPECT_EQ(CALL(table_, context_leave, &token_), CUMEMPOOL_RESULT_INVALID_VALUE) << "not the top";
  std::thread([&] {
    EXPECT_EQ(CALL(table_, context_leave, &inner), CUMEMPOOL_RESULT_INVALID_CONTEXT);
  }).join();
  EXPECT_EQ(CALL(table_, context_leave, &inner), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(CALL(table_, context_release, 1), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(CALL(table_, context_release, 1), CUMEMPOOL_RESULT_INVALID_CONTEXT);
}

TEST_F(HostDriverTest, ObjectsAreLostWithTheirContextAndCountedAsLeaks) {
  cumempool_stream stream = 0;
  cumempool_event event = 0;
  must(CALL(table_, stream_create, 0, &stream), "stream_create");
  must(CALL(table_, event_create, 0, &event), "event_create");
  must(CALL(table_, context_release, 0), "context_release");
  std::uint64_t free = 0;
  EXPECT_EQ(CALL(table_, memory_info, 0, &free, &free), CUMEMPOOL_RESULT_INVALID_CONTEXT);
  EXPECT_EQ(fence(table_, 0), CUMEMPOOL_RESULT_SUCCESS) << "no context, no work";
  must(CALL(table_, context_retain, 0), "context_retain");
  EXPECT_EQ(CALL(table_, stream_destroy, 0, stream), CUMEMPOOL_RESULT_INVALID_HANDLE);
  EXPECT_EQ(CALL(table_, event_destroy, 0, event), CUMEMPOOL_RESULT_INVALID_HANDLE);
  EXPECT_EQ(host_driver_counters(&table_).streams, 1u);
  EXPECT_EQ(host_driver_counters(&table_).events, 1u);
}

TEST_F(HostDriverTest, StreamsAndEventsBelongToOneDevice) {
  const Stream stream(table_);
  const Event event(table_);
  must(CALL(table_, context_retain, 1), "context_retain");
  const Inside other(table_, 1);
  EXPECT_EQ(CALL(table_, stream_synchronize, 1, stream.get()), CUMEMPOOL_RESULT_INVALID_HANDLE);
  EXPECT_EQ(CALL(table_, event_synchronize, 1, event.get()), CUMEMPOOL_RESULT_INVALID_HANDLE);
  EXPECT_EQ(CALL(table_, event_record, 1, event.get(), kLegacyStream),
            CUMEMPOOL_RESULT_INVALID_HANDLE);
  EXPECT_EQ(CALL(table_, stream_destroy, 1, stream.get()), CUMEMPOOL_RESULT_INVALID_HANDLE);
  const Inside again(table_, 0);  // for the owners above
  EXPECT_EQ(CALL(table_, stream_destroy, 0, kLegacyStream), CUMEMPOOL_RESULT_INVALID_HANDLE);
}

// ---- deferred work --------------------------------------------------------------------------

TEST_F(HostDriverTest, C9_NothingRunsBeforeSomebodyWaits) {
  const Block block(table_, kGranule, properties_);
  const HostBuffer out(table_, kGranule);
  const Stream stream(table_);
  const Stream other(table_);
  std::memset(out.data(), 7, kGranule);
  must(CALL(table_, copy_to_device, 0, block.address(), out.data(), kGranule, stream.get()),
       "copy");
  must(CALL(table_, stream_synchronize, 0, other.get()), "stream_synchronize");
  must(CALL(table_, stream_synchronize, 0, kLegacyStream), "stream_synchronize");
  EXPECT_NE(first_byte(block), 7) << "streams do not wait for each other";
  std::memset(out.data(), 8, kGranule);
  must(CALL(table_, stream_synchronize, 0, stream.get()), "stream_synchronize");
  EXPECT_EQ(first_byte(block), 8) << "the source is read when the copy runs";
}

TEST_F(HostDriverTest, C9_EventsRunNothingThatWasSubmittedAfterThem) {
  const Block block(table_, kGranule, properties_);
  const Event event(table_);
  must(fill(block.address(), 1), "fill");
  must(CALL(table_, event_record, 0, event.get(), kLegacyStream), "event_record");
  must(fill(block.address(), 2), "fill");
  must(CALL(table_, event_synchronize, 0, event.get()), "event_synchronize");
  EXPECT_EQ(first_byte(block), 1);
  must(fence(table_, 0), "fence");
  EXPECT_EQ(first_byte(block), 2);
}

TEST_F(HostDriverTest, C9_EachQueryRunsOneCommandOfTheEvent) {
  const Block block(table_, kGranule, properties_);
  const Event event(table_);
  must(fill(block.address(), 1), "fill");
  must(fill(block.address(), 2), "fill");
  must(CALL(table_, event_record, 0, event.get(), kLegacyStream), "event_record");
  must(fill(block.address(), 3), "fill");
  EXPECT_EQ(CALL(table_, event_query, 0, event.get()), CUMEMPOOL_RESULT_NOT_READY);
  EXPECT_EQ(first_byte(block), 1);
  EXPECT_EQ(CALL(table_, event_query, 0, event.get()), CUMEMPOOL_RESULT_NOT_READY);
  EXPECT_EQ(first_byte(block), 2);
  EXPECT_EQ(CALL(table_, event_query, 0, event.get()), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(first_byte(block), 2) << "not what came after";
  must(fence(table_, 0), "fence");
}

TEST_F(HostDriverTest, C9_AStreamThatWaitsRunsWhatItWaitsForAndNoMore) {
  const Block block(table_, 2 * kGranule, properties_);
  const Stream first(table_);
  const Stream second(table_);
  const Event event(table_);
  must(fill(block.address(), 1, kGranule, first.get()), "fill");
  must(CALL(table_, event_record, 0, event.get(), first.get()), "event_record");
  must(fill(block.address(), 2, kGranule, first.get()), "fill");
  must(CALL(table_, stream_wait_event, 0, second.get(), event.get()), "stream_wait_event");
  EXPECT_NE(first_byte(block), 1) << "waiting is deferred too";
  must(fill(block.address() + kGranule, 3, kGranule, second.get()), "fill");
  must(CALL(table_, stream_synchronize, 0, second.get()), "stream_synchronize");
  EXPECT_EQ(first_byte(block), 1);
  EXPECT_EQ(host_driver_counters(&table_).queued_commands, 1u);
  must(fence(table_, 0), "fence");
}

TEST_F(HostDriverTest, WaitsForWhatIsDoneLeaveNoWork) {
  const Block block(table_, kGranule, properties_);
  const Stream stream(table_);
  const Event event(table_);
  must(CALL(table_, stream_wait_event, 0, stream.get(), event.get()), "never recorded");
  must(fill(block.address(), 1), "fill");
  must(CALL(table_, event_record, 0, event.get(), kLegacyStream), "event_record");
  must(CALL(table_, event_synchronize, 0, event.get()), "event_synchronize");
  must(CALL(table_, stream_wait_event, 0, stream.get(), event.get()), "stream_wait_event");
  EXPECT_EQ(host_driver_counters(&table_).queued_commands, 0u);
}

TEST_F(HostDriverTest, C9_ADigestReadsAndWritesWhenItRuns) {
  const Block block(table_, kGranule, properties_);
  const HostBuffer arrays(table_, 4096);
  auto* const extent = reinterpret_cast<cumempool_extent*>(arrays.data());
  auto* const result = reinterpret_cast<cumempool_digest*>(extent + 1);
  *extent = {block.address(), kGranule};
  must(CALL(table_, digest, 0, std::uint64_t{1}, extent, std::size_t{1}, result, kLegacyStream),
       "digest");
  EXPECT_EQ(*result, cumempool_digest{}) << "deferred";
  extent->bytes = 32;
  std::memset(reinterpret_cast<void*>(block.address()), 5, 32);  // NOLINT
  must(fence(table_, 0), "fence");
  const std::vector<std::byte> fives(32, std::byte{5});
  EXPECT_EQ(*result, digest_on_cpu(1, fives.data(), fives.size()));
}

TEST_F(HostDriverTest, C10_FenceIsForTheListedDevicesAlone) {
  const Block block(table_, kGranule, properties_);
  must(fill(block.address(), 1), "fill");
  must(CALL(table_, context_retain, 1), "context_retain");
  {
    const Inside other(table_, 1);
    must(fence(table_, 1), "fence");
    EXPECT_NE(first_byte(block), 1);
  }
  must(fence(table_, 0), "fence");
  EXPECT_EQ(first_byte(block), 1);
}

TEST_F(HostDriverTest, C9_UnregisteringRunsOnlyUpToTheLastUse) {
  const Block block(table_, kGranule, properties_);
  void* pages = mmap(nullptr, kGranule, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  must(CALL(table_, host_register, 0, pages, kGranule), "host_register");
  must(CALL(table_, copy_to_device, 0, block.address(), pages, kGranule, kLegacyStream), "copy");
  must(fill(block.address(), 3), "fill");
  must(CALL(table_, host_unregister, 0, pages), "host_unregister");
  EXPECT_EQ(first_byte(block), 0);
  EXPECT_EQ(host_driver_counters(&table_).queued_commands, 1u);
  munmap(pages, kGranule);
  must(fence(table_, 0), "fence");
}

TEST_F(HostDriverTest, C9_CopiesOfHostMemoryThatIsNotRegisteredAreRefused) {
  const Block block(table_, kGranule, properties_);
  const HostBuffer plain(table_, kGranule, /*registered=*/false);
  EXPECT_EQ(CALL(table_, copy_to_host, 0, plain.data(), block.address(), kGranule, kLegacyStream),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  const HostBuffer pages(table_, kGranule);
  EXPECT_EQ(
      CALL(table_, copy_to_host, 0, pages.data() + 1, block.address(), kGranule, kLegacyStream),
      CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, host_unregister, 0, pages.data() + 4096),
            CUMEMPOOL_RESULT_HOST_MEMORY_NOT_REGISTERED);
}

TEST_F(HostDriverTest, RegistrationsTakeWholePagesThatExist) {
  const HostBuffer pages(table_, 4 * kGranule, /*registered=*/false);
  EXPECT_EQ(CALL(table_, host_register, 0, pages.data() + 1, kGranule),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, host_register, 0, pages.data(), kGranule + 1),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, host_register, 0, pages.data(), std::size_t{0}),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  munmap(pages.data() + kGranule, kGranule);
  EXPECT_EQ(CALL(table_, host_register, 0, pages.data(), 2 * kGranule),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(host_driver_counters(&table_).registrations, 0u);
}

TEST_F(HostDriverTest, RegistrationsDoNotOverlap) {
  constexpr std::size_t page = 4096;
  const HostBuffer pages(table_, kGranule, /*registered=*/false);
  std::uint8_t* const data = pages.data();
  must(CALL(table_, host_register, 0, data + 4 * page, 4 * page), "host_register");
  for (const std::size_t from : {0U, 3U, 4U, 5U, 7U}) {
    EXPECT_EQ(CALL(table_, host_register, 0, data + from * page, 5 * page),
              CUMEMPOOL_RESULT_HOST_MEMORY_ALREADY_REGISTERED)
        << from;
  }
  EXPECT_EQ(CALL(table_, host_register, 0, data, 4 * page), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(CALL(table_, host_register, 0, data + 8 * page, page), CUMEMPOOL_RESULT_SUCCESS);
  for (const std::size_t from : {0U, 4U, 8U}) {
    EXPECT_EQ(CALL(table_, host_unregister, 0, data + from * page), CUMEMPOOL_RESULT_SUCCESS);
  }
}

TEST_F(HostDriverTest, CopiesOfNothingAreTakenAndLeaveNoWork) {
  const Block block(table_, kGranule, properties_);
  EXPECT_EQ(fill(block.address(), 1, 0), CUMEMPOOL_RESULT_SUCCESS);
  EXPECT_EQ(host_driver_counters(&table_).queued_commands, 0u);
}

TEST_F(HostDriverTest, CapturingStreamsTakeNoWork) {
  const Block block(table_, kGranule, properties_);
  const Stream stream(table_);
  const Event event(table_);
  EXPECT_FALSE(host_driver_set_capturing(&table_, 0, stream.get() + 1000, true));
  ASSERT_TRUE(host_driver_set_capturing(&table_, 0, stream.get(), true));
  int capturing = 0;
  must(CALL(table_, stream_is_capturing, 0, stream.get(), &capturing), "stream_is_capturing");
  EXPECT_EQ(capturing, 1);
  EXPECT_EQ(fill(block.address(), 1, kGranule, stream.get()),
            CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(CALL(table_, event_record, 0, event.get(), stream.get()),
            CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(CALL(table_, stream_synchronize, 0, stream.get()),
            CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(fence(table_, 0), CUMEMPOOL_RESULT_SUCCESS) << "C4";
  ASSERT_TRUE(host_driver_set_capturing(&table_, 0, stream.get(), false));
  must(fill(block.address(), 1, kGranule, stream.get()), "fill");
  must(fence(table_, 0), "fence");
}

TEST_F(HostDriverTest, CapturingStreamsNeitherWaitNorComputeDigests) {
  const Block block(table_, 2 * kGranule, properties_);
  const HostBuffer arrays(table_, 4096);
  const Stream stream(table_);
  const Event event(table_);
  auto* const extent = reinterpret_cast<cumempool_extent*>(arrays.data());
  *extent = {block.address(), 16};
  ASSERT_TRUE(host_driver_set_capturing(&table_, 0, stream.get(), true));
  EXPECT_EQ(CALL(table_, stream_wait_event, 0, stream.get(), event.get()),
            CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(CALL(table_, copy_on_device, 0, block.address(), block.address() + kGranule, kGranule,
                 stream.get()),
            CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(CALL(table_, digest, 0, std::uint64_t{1}, extent, std::size_t{1},
                 reinterpret_cast<cumempool_digest*>(extent + 1), stream.get()),
            CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED);
  ASSERT_TRUE(host_driver_set_capturing(&table_, 0, stream.get(), false));
}

// ---- several devices ------------------------------------------------------------------------

// Device 1 with a stream and an event; its context is entered by whoever uses them.
class TwoHostDevicesTest : public HostDriverTest {
 protected:
  TwoHostDevicesTest() {
    must(CALL(table_, context_retain, 1), "context_retain");
    const Inside other(table_, 1);
    must(CALL(table_, stream_create, 1, &stream_), "stream_create");
    must(CALL(table_, event_create, 1, &event_), "event_create");
  }

  cumempool_memory_properties elsewhere_{1, 0, 0, 0};
  cumempool_stream stream_ = 0;
  cumempool_event event_ = 0;
};

TEST_F(TwoHostDevicesTest, C8_ACopyNeedsAccessOnBothSides) {
  const Block here(table_, kGranule, properties_);
  const Block there(table_, kGranule, elsewhere_);
  const auto copy = [&](cumempool_address to, cumempool_address from) {
    return CALL(table_, copy_on_device, 0, to, from, kGranule, kLegacyStream);
  };
  EXPECT_EQ(copy(here.address(), there.address()), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(copy(there.address(), here.address()), CUMEMPOOL_RESULT_INVALID_VALUE);
  const int first = 0;
  must(CALL(table_, set_access, there.address(), kGranule, &first, std::size_t{1}, kReadWrite),
       "set_access");
  must(copy(here.address(), there.address()), "copy_on_device");
  must(fence(table_, 0), "fence");
}

TEST_F(TwoHostDevicesTest, C8_ADigestNeedsAccessOfItsDevice) {
  const Block there(table_, kGranule, elsewhere_);
  const HostBuffer arrays(table_, 4096);
  auto* const extent = reinterpret_cast<cumempool_extent*>(arrays.data());
  *extent = {there.address(), 16};
  EXPECT_EQ(CALL(table_, digest, 0, std::uint64_t{1}, extent, std::size_t{1},
                 reinterpret_cast<cumempool_digest*>(extent + 1), kLegacyStream),
            CUMEMPOOL_RESULT_INVALID_VALUE);
}

TEST_F(TwoHostDevicesTest, C10_ADeviceThatFailsKeepsTheFenceFromNoOther) {
  const Range range(table_, kGranule);
  map_at(table_, range.address(), kGranule, create(kGranule));
  const Block there(table_, kGranule, elsewhere_);
  must(fill(range.address(), 1), "fill");
  {
    const Inside other(table_, 1);
    must(CALL(table_, fill, 1, there.address(), std::uint8_t{1}, kGranule, stream_), "fill");
  }
  must(CALL(table_, unmap, range.address(), kGranule), "unmap");
  const std::array<int, 2> both{0, 1};
  EXPECT_EQ(CALL(table_, fence, both.data(), both.size()), kIllegalAddress);
  EXPECT_EQ(first_byte(there), 1) << "waited for all the same";
}

TEST_F(TwoHostDevicesTest, C10_AFenceOfADeviceThatDoesNotExistWaitsForNone) {
  const Block block(table_, kGranule, properties_);
  must(fill(block.address(), 1), "fill");
  const std::array<int, 2> devices{0, 2};
  EXPECT_EQ(CALL(table_, fence, devices.data(), devices.size()), CUMEMPOOL_RESULT_INVALID_DEVICE);
  EXPECT_NE(first_byte(block), 1);
  EXPECT_EQ(CALL(table_, fence, nullptr, std::size_t{1}), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, fence, nullptr, std::size_t{0}), CUMEMPOOL_RESULT_SUCCESS);
  must(fence(table_, 0), "fence");
}

TEST_F(TwoHostDevicesTest, DevicesWithoutALinkDoNotReachEachOther) {
  int possible = 0;
  must(CALL(table_, peer_access, 0, 1, &possible), "peer_access");
  EXPECT_EQ(possible, 1);
  host_driver_set_peer_access(&table_, false);
  must(CALL(table_, peer_access, 0, 1, &possible), "peer_access");
  EXPECT_EQ(possible, 0);
  must(CALL(table_, peer_access, 1, 1, &possible), "peer_access");
  EXPECT_EQ(possible, 1);
  const Block here(table_, kGranule, properties_);
  const std::array<int, 2> both{0, 1};
  EXPECT_EQ(
      CALL(table_, set_access, here.address(), kGranule, both.data(), both.size(), kReadWrite),
      CUMEMPOOL_RESULT_INVALID_DEVICE);
}

TEST_F(TwoHostDevicesTest, EventsOfAnotherDeviceAreWaitedForButNotAskedAbout) {
  const Block there(table_, kGranule, elsewhere_);
  const Stream stream(table_);
  {
    const Inside other(table_, 1);
    must(CALL(table_, fill, 1, there.address(), std::uint8_t{1}, kGranule, stream_), "fill");
    must(CALL(table_, event_record, 1, event_, stream_), "event_record");
  }
  EXPECT_EQ(CALL(table_, event_query, 0, event_), CUMEMPOOL_RESULT_INVALID_HANDLE);
  must(CALL(table_, stream_wait_event, 0, stream.get(), event_), "stream_wait_event");
  EXPECT_NE(first_byte(there), 1);
  must(fence(table_, 0), "fence");
  EXPECT_EQ(first_byte(there), 1) << "the fence of one device ran what its work waits for";
  EXPECT_EQ(CALL(table_, stream_wait_event, 0, stream.get(), cumempool_event{1}),
            CUMEMPOOL_RESULT_INVALID_HANDLE);
}

TEST_F(TwoHostDevicesTest, C11_WorkThatWaitsForABrokenDeviceBreaksToo) {
  const Range range(table_, kGranule);
  const cumempool_physical physical = create(kGranule);
  const int second = 1;
  must(CALL(table_, map, range.address(), kGranule, physical), "map");
  must(CALL(table_, set_access, range.address(), kGranule, &second, std::size_t{1}, kReadWrite),
       "set_access");
  cumempool_stream stream = 0;
  must(CALL(table_, stream_create, 0, &stream), "stream_create");
  {
    const Inside other(table_, 1);
    must(CALL(table_, fill, 1, range.address(), std::uint8_t{1}, kGranule, stream_), "fill");
    must(CALL(table_, event_record, 1, event_, stream_), "event_record");
  }
  must(CALL(table_, stream_wait_event, 0, stream, event_), "stream_wait_event");
  must(CALL(table_, unmap, range.address(), kGranule), "unmap");
  EXPECT_EQ(CALL(table_, stream_synchronize, 0, stream), kIllegalAddress);
  EXPECT_EQ(fence(table_, 0), kIllegalAddress);
  const Inside other(table_, 1);
  EXPECT_EQ(fence(table_, 1), kIllegalAddress);
}

TEST_F(TwoHostDevicesTest, DriverPassesWorkOnAndSaysWhetherAnEventIsDone) {
  const Driver driver(table_);
  const Block here(table_, kGranule, properties_);
  const Block there(table_, kGranule, elsewhere_);
  const HostBuffer arrays(table_, 4096);
  const Stream stream(table_);
  const Event event(table_);
  EXPECT_TRUE(driver.peer_access(0, 1));
  driver.set_access(there.address(), kGranule, std::vector<int>{1, 0});
  driver.fill(0, there.address(), std::uint8_t{6}, kGranule, kLegacyStream);
  driver.event_record(0, event.get(), kLegacyStream);
  EXPECT_FALSE(driver.event_query(0, event.get()));
  EXPECT_TRUE(driver.event_query(0, event.get()));
  driver.stream_wait_event(0, stream.get(), event.get());
  driver.copy_on_device(0, here.address(), there.address(), kGranule, stream.get());
  auto* const extent = reinterpret_cast<cumempool_extent*>(arrays.data());
  auto* const result = reinterpret_cast<cumempool_digest*>(extent + 1);
  *extent = {here.address(), kGranule};
  driver.digest(0, std::uint64_t{1}, extent, std::size_t{1}, result, stream.get());
  driver.stream_synchronize(0, stream.get());
  const std::vector<std::byte> sixes(kGranule, std::byte{6});
  EXPECT_EQ(*result, digest_on_cpu(1, sixes.data(), sixes.size()));
  EXPECT_THROW(driver.set_access(there.address(), kGranule, std::vector<int>{}), Error);
  EXPECT_THROW(driver.event_query(0, cumempool_event{1}), Error);
}

// Two devices that hand a block to and fro, each waited for by a thread of its own: neither thread
// may wait for the other for ever.
TEST_F(TwoHostDevicesTest, C2_DevicesThatWaitForEachOtherComeToAnEnd) {
  constexpr int rounds = 200;
  const Block block(table_, kGranule, properties_);
  const std::array<int, 2> both{0, 1};
  must(CALL(table_, set_access, block.address(), kGranule, both.data(), both.size(), kReadWrite),
       "set_access");
  const Stream stream(table_);
  const Event event(table_);
  for (int round = 0; round < rounds; ++round) {
    const auto byte = static_cast<std::uint8_t>(round);
    must(fill(block.address(), byte, kGranule, stream.get()), "fill");
    must(CALL(table_, event_record, 0, event.get(), stream.get()), "event_record");
    {
      const Inside other(table_, 1);
      must(CALL(table_, stream_wait_event, 1, stream_, event.get()), "stream_wait_event");
      must(CALL(table_, fill, 1, block.address(), byte, kGranule, stream_), "fill");
      must(CALL(table_, event_record, 1, event_, stream_), "event_record");
    }
    must(CALL(table_, stream_wait_event, 0, stream.get(), event_), "stream_wait_event");
  }
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, device = i % 2] {
      try {
        const Inside inside(table_, device);
        EXPECT_EQ(fence(table_, device), CUMEMPOOL_RESULT_SUCCESS);
      } catch (const std::runtime_error& error) {
        ADD_FAILURE() << error.what();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(host_driver_counters(&table_).queued_commands, 0u);
  EXPECT_EQ(first_byte(block), rounds - 1);
}

// ---- work into memory that is gone ----------------------------------------------------------

TEST_F(HostDriverTest, C9_DeviceSideLiesInMappedMemory) {
  const Range nothing_mapped(table_, kGranule);
  EXPECT_EQ(fill(nothing_mapped.address(), 1), CUMEMPOOL_RESULT_INVALID_VALUE);
  const Block block(table_, kGranule, properties_);
  EXPECT_EQ(fill(block.address() + 1, 1), CUMEMPOOL_RESULT_INVALID_VALUE) << "one byte too far";
  EXPECT_EQ(fence(table_, 0), CUMEMPOOL_RESULT_SUCCESS) << "refused, not submitted";
}

TEST_F(HostDriverTest, C11_WorkIntoUnmappedMemoryBreaksTheDevice) {
  const Range range(table_, kGranule);
  const cumempool_physical physical = create(kGranule);
  map_at(table_, range.address(), kGranule, physical);
  must(fill(range.address(), 1), "fill");
  must(CALL(table_, unmap, range.address(), kGranule), "unmap");
  EXPECT_EQ(CALL(table_, stream_synchronize, 0, kLegacyStream), kIllegalAddress);

  std::uint64_t free = 0;
  std::uint64_t total = 0;
  cumempool_physical another = 0;
  cumempool_stream stream = 0;
  EXPECT_EQ(fence(table_, 0), kIllegalAddress) << "it sticks";
  EXPECT_EQ(CALL(table_, memory_info, 0, &free, &total), kIllegalAddress);
  EXPECT_EQ(CALL(table_, stream_create, 0, &stream), kIllegalAddress);
  EXPECT_EQ(CALL(table_, create, kGranule, &properties_, &another), kIllegalAddress);
  must(CALL(table_, context_retain, 1), "context_retain");
  {
    const Inside other(table_, 1);
    EXPECT_EQ(fence(table_, 1), CUMEMPOOL_RESULT_SUCCESS) << "other devices go on";
  }
  must(CALL(table_, context_release, 0), "context_release");
  must(CALL(table_, context_retain, 0), "context_retain");
  EXPECT_EQ(fence(table_, 0), CUMEMPOOL_RESULT_SUCCESS) << "a new context";
}

TEST_F(HostDriverTest, C11_WorkIntoMemoryThatWasMappedAgainBreaksTheDevice) {
  const Range range(table_, kGranule);
  const cumempool_physical physical = create(kGranule);
  map_at(table_, range.address(), kGranule, physical);
  must(fill(range.address(), 1), "fill");
  must(CALL(table_, unmap, range.address(), kGranule), "unmap");
  map_at(table_, range.address(), kGranule, physical);
  EXPECT_EQ(fence(table_, 0), kIllegalAddress);
  must(CALL(table_, unmap, range.address(), kGranule), "unmap");
}

TEST_F(HostDriverTest, C9_HostMemoryThatIsGoneBreaksTheDeviceNotTheProcess) {
  const Block block(table_, kGranule, properties_);
  void* pages = mmap(nullptr, kGranule, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  must(CALL(table_, host_register, 0, pages, kGranule), "host_register");
  must(CALL(table_, copy_to_host, 0, pages, block.address(), kGranule, kLegacyStream), "copy");
  munmap(pages, kGranule);
  EXPECT_EQ(fence(table_, 0), kIllegalAddress);
}

TEST_F(HostDriverTest, C11_ADigestOfUnmappedMemoryBreaksTheDevice) {
  const Range range(table_, kGranule);
  const cumempool_physical physical = create(kGranule);
  map_at(table_, range.address(), kGranule, physical);
  const HostBuffer arrays(table_, 4096);
  auto* const extent = reinterpret_cast<cumempool_extent*>(arrays.data());
  auto* const result = reinterpret_cast<cumempool_digest*>(extent + 1);
  *extent = {range.address(), kGranule};
  must(CALL(table_, digest, 0, std::uint64_t{1}, extent, std::size_t{1}, result, kLegacyStream),
       "digest");
  must(CALL(table_, unmap, range.address(), kGranule), "unmap");
  EXPECT_EQ(fence(table_, 0), kIllegalAddress);
  EXPECT_EQ(*result, cumempool_digest{});
  must(CALL(table_, context_release, 0), "context_release");
  must(CALL(table_, context_retain, 0), "context_retain");  // for the owners above
}

TEST_F(HostDriverTest, C9_ADigestWhoseArraysAreGoneBreaksTheDeviceNotTheProcess) {
  const Block block(table_, kGranule, properties_);
  void* pages = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  must(CALL(table_, host_register, 0, pages, std::size_t{4096}), "host_register");
  auto* const extent = static_cast<cumempool_extent*>(pages);
  *extent = {block.address(), kGranule};
  must(CALL(table_, digest, 0, std::uint64_t{1}, extent, std::size_t{1},
            reinterpret_cast<cumempool_digest*>(extent + 1), kLegacyStream),
       "digest");
  munmap(pages, 4096);
  EXPECT_EQ(fence(table_, 0), kIllegalAddress);
}

// ---- what the system refuses ----------------------------------------------------------------

// The process can open nothing more for as long as it lives.
class NoMoreDescriptors {
 public:
  NoMoreDescriptors() {
    getrlimit(RLIMIT_NOFILE, &before_);
    const int next = open("/dev/null", O_RDONLY | O_CLOEXEC);
    close(next);
    const rlimit limit{static_cast<rlim_t>(next), before_.rlim_max};
    EXPECT_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
  }
  ~NoMoreDescriptors() { setrlimit(RLIMIT_NOFILE, &before_); }
  NoMoreDescriptors(const NoMoreDescriptors&) = delete;
  NoMoreDescriptors(NoMoreDescriptors&&) = delete;
  NoMoreDescriptors& operator=(const NoMoreDescriptors&) = delete;
  NoMoreDescriptors& operator=(NoMoreDescriptors&&) = delete;

 private:
  rlimit before_{};
};

TEST_F(HostDriverTest, C12_WhatTheSystemRefusesIsNotCharged) {
  const cumempool_physical physical = create(kGranule);
  int exported = -1;
  must(CALL(table_, export_handle, physical, CUMEMPOOL_HANDLE_POSIX_FD, &exported), "export");
  const std::uint64_t free = free_bytes();
  {
    const NoMoreDescriptors limit;
    constexpr auto kRefused = CUMEMPOOL_RESULT_OPERATING_SYSTEM;
    cumempool_physical made = 0;
    cumempool_address address = 0;
    int descriptor = -1;
    EXPECT_EQ(CALL(table_, create, kGranule, &properties_, &made), kRefused);
    EXPECT_EQ(CALL(table_, allocate, 0, kGranule, &address), kRefused);
    EXPECT_EQ(CALL(table_, export_handle, physical, CUMEMPOOL_HANDLE_POSIX_FD, &descriptor),
              kRefused);
    EXPECT_EQ(made + address, 0U);
    EXPECT_EQ(descriptor, -1);
  }
  EXPECT_EQ(free_bytes(), free);
  EXPECT_EQ(host_driver_counters(&table_).handles, 1U);
  must(CALL(table_, release, physical), "release");
  close(exported);
  must(CALL(table_, release, create(kBudget)), "release");
}

TEST_F(HostDriverTest, C12_ADeviceLargerThanTheSystemHasIsOutOfMemoryWhenItIsUsed) {
  cumempool_address address = 0;
  EXPECT_EQ(CALL(table_, reserve, std::size_t{1} << 56, &address), CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  EXPECT_EQ(address, 0U);
  EXPECT_EQ(host_driver_counters(&table_).reserved_bytes, 0U);
}

// ---- bad pointers ---------------------------------------------------------------------------

TEST_F(HostDriverTest, NullOutputsAreErrors) {
  EXPECT_EQ(CALL(table_, device_count, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, reserve, kGranule, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, create, kGranule, &properties_, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, create, kGranule, nullptr, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, stream_create, 0, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, context_enter, 0, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, context_leave, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, host_register, 0, nullptr, kGranule), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, peer_access, 0, 1, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, granularity, &properties_, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, allocate, 0, kGranule, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, event_create, 0, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, driver_version, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  std::uint64_t bytes = 0;
  EXPECT_EQ(CALL(table_, memory_info, 0, nullptr, &bytes), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, memory_info, 0, &bytes, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, stream_is_capturing, 0, kLegacyStream, nullptr),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  const cumempool_physical physical = create(kGranule);
  EXPECT_EQ(CALL(table_, export_handle, physical, CUMEMPOOL_HANDLE_POSIX_FD, nullptr),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  int descriptor = -1;
  cumempool_physical imported = 0;
  EXPECT_EQ(CALL(table_, import_handle, nullptr, CUMEMPOOL_HANDLE_POSIX_FD, &imported),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, import_handle, &descriptor, CUMEMPOOL_HANDLE_POSIX_FD, nullptr),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, release, physical), CUMEMPOOL_RESULT_SUCCESS);
}

}  // namespace
}  // namespace cumempool::driver
