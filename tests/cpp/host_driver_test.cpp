// What the host driver promises beyond the contract: exact result codes for misuse, work that never
// runs before somebody waits, errors that stick, and a budget that adds up.
#include "driver/host_driver.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <thread>

#include "conformance_fixture.hpp"
#include "driver/builtin.hpp"
#include "driver/error.hpp"

namespace cumempool::driver {
namespace {

using conformance::Block;
using conformance::Event;
using conformance::HostBuffer;
using conformance::Inside;
using conformance::map_at;
using conformance::must;
using conformance::Range;
using conformance::Stream;

constexpr std::size_t kGranule = 64u << 10;
constexpr std::size_t kBudget = 16 * kGranule;
constexpr cumempool_stream kLegacyStream = 0;

cumempool_host_driver_options good_options() {
  return {
      sizeof(cumempool_host_driver_options), 2, kBudget, kGranule, CUMEMPOOL_HANDLE_POSIX_FD, 0};
}

class HostDriverTest : public ::testing::Test {
 protected:
  HostDriverTest() : table_(*make_host_driver(good_options())) {
    must(table_.init(table_.self), "init");
    must(CALL(table_, context_retain, 0), "context_retain");
    must(CALL(table_, context_enter, 0, &token_), "context_enter");
  }
  void TearDown() override { destroy_host_driver(&table_); }

  cumempool_physical create(std::size_t bytes) {
    cumempool_physical physical = 0;
    must(CALL(table_, create, bytes, &properties_, &physical), "create");
    return physical;
  }

  std::uint64_t free_bytes() {
    std::uint64_t free = 0;
    std::uint64_t total = 0;
    must(CALL(table_, memory_info, 0, &free, &total), "memory_info");
    EXPECT_EQ(total, kBudget);
    return free;
  }

  cumempool_result fill(cumempool_address address, std::uint8_t byte, std::size_t bytes = kGranule,
                        cumempool_stream stream = kLegacyStream) {
    return CALL(table_, fill, 0, address, byte, bytes, stream);
  }

  static std::uint8_t first_byte(const Block& block) {
    return *reinterpret_cast<const std::uint8_t*>(block.address());  // NOLINT
  }

  const cumempool_driver& table_;
  cumempool_memory_properties properties_{0, CUMEMPOOL_HANDLE_POSIX_FD, 0, 0};
  cumempool_context_token token_{};
};

// ---- options
// --------------------------------------------------------------------------------------

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
  EXPECT_EQ(has(with([](auto& o) { o.handle_types = CUMEMPOOL_HANDLE_FABRIC; }), "handle_types"),
            "");
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

// ---- the budget
// -----------------------------------------------------------------------------------

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
  EXPECT_EQ(held.charged_bytes, 2 * kGranule);
  EXPECT_EQ(held.registrations, 1u);
  EXPECT_EQ(held.registered_bytes, kGranule);
  EXPECT_EQ(held.streams, 1u);
  EXPECT_EQ(held.events, 1u);
  EXPECT_EQ(held.queued_commands, 1u);
  EXPECT_EQ(held.retained_contexts, 1u);
  EXPECT_EQ(held.entered_contexts, 1u);
}

// ---- misuse of memory
// -----------------------------------------------------------------------------

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
  EXPECT_EQ(CALL(table_, set_access, address, kGranule, &device, std::size_t{1}),
            CUMEMPOOL_RESULT_NOT_MAPPED);
  EXPECT_EQ(CALL(table_, unmap, address, 2 * kGranule), CUMEMPOOL_RESULT_NOT_MAPPED);
  must(CALL(table_, map, address, 2 * kGranule, physical), "map");
  EXPECT_EQ(CALL(table_, map, address + kGranule, 2 * kGranule, physical),
            CUMEMPOOL_RESULT_ALREADY_MAPPED);
  EXPECT_EQ(CALL(table_, unreserve, address, 4 * kGranule), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, unmap, address, kGranule), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, set_access, address, kGranule, &device, std::size_t{1}),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, set_access, address, 4 * kGranule, &device, std::size_t{1}),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, set_access, address, 2 * kGranule, &device, std::size_t{0}),
            CUMEMPOOL_RESULT_INVALID_VALUE);
  const int nobody = 2;
  EXPECT_EQ(CALL(table_, set_access, address, 2 * kGranule, &nobody, std::size_t{1}),
            CUMEMPOOL_RESULT_INVALID_DEVICE);
  EXPECT_EQ(fill(address, 1), CUMEMPOOL_RESULT_INVALID_VALUE) << "mapped without access";
  const int peer = 1;
  must(CALL(table_, set_access, address, 2 * kGranule, &peer, std::size_t{1}), "set_access");
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

