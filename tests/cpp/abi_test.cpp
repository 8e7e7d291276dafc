// The C interface itself: arguments it refuses, outputs it leaves alone, and the error each thread
// sees.
#include <array>
#include <atomic>
#include <cstring>
#include <limits>
#include <string>
#include <thread>

#include "host_fixture.hpp"

namespace cumempool::tests {
namespace {

constexpr cumempool_on_sleep kNoSuchAction = static_cast<cumempool_on_sleep>(3);

class Abi : public ::testing::Test {
 protected:
  static std::string message() { return cumempool_last_error()->message; }

  Host host;
  Pool pool{host};
};

TEST(AbiText, VersionAndResultNames) {
  EXPECT_STREQ(cumempool_version(), "0.1.0");
  EXPECT_STREQ(cumempool_result_name(0), "CUDA_SUCCESS");
  EXPECT_STREQ(cumempool_result_name(2), "CUDA_ERROR_OUT_OF_MEMORY");
  EXPECT_STREQ(cumempool_result_name(-1), "CUDA_ERROR_UNRECOGNIZED");
  EXPECT_STREQ(cumempool_result_name(123456), "CUDA_ERROR_UNRECOGNIZED");
}

TEST(AbiText, AThreadThatNeverFailedHasAnEmptyError) {
  std::thread([] {
    const cumempool_error* error = cumempool_last_error();
    ASSERT_NE(error, nullptr);
    EXPECT_EQ(error->status, CUMEMPOOL_OK);
    for (const char* text : {error->message, error->operation, error->tag, error->driver_call,
                             error->result_name, error->advice}) {
      EXPECT_STREQ(text, "");
    }
    EXPECT_EQ(error->device, -1);
    EXPECT_EQ(error->secondary_count, 0U);
  }).join();
}

TEST_F(Abi, R12_EachThreadSeesItsOwnLastErrorUntilItsNextFailure) {
  EXPECT_EQ(pool.sleep("nothing", kOffload).status, CUMEMPOOL_UNKNOWN_TAG);
  std::thread([&] {
    EXPECT_EQ(cumempool_last_error()->status, CUMEMPOOL_OK);
    EXPECT_EQ(cumempool_free(5), CUMEMPOOL_NOT_OWNED);
    EXPECT_EQ(cumempool_last_error()->status, CUMEMPOOL_NOT_OWNED);
  }).join();
  EXPECT_EQ(cumempool_last_error()->status, CUMEMPOOL_UNKNOWN_TAG);
  must(cumempool_free(pool.malloc("weights", 1)));
  EXPECT_EQ(cumempool_last_error()->status, CUMEMPOOL_UNKNOWN_TAG) << "success leaves it alone";
  EXPECT_STREQ(cumempool_last_error()->tag, "nothing");
}

TEST_F(Abi, R12_AFailedMallocTellsEverything) {
  pool.malloc("kv", kGranule);
  cumempool_address address = 3;
  ASSERT_EQ(pool.try_malloc("kv", kDeviceGranules * kGranule, 0, address), CUMEMPOOL_OUT_OF_MEMORY);
  EXPECT_EQ(address, 3U);
  const cumempool_error* error = cumempool_last_error();
  EXPECT_EQ(error->status, CUMEMPOOL_OUT_OF_MEMORY);
  EXPECT_STREQ(error->operation, "malloc");
  EXPECT_STREQ(error->tag, "kv");
  EXPECT_EQ(error->device, 0);
  EXPECT_EQ(error->bytes, kDeviceGranules * kGranule);
  EXPECT_STREQ(error->driver_call, "host.create");
  EXPECT_EQ(error->result, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  EXPECT_STREQ(error->result_name, "CUDA_ERROR_OUT_OF_MEMORY");
  EXPECT_EQ(error->free_bytes, (kDeviceGranules - 1) * kGranule);
  EXPECT_EQ(error->total_bytes, kDeviceGranules * kGranule);
  EXPECT_STRNE(error->advice, "");
  for (const char* part :
       {"malloc", "'kv'", "device 0", "4.00 MiB", "host.create", "CUDA_ERROR_OUT_OF_MEMORY"}) {
    EXPECT_NE(message().find(part), std::string::npos) << part << " is not in: " << message();
  }
}

TEST_F(Abi, SizesThatCannotBeAreInvalidAndTooLargeOnesOutOfMemory) {
  pool.declare("kv");
  cumempool_address address = 0;
  for (const std::size_t bytes : {std::size_t{0}, (std::size_t{1} << 62) + 1, SIZE_MAX}) {
    EXPECT_EQ(pool.try_malloc("kv", bytes, 0, address), CUMEMPOOL_INVALID_ARGUMENT) << bytes;
  }
  EXPECT_EQ(pool.try_malloc("kv", std::size_t{1} << 62, 0, address), CUMEMPOOL_OUT_OF_MEMORY);
  EXPECT_EQ(pool.try_malloc("kv", std::size_t{1} << 45, 0, address), CUMEMPOOL_OUT_OF_MEMORY);
  for (const int device : {-1, 2, INT32_MAX, INT32_MIN}) {
    EXPECT_EQ(pool.try_malloc("kv", 1, device, address), CUMEMPOOL_INVALID_ARGUMENT) << device;
    EXPECT_EQ(cumempool_last_error()->device, device);
  }
  EXPECT_EQ(address, 0U);
  EXPECT_EQ(host.counters().reserved_bytes, 0U);
  const auto totals = pool.snapshot().totals;
  EXPECT_EQ(totals.malloc_failures, 9U);
  EXPECT_EQ(totals.malloc_calls, 9U);
}

TEST_F(Abi, NullArgumentsAreInvalid) {
  constexpr auto kInvalid = CUMEMPOOL_INVALID_ARGUMENT;
  pool.declare("kv");
  cumempool_address address = 0;
  std::uint32_t slot = 0;
  std::uint64_t bytes = 0;
  cumempool_report* report = nullptr;
  cumempool_snapshot* snapshot = nullptr;
  cumempool_sleep_request request{};
  request.size = sizeof request;
  EXPECT_EQ(cumempool_allocator_close(nullptr, 0), kInvalid);
  EXPECT_EQ(cumempool_allocator_closed(nullptr), 0);
  EXPECT_EQ(cumempool_declare_tag(nullptr, "a", kOffload, CUMEMPOOL_ON_WAKE_UNSET), kInvalid);
  EXPECT_EQ(cumempool_declare_tag(pool.get(), nullptr, kOffload, CUMEMPOOL_ON_WAKE_UNSET),
            kInvalid);
  EXPECT_EQ(cumempool_malloc(nullptr, "kv", 0, 1, &address), kInvalid);
  EXPECT_EQ(cumempool_malloc(pool.get(), nullptr, 0, 1, &address), kInvalid);
  EXPECT_EQ(cumempool_malloc(pool.get(), "kv", 0, 1, nullptr), kInvalid);
  EXPECT_EQ(cumempool_bind_slot(nullptr, "kv", &slot), kInvalid);
  EXPECT_EQ(cumempool_bind_slot(pool.get(), nullptr, &slot), kInvalid);
  EXPECT_EQ(cumempool_bind_slot(pool.get(), "kv", nullptr), kInvalid);
  EXPECT_EQ(cumempool_bind_lasting_slot(pool.get(), "kv", nullptr), kInvalid);
  EXPECT_EQ(cumempool_moment(nullptr, nullptr), kInvalid);
  EXPECT_EQ(cumempool_moment(pool.get(), nullptr), kInvalid);
  EXPECT_EQ(cumempool_sleep(nullptr, &request, &report), kInvalid);
  EXPECT_EQ(cumempool_sleep(pool.get(), nullptr, &report), kInvalid);
  EXPECT_EQ(cumempool_sleep(pool.get(), &request, nullptr), kInvalid);
  EXPECT_EQ(cumempool_wake(nullptr, nullptr, 0, nullptr, 0, &report), kInvalid);
  EXPECT_EQ(cumempool_wake(pool.get(), nullptr, 0, nullptr, 0, nullptr), kInvalid);
  EXPECT_EQ(cumempool_wake(pool.get(), nullptr, 0, nullptr, 1, &report), kInvalid);
  const char* const no_tag[] = {nullptr};
  EXPECT_EQ(cumempool_wake(pool.get(), no_tag, 1, nullptr, 0, &report), kInvalid);
  EXPECT_EQ(cumempool_release_host_memory(nullptr, &bytes), kInvalid);
  EXPECT_EQ(cumempool_release_host_memory(pool.get(), nullptr), kInvalid);
  EXPECT_EQ(cumempool_find(pool.get(), 1, nullptr), kInvalid);
  EXPECT_EQ(cumempool_take_snapshot(nullptr, 0, &snapshot), kInvalid);
  EXPECT_EQ(cumempool_take_snapshot(pool.get(), 0, nullptr), kInvalid);
  EXPECT_EQ(report, nullptr);
  EXPECT_EQ(snapshot, nullptr);
  cumempool_allocator_destroy(nullptr);
  cumempool_report_destroy(nullptr);
  cumempool_snapshot_destroy(nullptr);
  cumempool_host_driver_destroy(nullptr);
}

TEST_F(Abi, ArgumentsOfPoliciesPinsAndSharingThatAreMissingAreInvalid) {
  constexpr auto kInvalid = CUMEMPOOL_INVALID_ARGUMENT;
  constexpr auto kFd = CUMEMPOOL_HANDLE_POSIX_FD;
  constexpr auto kAccess = CUMEMPOOL_ACCESS_READ_WRITE;
  const cumempool_address address = pool.malloc("kv", 1);
  cumempool_memory_policy policy = memory_of(CUMEMPOOL_BACKING_VMM, {}, false);
  EXPECT_EQ(cumempool_set_memory(nullptr, "kv", &policy), kInvalid);
  EXPECT_EQ(cumempool_set_memory(pool.get(), nullptr, &policy), kInvalid);
  EXPECT_EQ(cumempool_set_memory(pool.get(), "kv", nullptr), kInvalid);
  policy.peers = nullptr;
  policy.peer_count = 1;
  EXPECT_EQ(cumempool_set_memory(pool.get(), "kv", &policy), kInvalid);
  policy.peer_count = 0;
  policy.size -= 8;
  EXPECT_EQ(cumempool_set_memory(pool.get(), "kv", &policy), kInvalid);
  std::uint64_t pin = 9;
  EXPECT_EQ(cumempool_pin(nullptr, "kv", "nixl", &pin), kInvalid);
  EXPECT_EQ(cumempool_pin(pool.get(), nullptr, "nixl", &pin), kInvalid);
  EXPECT_EQ(cumempool_pin(pool.get(), "kv", nullptr, &pin), kInvalid);
  EXPECT_EQ(cumempool_pin(pool.get(), "kv", "nixl", nullptr), kInvalid);
  EXPECT_EQ(cumempool_unpin(nullptr, 1), kInvalid);
  EXPECT_EQ(pin, 9U);
  EXPECT_EQ(pool.snapshot().tag("kv").pins, 0U);
  int descriptor = -1;
  cumempool_allocation_info info{};
  info.size = sizeof info;
  EXPECT_EQ(cumempool_export(nullptr, address, kFd, &descriptor, &info), kInvalid);
  EXPECT_EQ(cumempool_export(pool.get(), address, kFd, nullptr, &info), kInvalid);
  EXPECT_EQ(cumempool_export(pool.get(), address, kFd, &descriptor, nullptr), kInvalid);
  EXPECT_EQ(descriptor, -1);
  cumempool_shared* shared = nullptr;
  const cumempool_driver* table = &host.table();
  EXPECT_EQ(cumempool_shared_open(nullptr, 0, kFd, &descriptor, 1, kAccess, &shared), kInvalid);
  EXPECT_EQ(cumempool_shared_open(table, 0, kFd, nullptr, 1, kAccess, &shared), kInvalid);
  EXPECT_EQ(cumempool_shared_open(table, 0, kFd, &descriptor, 1, kAccess, nullptr), kInvalid);
  EXPECT_EQ(cumempool_shared_open(table, 0, kFd, &descriptor, 0, kAccess, &shared), kInvalid);
  EXPECT_EQ(cumempool_shared_open(table, 0, kFd, &descriptor, 1, static_cast<cumempool_access>(2),
                                  &shared),
            kInvalid);
  EXPECT_EQ(shared, nullptr);
  EXPECT_EQ(cumempool_shared_close(nullptr), kInvalid);
}

TEST_F(Abi, RequestsThatContradictThemselvesAreInvalid) {
  pool.declare("kv");
  cumempool_report* report = nullptr;
  const auto refused = [&](const cumempool_sleep_request& request) {
    return cumempool_sleep(pool.get(), &request, &report) == CUMEMPOOL_INVALID_ARGUMENT;
  };
  cumempool_sleep_request request{};
  EXPECT_TRUE(refused(request)) << "size 0 is no version";
  request.size = sizeof request;
  request.tag_count = 1;
  EXPECT_TRUE(refused(request)) << "tags is NULL";
  request.tag_count = 0;
  request.dead_count = 1;
  EXPECT_TRUE(refused(request)) << "dead is NULL";
  request.dead_count = 0;
  request.stream_count = 1;
  EXPECT_TRUE(refused(request)) << "streams is NULL";
  request.stream_count = 0;
  cumempool_tag_action action{"kv", kNoSuchAction};
  request.tags = &action;
  request.tag_count = 1;
  EXPECT_TRUE(refused(request)) << "the action is outside its enum";
  action = {nullptr, kOffload};
  EXPECT_TRUE(refused(request)) << "the tag is NULL";
  EXPECT_EQ(report, nullptr);
}

TEST_F(Abi, StructsOfAnotherVersionAreRefused) {
  constexpr auto kInvalid = CUMEMPOOL_INVALID_ARGUMENT;
  cumempool_allocator* allocator = nullptr;
  cumempool_allocator_options options = pool_options();
  options.size -= 8;
  EXPECT_EQ(cumempool_allocator_create(&host.table(), &options, &allocator), kInvalid);
  options.size = sizeof options;
  cumempool_driver table = host.table();
  table.version += 1;
  EXPECT_EQ(cumempool_allocator_create(&table, &options, &allocator), kInvalid);
  table = host.table();
  table.size -= 8;
  EXPECT_EQ(cumempool_allocator_create(&table, &options, &allocator), kInvalid);
  EXPECT_EQ(cumempool_allocator_create(nullptr, &options, &allocator), kInvalid);
  EXPECT_EQ(cumempool_allocator_create(&host.table(), nullptr, &allocator), kInvalid);
  EXPECT_EQ(cumempool_allocator_create(&host.table(), &options, nullptr), kInvalid);
  EXPECT_EQ(allocator, nullptr);
  const cumempool_driver* made = nullptr;
  cumempool_host_driver_options host_options{};
  EXPECT_EQ(cumempool_host_driver_create(&host_options, &made), kInvalid);
  EXPECT_EQ(cumempool_host_driver_create(nullptr, &made), kInvalid);
  EXPECT_EQ(made, nullptr);
}

TEST_F(Abi, R11_ProbingADeviceLeavesNothingBehind) {
  cumempool_device_probe probe{};
  probe.size = sizeof probe;
  must(cumempool_probe_device(&host.table(), 1, &probe));
  EXPECT_EQ(probe.size, sizeof probe);
  EXPECT_EQ(probe.usable, 1) << probe.reason;
  EXPECT_STREQ(probe.reason, "");
  EXPECT_STREQ(probe.name, "cumempool host device 1");
  EXPECT_EQ(probe.virtual_memory, 1);
  EXPECT_EQ(probe.handle_types, static_cast<std::uint32_t>(CUMEMPOOL_HANDLE_POSIX_FD));
  EXPECT_EQ(probe.handle_types_claimed, static_cast<std::uint32_t>(CUMEMPOOL_HANDLE_POSIX_FD));
  EXPECT_EQ(probe.rdma + probe.rdma_claimed, 0);
  EXPECT_EQ(probe.fence, CUMEMPOOL_FENCE_HOST_REGISTRATION);
  EXPECT_EQ(probe.pins_host_memory, 1);
  EXPECT_EQ(probe.granularity, kGranule);
  EXPECT_EQ(probe.free_bytes, kDeviceGranules * kGranule);
  EXPECT_EQ(probe.total_bytes, kDeviceGranules * kGranule);
  host.expect_empty();
  EXPECT_NE(cumempool_probe_device(&host.table(), 2, &probe), CUMEMPOOL_OK);
  probe.size = 4;
  EXPECT_EQ(cumempool_probe_device(&host.table(), 0, &probe), CUMEMPOOL_INVALID_ARGUMENT);
}

// What a probe of a device says whose driver answers some calls in its own way.
cumempool_device_probe probe_of(const cumempool_driver& table) {
  cumempool_device_probe probe{};
  probe.size = sizeof probe;
  must(cumempool_probe_device(&table, 0, &probe));
  return probe;
}

// A host driver some of whose entries a test replaces; the others go on to the real one.
struct Altered {
  explicit Altered(const Host& host) : inner(&host.table()), table(host.table()) {}
  static const cumempool_driver*& real() {
    static const cumempool_driver* driver = nullptr;
    return driver;
  }
  cumempool_driver& alter() {
    real() = inner;
    return table;
  }

  const cumempool_driver* inner;
  cumempool_driver table;
};

TEST_F(Abi, AProbeSaysWhyADeviceCannotBeUsed) {
  Altered old_gpu(host);
  old_gpu.alter().device_attribute = [](void* self, int device, cumempool_device_attribute which,
                                        int* value) {
    const auto result = Altered::real()->device_attribute(self, device, which, value);
    if (which == CUMEMPOOL_ATTRIBUTE_VIRTUAL_MEMORY) *value = 0;
    return result;
  };
  const auto old = probe_of(old_gpu.table);
  EXPECT_EQ(old.usable, 0);
  EXPECT_NE(std::string(old.reason).find("does not support virtual memory"), std::string::npos);
  EXPECT_STREQ(old.name, "cumempool host device 0");

  Altered forgetful(host);
  forgetful.alter().fill = [](void*, int, cumempool_address, std::uint8_t, std::uint64_t,
                              cumempool_stream) -> cumempool_result { return 0; };
  const auto wrong = probe_of(forgetful.table);
  EXPECT_EQ(wrong.usable, 0);
  EXPECT_NE(std::string(wrong.reason).find("differs from the bytes written"), std::string::npos)
      << wrong.reason;

  Altered unpinnable(host);
  unpinnable.alter().host_register = [](void*, int, void*, std::uint64_t) -> cumempool_result {
    return CUMEMPOOL_RESULT_OUT_OF_MEMORY;
  };
  const auto tight = probe_of(unpinnable.table);
  EXPECT_EQ(tight.usable, 0);
  EXPECT_NE(std::string(tight.reason).find("ulimit -l"), std::string::npos) << tight.reason;
  host.expect_empty();
}

TEST_F(Abi, C4_ProbingUsesAStreamOfItsOwn) {
  static int on_the_default_stream;
  on_the_default_stream = 0;
  Altered watched(host);
  watched.alter().fill = [](void* self, int device, cumempool_address to, std::uint8_t byte,
                            std::size_t bytes, cumempool_stream stream) {
    on_the_default_stream += stream == 0 ? 1 : 0;
    return Altered::real()->fill(self, device, to, byte, bytes, stream);
  };
  watched.table.copy_to_host = [](void* self, int device, void* to, cumempool_address from,
                                  std::size_t bytes, cumempool_stream stream) {
    on_the_default_stream += stream == 0 ? 1 : 0;
    return Altered::real()->copy_to_host(self, device, to, from, bytes, stream);
  };
  watched.table.stream_synchronize = [](void* self, int device, cumempool_stream stream) {
    on_the_default_stream += stream == 0 ? 1 : 0;
    return Altered::real()->stream_synchronize(self, device, stream);
  };
  const auto probe = probe_of(watched.table);
  EXPECT_EQ(probe.usable, 1) << probe.reason;
  EXPECT_EQ(on_the_default_stream, 0) << "blocking streams that are captured would not survive it";
  host.expect_empty();
}

TEST_F(Abi, R8_WhatADeviceClaimsAndDoesNotGrantIsSaid) {
  Altered boastful(host);
  boastful.alter().device_attribute = [](void* self, int device, cumempool_device_attribute which,
                                         int* value) {
    const auto result = Altered::real()->device_attribute(self, device, which, value);
    if (which == CUMEMPOOL_ATTRIBUTE_FABRIC || which == CUMEMPOOL_ATTRIBUTE_RDMA) *value = 1;
    return result;
  };
  const auto probe = probe_of(boastful.table);
  EXPECT_EQ(probe.usable, 1) << probe.reason;
  EXPECT_EQ(probe.handle_types_claimed,
            static_cast<std::uint32_t>(CUMEMPOOL_HANDLE_POSIX_FD | CUMEMPOOL_HANDLE_FABRIC));
  EXPECT_EQ(probe.handle_types, static_cast<std::uint32_t>(CUMEMPOOL_HANDLE_POSIX_FD));
  EXPECT_EQ(probe.rdma_claimed, 1);
  EXPECT_EQ(probe.rdma, 0);
}

TEST_F(Abi, NullProbesAndObjectsThatAreNotThereAreNoHarm) {
  cumempool_device_probe probe{};
  probe.size = sizeof probe;
  EXPECT_EQ(cumempool_probe_device(nullptr, 0, &probe), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_probe_device(&host.table(), 0, nullptr), CUMEMPOOL_INVALID_ARGUMENT);
  cumempool_host_driver_options options{};
  options.size = sizeof options;
  EXPECT_EQ(cumempool_host_driver_create(&options, nullptr), CUMEMPOOL_INVALID_ARGUMENT);
  cumempool_waking_destroy(nullptr);
  cumempool_shared_destroy(nullptr);
  cumempool_end_backup_view(nullptr);
  EXPECT_EQ(cumempool_waking_done(nullptr), 0);
  EXPECT_EQ(cumempool_waking_finish(nullptr, nullptr), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_waking_wait(nullptr, 1, {}), CUMEMPOOL_INVALID_ARGUMENT);
}

TEST_F(Abi, WhatReturnsNoStatusTakesNull) {
  std::size_t count = 7;
  EXPECT_EQ(cumempool_report_seconds(nullptr), 0.0);
  EXPECT_EQ(cumempool_report_rows(nullptr, &count), nullptr);
  EXPECT_EQ(count, 0U);
  EXPECT_EQ(cumempool_report_problems(nullptr, nullptr), nullptr);
  EXPECT_EQ(cumempool_snapshot_totals(nullptr), nullptr);
  EXPECT_EQ(cumempool_snapshot_tags(nullptr, nullptr), nullptr);
  EXPECT_EQ(cumempool_snapshot_allocations(nullptr, nullptr), nullptr);
  EXPECT_STREQ(cumempool_snapshot_last_malloc_failure(nullptr), "");
  EXPECT_EQ(cumempool_shared_address(nullptr), 0U);
  cumempool_report_destroy(nullptr);
  cumempool_snapshot_destroy(nullptr);
  cumempool_allocator_destroy(nullptr);
  cumempool_host_driver_destroy(nullptr);
}

TEST_F(Abi, AViewOfNoBytesIsInvalid) {
  const auto address = pool.malloc("kv", 2 * kGranule);
  must(pool.sleep("kv", kOffload).status);
  for (const cumempool_address at : {address, address + 5, address + 2 * kGranule - 1}) {
    EXPECT_EQ(View(pool.get(), at, 0).status(), CUMEMPOOL_INVALID_ARGUMENT);
    EXPECT_EQ(View(pool.get(), at, ~std::uint64_t{0}).status(), CUMEMPOOL_INVALID_ARGUMENT);
  }
  EXPECT_EQ(pool.close(), CUMEMPOOL_IN_USE) << "the memory";
  must(cumempool_free(address));
  EXPECT_EQ(pool.close(), CUMEMPOOL_OK) << "no view is left open";
}

// CUMEMPOOL_INTERNAL says that the library has a defect.
TEST_F(Abi, R12_NoSizeOrAddressThatACallerPassesIsInternal) {
  constexpr std::uint64_t kSizes[] = {
      0, 1, kGranule - 1, (std::uint64_t{1} << 62) + 1, std::uint64_t{1} << 63, ~std::uint64_t{0}};
  pool.declare("kv");
  const auto awake = pool.malloc("awake", kGranule);
  const auto asleep = pool.malloc("asleep", kGranule);
  must(pool.sleep("asleep", kOffload).status);
  const auto fine = [](cumempool_status status) { return status != CUMEMPOOL_INTERNAL; };
  std::array<unsigned char, CUMEMPOOL_FABRIC_HANDLE_BYTES> exported{};
  for (const std::uint64_t size : kSizes) {
    cumempool_address address = 0;
    if (pool.try_malloc("kv", size, 0, address) == CUMEMPOOL_OK) must(cumempool_free(address));
    EXPECT_NE(cumempool_last_error()->status, CUMEMPOOL_INTERNAL) << size;
    for (const int device : {-1, 2, std::numeric_limits<int>::max()}) {
      EXPECT_TRUE(fine(pool.try_malloc("kv", size, device, address))) << size;
    }
    for (const cumempool_address base : {cumempool_address{0}, awake, asleep}) {
      const cumempool_address at = base + size;
      cumempool_allocation_info info{};
      info.size = sizeof info;
      EXPECT_TRUE(fine(View(pool.get(), base, size).status())) << size;
      EXPECT_TRUE(fine(View(pool.get(), at, size).status())) << size;
      EXPECT_TRUE(fine(cumempool_find(nullptr, at, &info))) << size;
      EXPECT_TRUE(fine(cumempool_preserve(pool.get(), at))) << size;
      // 0 and numbers that are no type of handle.
      EXPECT_TRUE(fine(cumempool_export(pool.get(), at, static_cast<std::uint32_t>(size) & ~1U,
                                        exported.data(), &info)))
          << size;
      SleepCall call{{{"awake", kOffload}}};
      call.dead = {{at, size}};
      EXPECT_TRUE(fine(pool.sleep(call).status)) << size;
      must(pool.wake({{"awake"}}).status);
    }
    cumempool_shared* shared = nullptr;
    const int none = -1;
    EXPECT_TRUE(fine(cumempool_shared_open(&host.table(), 0, CUMEMPOOL_HANDLE_POSIX_FD, &none, size,
                                           CUMEMPOOL_ACCESS_READ, &shared)))
        << size;
    EXPECT_TRUE(fine(cumempool_preserve_slot(static_cast<std::uint32_t>(size)))) << size;
    EXPECT_TRUE(fine(cumempool_unbind_slot(static_cast<std::uint32_t>(size) | 64U))) << size;
    EXPECT_TRUE(fine(cumempool_unpin(pool.get(), size))) << size;
    EXPECT_TRUE(fine(cumempool_host_driver_launch(
        &host.table(), static_cast<int>(size), [](void*) {}, nullptr)))
        << size;
  }
}

TEST_F(Abi, AFunctionIsLaunchedOnHostDriversOnly) {
  const auto nothing = [](void*) {};
  EXPECT_EQ(cumempool_host_driver_launch(nullptr, 0, nothing, nullptr), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_host_driver_launch(&host.table(), 0, nullptr, nullptr),
            CUMEMPOOL_INVALID_ARGUMENT);
  cumempool_driver other = host.table();
  other.fence = nullptr;
  EXPECT_EQ(cumempool_host_driver_launch(&other, 0, nothing, nullptr), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_host_driver_launch(&host.table(), 2, nothing, nullptr),
            CUMEMPOOL_DRIVER_ERROR);
}

TEST_F(Abi, ALaunchedFunctionRunsWhenSomebodyWaitsForTheDevice) {
  const auto address = pool.malloc("kv", kGranule);
  std::atomic<bool> ran{false};
  must(cumempool_host_driver_launch(
      &host.table(), 0, [](void* flag) { *static_cast<std::atomic<bool>*>(flag) = true; }, &ran));
  EXPECT_EQ(host.counters().queued_commands, 1U);
  EXPECT_FALSE(ran);
  must(cumempool_free(address));
  EXPECT_TRUE(ran);
  EXPECT_EQ(host.counters().queued_commands, 0U);
}

TEST_F(Abi, ASwapAndAPrepareWithoutWhatTheyNeedAreInvalid) {
  constexpr auto kInvalid = CUMEMPOOL_INVALID_ARGUMENT;
  pool.declare("kv");
  cumempool_report* report = nullptr;
  cumempool_swap_request request{};
  request.size = sizeof request;
  EXPECT_EQ(cumempool_swap(pool.get(), nullptr, &report), kInvalid);
  EXPECT_EQ(cumempool_swap(pool.get(), &request, &report), kInvalid) << "no sleep";
  cumempool_sleep_request sleep{};
  sleep.size = sizeof sleep;
  request.sleep = &sleep;
  EXPECT_EQ(cumempool_swap(pool.get(), &request, nullptr), kInvalid);
  request.size -= 8;
  EXPECT_EQ(cumempool_swap(pool.get(), &request, &report), kInvalid) << "another version";
  EXPECT_EQ(report, nullptr);
  cumempool_waking* waking = nullptr;
  EXPECT_EQ(cumempool_wake_begin(pool.get(), nullptr, 0, nullptr, 1, nullptr, 0, &waking), kInvalid)
      << "first is NULL";
  EXPECT_EQ(cumempool_wake_begin(pool.get(), nullptr, 0, nullptr, 0, nullptr, 0, nullptr),
            kInvalid);
  const cumempool_address nobody = 5;
  EXPECT_EQ(cumempool_wake_begin(pool.get(), nullptr, 0, &nobody, 1, nullptr, 0, &waking),
            CUMEMPOOL_NOT_OWNED);
  EXPECT_EQ(waking, nullptr);
}

TEST_F(Abi, R11_AnAllocatorThatIsNotUsedHoldsNothing) {
  pool.declare("kv");
  EXPECT_EQ(pool.snapshot().totals.reserved_address_bytes, 0U);
  host.expect_empty();
}

TEST_F(Abi, ProgressCountsTheBytesOfWhatIsCopied) {
  std::uint64_t done = 7;
  std::uint64_t total = 7;
  EXPECT_EQ(cumempool_progress(pool.get(), nullptr, &total), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_progress(pool.get(), &done, nullptr), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_progress(nullptr, &done, &total), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(done + total, 14U);
  must(cumempool_progress(pool.get(), &done, &total));
  EXPECT_EQ(done + total, 0U);
  pool.malloc("kept", 3 * kGranule);
  pool.malloc("dropped", kGranule);
  must(pool.sleep({{{"kept", kOffload}, {"dropped", kDiscard}}, {}}).status);
  must(cumempool_progress(pool.get(), &done, &total));
  EXPECT_EQ(done, 3 * kGranule);
  EXPECT_EQ(total, 3 * kGranule) << "discarding copies nothing";
  must(pool.wake().status);
  must(cumempool_progress(pool.get(), &done, &total));
  EXPECT_EQ(done, 4 * kGranule);
  EXPECT_EQ(total, 4 * kGranule);
}

TEST(AbiNames, TheNameOfATagOutlivesWhatItWasReadFrom) {
  const Host host;
  cumempool_allocation_info found{};
  found.size = sizeof found;
  const char* told = nullptr;
  {
    const Pool pool{host};
    const cumempool_address address =
        pool.malloc("a tag with a name that is not a short one", kGranule);
    must(cumempool_find(nullptr, address, &found));
    must(pool.sleep("a tag with a name that is not a short one", kOffload).status);
    cumempool_snapshot* snapshot = nullptr;
    must(cumempool_take_snapshot(pool.get(), 0, &snapshot));
    std::size_t count = 0;
    told = cumempool_snapshot_tags(snapshot, &count)->tag;
    cumempool_snapshot_destroy(snapshot);
  }
  EXPECT_STREQ(found.tag, "a tag with a name that is not a short one");
  EXPECT_STREQ(told, found.tag);
}

// What an old program, whose structures are smaller, would have overwritten or misread.
TEST(AbiSizes, StructuresOfAnotherSizeAreRefusedAndThoseOfTheLibrarySayTheirs) {
  const Host host;
  const Pool pool{host};
  const cumempool_address address = pool.malloc("w", kGranule);
  cumempool_allocation_info info{};
  int descriptor = -1;
  for (const std::uint32_t size : {0U, std::uint32_t{sizeof info} - 8}) {
    info.size = size;
    EXPECT_EQ(cumempool_find(pool.get(), address, &info), CUMEMPOOL_INVALID_ARGUMENT);
    EXPECT_EQ(cumempool_export(pool.get(), address, CUMEMPOOL_HANDLE_POSIX_FD, &descriptor, &info),
              CUMEMPOOL_INVALID_ARGUMENT);
    EXPECT_EQ(info.address, 0U) << "nothing is written";
  }
  EXPECT_EQ(descriptor, -1);
  const cumempool_device_stream stream{};
  cumempool_report* report = nullptr;
  EXPECT_EQ(cumempool_wake(pool.get(), nullptr, 0, &stream, 1, &report),
            CUMEMPOOL_INVALID_ARGUMENT);
  must(pool.sleep("w", kOffload).status);
  cumempool_backup_view view{};
  EXPECT_EQ(cumempool_view_backup(pool.get(), address, 1, 0, &view), CUMEMPOOL_INVALID_ARGUMENT);
  must(cumempool_wake(pool.get(), nullptr, 0, nullptr, 0, &report));
  std::size_t count = 0;
  EXPECT_EQ(cumempool_report_rows(report, &count)->size, sizeof(cumempool_report_row));
  cumempool_report_destroy(report);
  cumempool_snapshot* snapshot = nullptr;
  must(cumempool_take_snapshot(pool.get(), 1, &snapshot));
  EXPECT_EQ(cumempool_snapshot_totals(snapshot)->size, sizeof(cumempool_totals));
  EXPECT_EQ(cumempool_snapshot_tags(snapshot, &count)->size, sizeof(cumempool_tag_stats));
  EXPECT_EQ(cumempool_snapshot_allocations(snapshot, &count)->size,
            sizeof(cumempool_allocation_info));
  cumempool_snapshot_destroy(snapshot);
}

}  // namespace
}  // namespace cumempool::tests