// ---- contexts
// -------------------------------------------------------------------------------------

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
  EXPECT_EQ(CALL(table_, fence, 0), CUMEMPOOL_RESULT_INVALID_CONTEXT);
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

// ---- deferred work
// --------------------------------------------------------------------------------

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
  must(CALL(table_, fence, 0), "fence");
  EXPECT_EQ(first_byte(block), 2);
}

TEST_F(HostDriverTest, C10_FenceIsForOneDevice) {
  const Block block(table_, kGranule, properties_);
  must(fill(block.address(), 1), "fill");
  must(CALL(table_, context_retain, 1), "context_retain");
  {
    const Inside other(table_, 1);
    must(CALL(table_, fence, 1), "fence");
    EXPECT_NE(first_byte(block), 1);
  }
  must(CALL(table_, fence, 0), "fence");
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
  must(CALL(table_, fence, 0), "fence");
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
  EXPECT_EQ(CALL(table_, fence, 0), CUMEMPOOL_RESULT_SUCCESS) << "C4";
  ASSERT_TRUE(host_driver_set_capturing(&table_, 0, stream.get(), false));
  must(fill(block.address(), 1, kGranule, stream.get()), "fill");
  must(CALL(table_, fence, 0), "fence");
}

// ---- work into memory that is gone
// ----------------------------------------------------------------

TEST_F(HostDriverTest, C9_DeviceSideLiesInMappedMemory) {
  const Range nothing_mapped(table_, kGranule);
  EXPECT_EQ(fill(nothing_mapped.address(), 1), CUMEMPOOL_RESULT_INVALID_VALUE);
  const Block block(table_, kGranule, properties_);
  EXPECT_EQ(fill(block.address() + 1, 1), CUMEMPOOL_RESULT_INVALID_VALUE) << "one byte too far";
  EXPECT_EQ(CALL(table_, fence, 0), CUMEMPOOL_RESULT_SUCCESS) << "refused, not submitted";
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
  EXPECT_EQ(CALL(table_, fence, 0), kIllegalAddress) << "it sticks";
  EXPECT_EQ(CALL(table_, memory_info, 0, &free, &total), kIllegalAddress);
  EXPECT_EQ(CALL(table_, stream_create, 0, &stream), kIllegalAddress);
  EXPECT_EQ(CALL(table_, create, kGranule, &properties_, &another), kIllegalAddress);
  must(CALL(table_, context_retain, 1), "context_retain");
  {
    const Inside other(table_, 1);
    EXPECT_EQ(CALL(table_, fence, 1), CUMEMPOOL_RESULT_SUCCESS) << "other devices go on";
  }
  must(CALL(table_, context_release, 0), "context_release");
  must(CALL(table_, context_retain, 0), "context_retain");
  EXPECT_EQ(CALL(table_, fence, 0), CUMEMPOOL_RESULT_SUCCESS) << "a new context";
}

TEST_F(HostDriverTest, C11_WorkIntoMemoryThatWasMappedAgainBreaksTheDevice) {
  const Range range(table_, kGranule);
  const cumempool_physical physical = create(kGranule);
  map_at(table_, range.address(), kGranule, physical);
  must(fill(range.address(), 1), "fill");
  must(CALL(table_, unmap, range.address(), kGranule), "unmap");
  map_at(table_, range.address(), kGranule, physical);
  EXPECT_EQ(CALL(table_, fence, 0), kIllegalAddress);
  must(CALL(table_, unmap, range.address(), kGranule), "unmap");
}

TEST_F(HostDriverTest, C9_HostMemoryThatIsGoneBreaksTheDeviceNotTheProcess) {
  const Block block(table_, kGranule, properties_);
  void* pages = mmap(nullptr, kGranule, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  must(CALL(table_, host_register, 0, pages, kGranule), "host_register");
  must(CALL(table_, copy_to_host, 0, pages, block.address(), kGranule, kLegacyStream), "copy");
  munmap(pages, kGranule);
  EXPECT_EQ(CALL(table_, fence, 0), kIllegalAddress);
}

// ---- bad pointers
// ---------------------------------------------------------------------------------

TEST_F(HostDriverTest, NullOutputsAreErrors) {
  EXPECT_EQ(CALL(table_, device_count, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, reserve, kGranule, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, create, kGranule, &properties_, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, create, kGranule, nullptr, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, stream_create, 0, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, context_enter, 0, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, context_leave, nullptr), CUMEMPOOL_RESULT_INVALID_VALUE);
  EXPECT_EQ(CALL(table_, host_register, 0, nullptr, kGranule), CUMEMPOOL_RESULT_INVALID_VALUE);
}

}  // namespace
}  // namespace cumempool::driver
