// What memory of a tag is made of: ordinary memory, which cannot sleep, devices that get access
// beside its own, and pins, which keep memory where it is.
#include <atomic>
#include <chrono>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fault_driver.hpp"
#include "host_fixture.hpp"

extern "C" {
void* cumempool_malloc_0(ssize_t bytes, int device, void* stream);
void cumempool_free_0(void* address, ssize_t bytes, int device, void* stream);
}

namespace cumempool::tests {
namespace {

using driver::FaultDriver;

constexpr cumempool_backing kVmm = CUMEMPOOL_BACKING_VMM;
constexpr cumempool_backing kOrdinary = CUMEMPOOL_BACKING_CUDA_MALLOC;

std::string last_message() { return cumempool_last_error()->message; }

bool last_message_has(const std::string& part) {
  return last_message().find(part) != std::string::npos;
}

class MemoryPolicy : public ::testing::Test {
 protected:
  static constexpr std::size_t kBytes = 2 * kGranule;

  cumempool_address filled(const char* tag, std::uint32_t seed, int device = 0) const {
    const cumempool_address address = pool.malloc(tag, kBytes, device);
    write_pattern(address, kBytes, seed);
    return address;
  }
  cumempool_address filled_ordinary(std::uint32_t seed = 1, int device = 0) const {
    must(pool.set_memory("plain", kOrdinary));
    return filled("plain", seed, device);
  }

  Host host{kDeviceGranules, 3};
  FaultDriver faults{host.table()};
  Pool pool{faults.table()};
};

// ---- ordinary memory ---------------------------------------------------------------------------

class OrdinaryMemory : public MemoryPolicy {};

TEST_F(OrdinaryMemory, R13_IsCountedExactlyAndHasNoReservationOfOurs) {
  const cumempool_address address = filled_ordinary();
  const cumempool_address small = pool.malloc("plain", 1, 1);
  filled("weights", 2);
  EXPECT_EQ(host.counters().allocations, 2U);
  const auto info = pool.find(address + kBytes - 1);
  EXPECT_EQ(info.address, address);
  EXPECT_EQ(info.backing, kOrdinary);
  EXPECT_EQ(info.state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(info.bytes, kBytes);
  EXPECT_EQ(pool.find(small).bytes, kGranule);
  EXPECT_EQ(pool.find(small).requested_bytes, 1U);
  const Picture picture = pool.snapshot();
  EXPECT_EQ(picture.tag("plain").backing, kOrdinary);
  EXPECT_EQ(picture.tag("plain").awake_bytes, kBytes);
  EXPECT_EQ(picture.tag("plain", 1).awake_bytes, kGranule);
  EXPECT_EQ(picture.tag("weights").backing, kVmm);
  EXPECT_EQ(picture.totals.physical_bytes, 2 * kBytes + kGranule);
  EXPECT_EQ(picture.totals.mapped_bytes, 2 * kBytes + kGranule);
  EXPECT_EQ(picture.totals.reserved_address_bytes, kBytes);
  expect_exact_numbers(pool, host);

  must(cumempool_free(address));
  must(cumempool_free(small));
  EXPECT_EQ(host.counters().allocations, 0U);
  EXPECT_EQ(pool.snapshot().totals.physical_bytes, kBytes);
  expect_exact_numbers(pool, host);
}

TEST_F(OrdinaryMemory, R5_AFreeWaitsForWorkInFlight) {
  const cumempool_address address = filled_ordinary();
  UserStream stream(host);
  stream.fill(address, kBytes, 7);
  EXPECT_EQ(host.counters().queued_commands, 1U);
  must(cumempool_free(address));
  EXPECT_EQ(host.counters().queued_commands, 0U);
  const cumempool_address next = filled("weights", 1);
  stream.fill(next, kBytes, 8);
  must(cumempool_free(next));  // the context is not lost
}

TEST_F(OrdinaryMemory, WorkOfItsDeviceReachesIt) {
  const cumempool_address address = filled_ordinary();
  {
    UserStream stream(host);
    stream.fill(address + 100, 50, 7);
    filled("weights", 2);
    must(pool.sleep("weights", kOffload).status);  // fences the device
  }
  EXPECT_TRUE(all_are(address + 100, 50, 7));
  EXPECT_TRUE(holds_pattern(address, 100, 1));
  EXPECT_TRUE(holds_pattern(address, 150, kBytes - 150, 1));
}

TEST_F(OrdinaryMemory, R12_OutOfMemoryTellsTheCallAndLeavesThePoolUsable) {
  filled_ordinary();
  cumempool_address address = 3;
  ASSERT_EQ(pool.try_malloc("plain", kDeviceGranules * kGranule, 0, address),
            CUMEMPOOL_OUT_OF_MEMORY);
  EXPECT_EQ(address, 3U);
  EXPECT_STREQ(cumempool_last_error()->driver_call, "host.allocate");
  EXPECT_STREQ(cumempool_last_error()->tag, "plain");
  EXPECT_EQ(cumempool_last_error()->bytes, kDeviceGranules * kGranule);
  EXPECT_EQ(cumempool_last_error()->free_bytes, kDeviceGranules * kGranule - kBytes);
  expect_exact_numbers(pool, host);
  must(pool.try_malloc("plain", kDeviceGranules * kGranule - kBytes, 0, address));
  expect_exact_numbers(pool, host);
}

TEST_F(OrdinaryMemory, R4_ItsSleepIsRefusedBeforeAnythingHappens) {
  const cumempool_address weights = filled("weights", 1);
  const cumempool_address plain = filled_ordinary(2);
  const auto swapped_in = filled("next", 3);
  must(pool.sleep("next", kOffload).status);
  faults.reset_counts();
  const auto refused = [&](const Outcome& outcome) {
    EXPECT_EQ(outcome.status, CUMEMPOOL_UNSUPPORTED);
    EXPECT_STREQ(cumempool_last_error()->tag, "plain");
    EXPECT_EQ(cumempool_last_error()->device, 0);
    EXPECT_TRUE(last_message_has("cudaMalloc")) << last_message();
    EXPECT_EQ(pool.find(weights).state, CUMEMPOOL_AWAKE);
    EXPECT_EQ(pool.find(plain).state, CUMEMPOOL_AWAKE);
    EXPECT_EQ(pool.find(swapped_in).state, CUMEMPOOL_ASLEEP_BACKED_UP);
  };
  for (const cumempool_on_sleep action : {kOffload, kDiscard}) {
    refused(pool.sleep("plain", action));
    refused(pool.sleep({{{"weights", action}, {"plain", action}}}));
    refused(pool.sleep({{{"plain", action}}, {}, {}, true}));
    refused(pool.swap({{{"weights", action}, {"plain", action}}}, {{"next"}}));
  }
  for (const char* entry : {"fence", "unmap", "release", "copy_to_host", "create"}) {
    EXPECT_EQ(faults.calls(entry), 0U) << entry;
  }
  EXPECT_TRUE(holds_pattern(weights, kBytes, 1));
  EXPECT_TRUE(holds_pattern(plain, kBytes, 2));
  expect_exact_numbers(pool, host);
  must(pool.sleep("weights", kOffload).status);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(weights, kBytes, 1));
  EXPECT_TRUE(holds_pattern(swapped_in, kBytes, 3));
  EXPECT_EQ(pool.find(plain).generation, 1U);
}

TEST_F(OrdinaryMemory, R12_NothingIsPreparedForASleepThatWillBeRefused) {
  filled("weights", 1);
  filled_ordinary(2);
  std::uint64_t pinned = 3;
  for (const cumempool_on_sleep action : {kOffload, kDiscard}) {
    EXPECT_EQ(pool.prepare({{{"weights", kOffload}, {"plain", action}}}, pinned),
              CUMEMPOOL_UNSUPPORTED);
    EXPECT_STREQ(cumempool_last_error()->operation, "prepare");
    EXPECT_STREQ(cumempool_last_error()->tag, "plain");
    EXPECT_TRUE(last_message_has("cudaMalloc")) << last_message();
    EXPECT_EQ(pool.prepare({{{"weights", kOffload}, {"plain", action}}}, pinned, {"plain"}),
              CUMEMPOOL_UNSUPPORTED);
  }
  EXPECT_EQ(pinned, 3U);
  EXPECT_EQ(host.counters().registered_bytes, 0U);
  must(pool.prepare({{{"weights", kOffload}}}, pinned));
  EXPECT_EQ(pinned, kBytes);
}

TEST_F(OrdinaryMemory, ATagWithoutMemorySleepsLikeAny) {
  must(cumempool_free(filled_ordinary()));
  EXPECT_EQ(pool.sleep("plain", kOffload).status, CUMEMPOOL_OK);
  EXPECT_EQ(pool.wake({{"plain"}}).status, CUMEMPOOL_OK);
}

TEST_F(OrdinaryMemory, R11_CloseIsRefusedWhileItLivesAndThenGivesAllBack) {
  const cumempool_address address = filled_ordinary();
  EXPECT_EQ(pool.close(), CUMEMPOOL_IN_USE);
  EXPECT_TRUE(last_message_has("'plain'")) << last_message();
  EXPECT_TRUE(holds_pattern(address, kBytes, 1));
  must(cumempool_free(address));
  must(pool.close());
  host.expect_empty();
}

// Its address cannot be kept from others once the driver has it back, and a later free of the
// program would be taken for one of theirs.
TEST_F(OrdinaryMemory, R2_AForcedCloseLeavesItUntilItIsFreed) {
  const cumempool_address address = filled_ordinary();
  const cumempool_address weights = filled("weights", 2);
  must(pool.close(true));
  EXPECT_EQ(pool.find(address).state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(pool.find(weights).state, CUMEMPOOL_ASLEEP_DISCARDED);
  EXPECT_TRUE(holds_pattern(address, kBytes, 1));
  EXPECT_EQ(host.counters().charged_bytes, kBytes);
  expect_exact_numbers(pool, host);
  must(pool.close(true));

  const Pool other(host);
  must(other.set_memory("plain", kOrdinary));
  const cumempool_address later = other.malloc("plain", kBytes);
  EXPECT_NE(later, address);
  write_pattern(later, kBytes, 3);
  must(cumempool_free(address));
  EXPECT_EQ(cumempool_free(address), CUMEMPOOL_NOT_OWNED);
  must(cumempool_free(weights));
  EXPECT_TRUE(holds_pattern(later, kBytes, 3));
  EXPECT_EQ(host.counters().allocations, 1U);
  EXPECT_EQ(pool.snapshot().totals.physical_bytes, 0U);
}

TEST_F(OrdinaryMemory, R14_IsFreedAfterItsAllocatorWasDestroyed) {
  const cumempool_address address = filled_ordinary();
  pool.destroy();
  EXPECT_TRUE(holds_pattern(address, kBytes, 1));
  must(cumempool_free(address));
  host.expect_empty();
}

TEST_F(OrdinaryMemory, R1_IsAllocatedAndFreedThroughSlots) {
  must(pool.set_memory("plain", kOrdinary));
  std::uint32_t slot = 9;
  must(cumempool_bind_slot(pool.get(), "plain", &slot));
  ASSERT_EQ(slot, 0U);
  void* const memory = cumempool_malloc_0(kBytes, 1, nullptr);
  ASSERT_NE(memory, nullptr);
  EXPECT_EQ(pool.snapshot().tag("plain", 1).awake_bytes, kBytes);
  EXPECT_EQ(host.counters().allocations, 1U);
  must(cumempool_unbind_slot(slot));
  cumempool_free_0(memory, kBytes, 1, nullptr);
  EXPECT_EQ(host.counters().allocations, 0U);
  expect_exact_numbers(pool, host);
}

TEST_F(OrdinaryMemory, R13_WhatTheDriverDoesNotTakeBackIsLeakedAndGoesAtClose) {
  for (const char* entry : {"fence", "deallocate"}) {
    const Pool closing(faults.table());
    must(closing.set_memory("plain", CUMEMPOOL_BACKING_CUDA_MALLOC));
    const cumempool_address address = closing.malloc("plain", kBytes);
    faults.fail_nth(entry, 1, 719);
    must(cumempool_free(address));
    EXPECT_EQ(closing.snapshot().totals.leaked_bytes, kBytes) << entry;
    EXPECT_EQ(cumempool_free(address), CUMEMPOOL_NOT_OWNED);
    expect_exact_numbers(closing, host);
    EXPECT_EQ(closing.close(), CUMEMPOOL_OK) << entry;
    EXPECT_EQ(closing.snapshot().totals.leaked_bytes, 0U) << entry;
    EXPECT_EQ(host.counters().allocations, 0U) << entry;
    expect_exact_numbers(closing, host);
  }
}

// ---- choices -----------------------------------------------------------------------------------

TEST_F(MemoryPolicy, R8_IsFrozenWhileMemoryOfTheTagLives) {
  const cumempool_address address = filled("kv", 1);
  for (int asleep = 0; asleep < 2; ++asleep) {
    EXPECT_EQ(pool.set_memory("kv", kOrdinary), CUMEMPOOL_IN_USE);
    EXPECT_STREQ(cumempool_last_error()->tag, "kv");
    EXPECT_TRUE(last_message_has("128.00 KiB")) << last_message();
    EXPECT_EQ(pool.set_memory("kv", kVmm, {1}), CUMEMPOOL_IN_USE);
    EXPECT_EQ(pool.set_memory("kv", kVmm, {}, true), CUMEMPOOL_IN_USE);
    EXPECT_EQ(pool.set_memory("kv", kVmm, {}, false, false), CUMEMPOOL_IN_USE);
    EXPECT_EQ(pool.set_memory("kv", kVmm), CUMEMPOOL_OK) << "it is made so";
    EXPECT_EQ(pool.set_memory("kv", CUMEMPOOL_BACKING_UNSET), CUMEMPOOL_OK) << "the same";
    EXPECT_EQ(pool.set_memory("other", kOrdinary), CUMEMPOOL_OK) << "has no memory";
    must(pool.sleep("kv", kOffload).status);
  }
  EXPECT_EQ(pool.snapshot().tag("kv").backing, kVmm);
  must(cumempool_free(address));
  must(pool.set_memory("kv", kOrdinary));
  const cumempool_address plain = pool.malloc("kv", 1);
  EXPECT_EQ(pool.find(plain).backing, kOrdinary);
  EXPECT_EQ(pool.set_memory("kv", kVmm), CUMEMPOOL_IN_USE);
  EXPECT_EQ(pool.set_memory("kv", CUMEMPOOL_BACKING_UNSET), CUMEMPOOL_IN_USE);
  must(cumempool_free(plain));
  must(pool.set_memory("kv", CUMEMPOOL_BACKING_UNSET));
  EXPECT_EQ(pool.find(pool.malloc("kv", 1)).backing, kVmm) << "UNSET is VMM";
}

TEST_F(MemoryPolicy, ValuesThatCannotBeAreRefused) {
  constexpr auto kInvalid = CUMEMPOOL_INVALID_ARGUMENT;
  EXPECT_EQ(pool.set_memory("kv", static_cast<cumempool_backing>(3)), kInvalid);
  EXPECT_EQ(pool.set_memory("kv", kOrdinary, {1}), kInvalid) << "ordinary memory has no peers";
  EXPECT_EQ(pool.set_memory("kv", kOrdinary, {}, true), kInvalid);
  EXPECT_EQ(pool.set_memory("kv", kOrdinary, {}, false, false), kInvalid) << "it is good for RDMA";
  const cumempool_memory_policy policy = memory_of(kVmm, {}, false);
  EXPECT_EQ(cumempool_set_memory(pool.get(), "nobody", &policy), CUMEMPOOL_UNKNOWN_TAG);
  EXPECT_EQ(pool.find(pool.malloc("kv", 1)).backing, kVmm);
}

// ---- RDMA --------------------------------------------------------------------------------------

// A driver that tells with what properties each handle was made.
class Told {
 public:
  explicit Told(const cumempool_driver& inner) : table_(inner) {
    create_ = inner.create;
    made_.clear();
    table_.create = [](void* self, std::size_t bytes, const cumempool_memory_properties* properties,
                       cumempool_physical* physical) {
      made_.push_back(properties->rdma);
      return create_(self, bytes, properties, physical);
    };
  }
  const cumempool_driver& table() const { return table_; }
  // RDMA of each handle made since this was asked last.
  static std::vector<std::uint32_t> made() { return std::exchange(made_, {}); }

 private:
  using Create = decltype(cumempool_driver::create);
  static inline Create create_ = nullptr;
  static inline std::vector<std::uint32_t> made_;
  cumempool_driver table_;
};

class RdmaMemory : public ::testing::Test {
 protected:
  static constexpr std::uint32_t kFd = CUMEMPOOL_HANDLE_POSIX_FD;
  using Made = std::vector<std::uint32_t>;

  Host host{kDeviceGranules, 2, kGranule, kFd, true};
  Told told{host.table()};
  Pool pool{told.table()};
};

TEST_F(RdmaMemory, R8_IsChosenPerTagAndHoldsForEachWake) {
  must(pool.set_memory("kv", kVmm, {}, false, false));
  const cumempool_address weights = pool.malloc("weights", kGranule);
  EXPECT_EQ(Told::made(), (Made{1, 0, 1, 1})) << "trials: fabric handles twice, fd; the memory";
  const cumempool_address kv = pool.malloc("kv", kGranule);
  const cumempool_address more = pool.malloc("kv", kGranule);
  EXPECT_EQ(Told::made(), (Made{0, 0}));
  for (const auto* tag : {"weights", "kv"}) {
    EXPECT_EQ(pool.snapshot().tag(tag).handle_types, kFd);
  }
  EXPECT_EQ(pool.snapshot().tag("weights").rdma, 1U);
  EXPECT_EQ(pool.snapshot().tag("kv").rdma, 0U);
  must(pool.sleep("kv", kOffload).status);
  must(pool.wake({{"kv"}}).status);
  EXPECT_EQ(Told::made(), (Made{0, 0}));
  must(pool.sleep("weights", kOffload).status);
  must(pool.wake({{"weights"}}).status);
  EXPECT_EQ(Told::made(), (Made{1}));
  for (const cumempool_address address : {weights, kv, more}) must(cumempool_free(address));
  must(pool.set_memory("kv", kVmm));
  must(cumempool_free(pool.malloc("kv", kGranule)));
  EXPECT_EQ(Told::made(), (Made{1})) << "the tag is empty, and may be told otherwise";
}

TEST_F(RdmaMemory, OrdinaryMemoryHasItAsTheDeviceDoes) {
  must(pool.set_memory("plain", kOrdinary));
  const cumempool_address plain = pool.malloc("plain", kGranule);
  EXPECT_EQ(pool.snapshot().tag("plain").rdma, 1U);
  must(cumempool_free(plain));
}

TEST_F(MemoryPolicy, R8_AChoiceMadeWhileMemoryIsBeingAllocatedHoldsForThatMemory) {
  must(pool.set_memory("kv", kVmm));
  for (const char* entry : {"create", "map", "set_access"}) {
    SCOPED_TRACE(entry);
    bool once = false;
    faults.observe([&](const char* called) {
      if (once || std::string(called) != entry) return;
      once = true;
      must(pool.set_memory("kv", kOrdinary));
    });
    const cumempool_address address = pool.malloc("kv", kBytes);
    faults.observe(nullptr);
    EXPECT_TRUE(once);
    EXPECT_EQ(pool.find(address).backing, kOrdinary);
    EXPECT_EQ(pool.snapshot().totals.reserved_address_bytes, 0U) << "the first try is gone";
    expect_exact_numbers(pool, host);
    EXPECT_EQ(pool.set_memory("kv", kVmm), CUMEMPOOL_IN_USE);
    must(cumempool_free(address));
    must(pool.set_memory("kv", kVmm));
  }
}

TEST_F(MemoryPolicy, R8_ThreadsThatAllocateAndChooseNeverMixWhatATagIsMadeOf) {
  std::atomic<bool> stop{false};
  std::atomic<int> mixed{0};
  pool.declare("kv");
  std::thread chooser([&] {
    for (int round = 0; !stop; ++round) {
      const cumempool_status chosen = pool.set_memory("kv", round % 2 == 0 ? kVmm : kOrdinary);
      if (chosen != CUMEMPOOL_OK && chosen != CUMEMPOOL_IN_USE) ++mixed;
    }
  });
  std::vector<std::thread> allocating;
  for (int thread = 0; thread < 2; ++thread) {
    allocating.emplace_back([&] {
      for (int round = 0; round < 300; ++round) {
        const cumempool_address first = pool.malloc("kv", kBytes);
        const cumempool_address second = pool.malloc("kv", kBytes);
        if (pool.find(first).backing != pool.find(second).backing) ++mixed;
        must(cumempool_free(first));
        must(cumempool_free(second));
      }
    });
  }
  for (std::thread& thread : allocating) thread.join();
  stop = true;
  chooser.join();
  EXPECT_EQ(mixed, 0);
  expect_exact_numbers(pool, host);
}

// ---- peers -------------------------------------------------------------------------------------

class Peers : public MemoryPolicy {
 protected:
  // Whether a kernel of `device`, so to speak, can write there.
  bool reaches(int device, cumempool_address address) const {
    const cumempool_driver& table = host.table();
    cumempool_context_token token{};
    cumempool_stream stream = 0;
    EXPECT_EQ(table.context_retain(table.self, device), CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_EQ(table.context_enter(table.self, device, &token), CUMEMPOOL_RESULT_SUCCESS);
    EXPECT_EQ(table.stream_create(table.self, device, &stream), CUMEMPOOL_RESULT_SUCCESS);
    cumempool_result result = table.fill(table.self, device, address, kMark, kBytes, stream);
    if (result == CUMEMPOOL_RESULT_SUCCESS) {
      result = table.stream_synchronize(table.self, device, stream);
    }
    table.stream_destroy(table.self, device, stream);
    table.context_leave(table.self, &token);
    table.context_release(table.self, device);
    return result == CUMEMPOOL_RESULT_SUCCESS && all_are(address, kBytes, kMark);
  }
  void link(bool possible) const { driver::host_driver_set_peer_access(&host.table(), possible); }

  static constexpr std::uint8_t kMark = 0x5a;
};

TEST_F(Peers, WhereNoneAreChosenTheDeviceIsAlone) {
  cumempool_memory_policy policy = memory_of(kVmm, {}, false);
  policy.all_peers = CUMEMPOOL_PEERS_NONE;
  pool.declare("kv");
  must(cumempool_set_memory(pool.get(), "kv", &policy));
  const UserStream there(host, 1);
  const cumempool_address address = filled("kv", 1);
  must(pool.sleep("kv", kOffload).status);
  must(pool.wake().status);
  EXPECT_TRUE(reaches(0, address));
  EXPECT_FALSE(reaches(1, address));
}

TEST_F(Peers, R8_ChoosingNoneIsAnotherChoiceThanNone) {
  const cumempool_address address = filled("kv", 1);
  cumempool_memory_policy policy = memory_of(kVmm, {}, false);
  policy.all_peers = CUMEMPOOL_PEERS_NONE;
  EXPECT_EQ(cumempool_set_memory(pool.get(), "kv", &policy), CUMEMPOOL_IN_USE);
  must(cumempool_free(address));
  must(cumempool_set_memory(pool.get(), "kv", &policy));
  policy.all_peers = 3;
  EXPECT_EQ(cumempool_set_memory(pool.get(), "kv", &policy), CUMEMPOOL_INVALID_ARGUMENT);
  const std::vector<std::int32_t> one{1};
  policy = memory_of(kVmm, one, false);
  policy.all_peers = CUMEMPOOL_PEERS_NONE;
  EXPECT_EQ(cumempool_set_memory(pool.get(), "kv", &policy), CUMEMPOOL_INVALID_ARGUMENT);
}

TEST_F(Peers, WithoutAChoiceTheDevicesInUseReachTheMemoryAlsoAfterAWake) {
  const UserStream there(host, 1);
  const cumempool_address address = filled("kv", 1);
  for (const cumempool_on_sleep action : {kOffload, kDiscard, kOffload}) {
    EXPECT_TRUE(reaches(1, address));
    must(pool.sleep("kv", action).status);
    must(pool.wake().status);
  }
  EXPECT_TRUE(reaches(1, address));
  EXPECT_FALSE(reaches(2, address)) << "nobody used it";
}

TEST_F(Peers, WithoutAChoiceADeviceThatComesIntoUseIsLetInAtTheNextCall) {
  const cumempool_address kv = filled("kv", 1);
  const UserStream there(host, 1);
  filled("other", 2);
  EXPECT_TRUE(reaches(1, kv)) << "by an allocation";
  const UserStream third(host, 2);
  must(pool.sleep("other", kOffload).status);
  EXPECT_TRUE(reaches(2, kv)) << "by a transition of another tag";
  EXPECT_TRUE(reaches(1, kv));
}

TEST_F(Peers, WithoutAChoiceADeviceThatComesIntoUseIsLetInByAScope) {
  const cumempool_address kv = filled("kv", 1);
  std::uint32_t slot = 0;
  {
    const UserStream there(host, 1);
    must(cumempool_bind_slot(pool.get(), "kv", &slot));
    EXPECT_TRUE(reaches(1, kv)) << "entering one";
  }
  const UserStream third(host, 2);
  must(cumempool_unbind_slot(slot));
  EXPECT_TRUE(reaches(2, kv)) << "leaving one";
}

TEST_F(Peers, WithoutAChoiceWhatIsAllocatedByATransitionOfAnotherThreadIsLetInLater) {
  const cumempool_address kv = filled("kv", 1);
  const cumempool_address other = filled("other", 2);
  std::optional<UserStream> there;
  bool once = false;
  faults.observe([&](const char* entry) {
    if (std::string(entry) != "copy_to_host" || once) return;
    once = true;
    there.emplace(host, 1);
    std::thread([&] { must(cumempool_free(pool.malloc("kv", kBytes))); }).join();
  });
  must(pool.sleep("other", kOffload).status);
  faults.observe(nullptr);
  ASSERT_TRUE(once);
  must(pool.wake().status);
  EXPECT_TRUE(reaches(1, kv));
  EXPECT_TRUE(reaches(1, other));
}

TEST_F(Peers, WithoutAChoiceAPeerThatIsRefusedCostsNothing) {
  const UserStream there(host, 1);
  faults.reset_counts();
  faults.fail_nth("set_access", 2, CUMEMPOOL_RESULT_NOT_SUPPORTED);
  const cumempool_address kv = filled("kv", 1);
  EXPECT_EQ(faults.failures(), 1U);
  faults.reset_counts();
  EXPECT_TRUE(reaches(0, kv));
  must(pool.sleep("kv", kOffload).status);
  must(pool.wake().status);
  EXPECT_TRUE(reaches(1, kv)) << "the next mapping tries again";
}

TEST_F(Peers, R5_SleepWaitsForTheWorkOfDevicesThatWereLetIn) {
  const cumempool_address address = filled("kv", 1);
  UserStream peer(host, 1);
  filled("other", 2);
  peer.fill(address, kBytes, 7);
  must(pool.sleep("kv", kOffload).status);
  EXPECT_EQ(host.counters().queued_commands, 0U);
  must(pool.wake().status);
  EXPECT_TRUE(all_are(address, kBytes, 7));
}

TEST(OneDevice, NobodyIsAskedForPeers) {
  const Host host{kDeviceGranules, 1};
  FaultDriver faults{host.table()};
  {
    const Pool pool{faults.table()};
    const cumempool_address address = pool.malloc("kv", kGranule);
    must(pool.sleep("kv", kOffload).status);
    must(pool.wake().status);
    EXPECT_EQ(faults.calls("context_active"), 0U);
    EXPECT_EQ(faults.calls("peer_access"), 0U);
    EXPECT_EQ(faults.calls("set_access"), 2U);
    must(cumempool_free(address));
  }
}

TEST_F(Peers, ListedDevicesReachTheMemoryAlsoAfterAWake) {
  must(pool.set_memory("kv", kVmm, {2, 0, 2}));
  const cumempool_address address = filled("kv", 1);
  for (const cumempool_on_sleep action : {kOffload, kDiscard, kOffload}) {
    EXPECT_TRUE(reaches(0, address));
    EXPECT_TRUE(reaches(2, address));
    EXPECT_FALSE(reaches(1, address));
    must(pool.sleep("kv", action).status);
    EXPECT_FALSE(reaches(2, address)) << "asleep";
    must(pool.wake().status);
  }
  EXPECT_TRUE(reaches(2, address));
}

TEST_F(Peers, R5_SleepWaitsForTheWorkOfPeers) {
  must(pool.set_memory("kv", kVmm, {1}));
  const cumempool_address address = filled("kv", 1);
  UserStream peer(host, 1);
  peer.fill(address, kBytes, 7);
  must(pool.sleep("kv", kOffload).status);
  EXPECT_EQ(host.counters().queued_commands, 0U);
  must(pool.wake().status);
  EXPECT_TRUE(all_are(address, kBytes, 7)) << "what the peer wrote is in the backup";
  EXPECT_TRUE(reaches(1, address)) << "and the peer is intact";
}

TEST_F(Peers, R5_FreeWaitsForTheWorkOfPeers) {
  must(pool.set_memory("kv", kVmm, {1}));
  const cumempool_address address = filled("kv", 1);
  UserStream peer(host, 1);
  peer.fill(address, kBytes, 7);
  must(cumempool_free(address));
  EXPECT_EQ(host.counters().queued_commands, 0U);
  EXPECT_EQ(host.counters().mapped_bytes, 0U);
}

TEST_F(Peers, R5_CloseByForceWaitsForTheWorkOfPeers) {
  must(pool.set_memory("kv", kVmm, {1}));
  const cumempool_address address = filled("kv", 1);
  {
    UserStream peer(host, 1);
    peer.fill(address, kBytes, 7);
    must(pool.close(true));
    EXPECT_EQ(host.counters().queued_commands, 0U);
  }
  must(cumempool_free(address));
}

TEST_F(Peers, R5_APeerThatNobodyUsesIsNotWaitedFor) {
  must(pool.set_memory("kv", kVmm, {1}));
  const cumempool_address address = filled("kv", 1);
  EXPECT_EQ(host.counters().retained_contexts, 1U);
  must(pool.sleep("kv", kOffload).status);
  must(pool.wake().status);
  must(cumempool_free(address));
  EXPECT_EQ(host.counters().retained_contexts, 1U);
}

TEST_F(Peers, AllReachTheMemoryAlsoAfterAWake) {
  must(pool.set_memory("kv", kVmm, {}, true));
  const cumempool_address address = filled("kv", 1, 1);
  for (int round = 0; round < 2; ++round) {
    for (const int device : {0, 1, 2}) EXPECT_TRUE(reaches(device, address)) << device;
    write_pattern(address, kBytes, 3);
    must(pool.sleep("kv", kOffload).status);
    must(pool.wake().status);
    EXPECT_TRUE(holds_pattern(address, kBytes, 3));
  }
}

TEST_F(Peers, AllAreThoseThatCan) {
  link(false);
  must(pool.set_memory("kv", kVmm, {}, true));
  const cumempool_address address = filled("kv", 1);
  EXPECT_TRUE(reaches(0, address));
  EXPECT_FALSE(reaches(1, address));
}

TEST_F(Peers, R13_AListedDeviceThatCannotReachItIsUnsupportedAndHoldsNothing) {
  must(pool.set_memory("kv", kVmm, {0, 1}));
  link(false);  // since then
  cumempool_address address = 3;
  EXPECT_EQ(pool.try_malloc("kv", kBytes, 0, address), CUMEMPOOL_UNSUPPORTED);
  EXPECT_EQ(address, 3U);
  EXPECT_STREQ(cumempool_last_error()->tag, "kv");
  EXPECT_TRUE(last_message_has("device 1")) << last_message();
  EXPECT_EQ(host.counters().charged_bytes + host.counters().reserved_bytes, 0U);
  EXPECT_EQ(pool.snapshot().totals.malloc_failures, 1U);
  EXPECT_EQ(pool.try_malloc("kv", kBytes, 1, address), CUMEMPOOL_UNSUPPORTED) << "nor does 0";
  link(true);
  must(pool.try_malloc("kv", kBytes, 0, address));
  EXPECT_TRUE(reaches(1, address));
}

TEST_F(Peers, R12_WhatCannotBeAPeerIsRefusedWhereItIsChosen) {
  must(pool.set_memory("kv", kVmm, {1}));
  for (const std::int32_t none : {-1, 3, 7}) {
    EXPECT_EQ(pool.set_memory("kv", kVmm, {0, none}), CUMEMPOOL_INVALID_ARGUMENT) << none;
    EXPECT_STREQ(cumempool_last_error()->tag, "kv");
    EXPECT_TRUE(last_message_has("no device " + std::to_string(none))) << last_message();
    EXPECT_TRUE(last_message_has("3 device(s)")) << last_message();
  }
  link(false);
  EXPECT_EQ(pool.set_memory("kv", kVmm, {2}), CUMEMPOOL_UNSUPPORTED);
  EXPECT_TRUE(last_message_has("device 2")) << last_message();
  link(true);
  const cumempool_address address = filled("kv", 1);
  EXPECT_TRUE(reaches(1, address)) << "the choice of before";
  EXPECT_FALSE(reaches(2, address));
}

TEST_F(Peers, TheOnlyDeviceMayListItself) {
  const Host alone(kDeviceGranules, 1);
  const Pool one(alone);
  must(one.set_memory("kv", kVmm, {0}));
  write_pattern(one.malloc("kv", kBytes), kBytes, 1);
  EXPECT_EQ(one.set_memory("other", kVmm, {1}), CUMEMPOOL_INVALID_ARGUMENT);
}

TEST_F(Peers, R4_AWakeThatCannotGiveAccessAgainLeavesAllAsleepWithItsContents) {
  must(pool.set_memory("kv", kVmm, {1}));
  const cumempool_address address = filled("kv", 1);
  const cumempool_address weights = filled("weights", 2);
  must(pool.sleep({{{"kv", kOffload}, {"weights", kOffload}}}).status);
  link(false);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_DRIVER_ERROR);
  EXPECT_EQ(pool.find(address).state, CUMEMPOOL_ASLEEP_BACKED_UP);
  EXPECT_EQ(pool.find(weights).state, CUMEMPOOL_ASLEEP_BACKED_UP);
  expect_exact_numbers(pool, host);
  link(true);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(address, kBytes, 1));
  EXPECT_TRUE(holds_pattern(weights, kBytes, 2));
  EXPECT_TRUE(reaches(1, address));
}

// ---- pins --------------------------------------------------------------------------------------

class Pins : public MemoryPolicy {
 protected:
  void expect_refused(const Outcome& outcome, const std::vector<std::string>& holders) const {
    EXPECT_EQ(outcome.status, CUMEMPOOL_IN_USE);
    EXPECT_STREQ(cumempool_last_error()->tag, "kv");
    for (const std::string& holder : holders) {
      EXPECT_TRUE(last_message_has("'" + holder + "'")) << last_message();
    }
  }
};

TEST_F(Pins, R4_EverySleepIsRefusedAndNamesAllHolders) {
  const cumempool_address next = filled("next", 3);
  must(pool.sleep("next", kOffload).status);
  const cumempool_address kv = filled("kv", 1);
  const cumempool_address weights = filled("weights", 2);
  const std::vector<std::string> holders{"nixl agent", "decode worker"};
  pool.pin("kv", "nixl agent");
  pool.pin("kv", "decode worker");
  EXPECT_EQ(pool.snapshot().tag("kv").pins, 2U);
  EXPECT_EQ(pool.snapshot().tag("weights").pins, 0U);
  faults.reset_counts();
  for (const cumempool_on_sleep action : {kOffload, kDiscard}) {
    expect_refused(pool.sleep("kv", action), holders);
    expect_refused(pool.sleep({{{"weights", action}, {"kv", action}}}), holders);
    expect_refused(pool.sleep({{{"kv", action}}, {}, {}, true}), holders);
    expect_refused(pool.swap({{{"weights", action}, {"kv", action}}}, {{"next"}}), holders);
  }
  EXPECT_EQ(faults.calls("fence") + faults.calls("unmap") + faults.calls("copy_to_host"), 0U);
  EXPECT_EQ(pool.find(kv).state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(pool.find(weights).state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(pool.find(next).state, CUMEMPOOL_ASLEEP_BACKED_UP);
  EXPECT_TRUE(holds_pattern(kv, kBytes, 1));
  EXPECT_TRUE(holds_pattern(weights, kBytes, 2));
  must(pool.sleep("weights", kOffload).status);  // nobody pinned it
}

TEST_F(Pins, R12_NothingIsPreparedForASleepThatWillBeRefused) {
  filled("kv", 1);
  filled("weights", 2);
  const std::uint64_t pin = pool.pin("kv", "nixl agent");
  std::uint64_t pinned = 3;
  for (const cumempool_on_sleep action : {kOffload, kDiscard}) {
    EXPECT_EQ(pool.prepare({{{"weights", kOffload}, {"kv", action}}}, pinned), CUMEMPOOL_IN_USE);
    EXPECT_STREQ(cumempool_last_error()->operation, "prepare");
    EXPECT_TRUE(last_message_has("'nixl agent'")) << last_message();
  }
  EXPECT_EQ(pool.prepare({{{"kv", kOffload}}}, pinned, {"weights"}), CUMEMPOOL_IN_USE);
  EXPECT_EQ(pool.prepare({{{"kv", kOffload}}}, pinned, {"nobody"}), CUMEMPOOL_UNKNOWN_TAG);
  EXPECT_EQ(pinned, 3U);
  EXPECT_EQ(host.counters().registered_bytes, 0U);
  must(pool.prepare({{{"kv", kOffload}}}, pinned, {"kv"}));
  EXPECT_EQ(pinned, kBytes) << "the holder has said that it gives way";
  must(cumempool_unpin(pool.get(), pin));
  must(pool.prepare({{{"weights", kOffload}, {"kv", kOffload}}}, pinned));
}

TEST_F(Pins, EachIsTakenOffOnce) {
  filled("kv", 1);
  const std::uint64_t first = pool.pin("kv", "one");
  const std::uint64_t second = pool.pin("kv", "one");
  EXPECT_NE(first, second);
  must(cumempool_unpin(pool.get(), first));
  EXPECT_EQ(cumempool_unpin(pool.get(), first), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_unpin(pool.get(), 1000), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(pool.snapshot().tag("kv").pins, 1U);
  expect_refused(pool.sleep("kv", kOffload), {"one"});
  must(cumempool_unpin(pool.get(), second));
  EXPECT_EQ(pool.snapshot().tag("kv").pins, 0U);
  must(pool.sleep("kv", kOffload).status);
}

TEST_F(Pins, DoNotHinderAWake) {
  const cumempool_address kv = filled("kv", 1);
  must(pool.sleep("kv", kOffload).status);
  const std::uint64_t pin = pool.pin("kv", "nixl");
  EXPECT_EQ(pool.sleep("kv", kOffload).status, CUMEMPOOL_OK) << "nothing of it is awake";
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(kv, kBytes, 1));
  expect_refused(pool.sleep("kv", kOffload), {"nixl"});
  must(cumempool_unpin(pool.get(), pin));
}

TEST_F(Pins, DoNotHinderAFreeOrAClose) {
  const cumempool_address first = filled("kv", 1);
  const cumempool_address second = filled("kv", 2);
  const std::uint64_t pin = pool.pin("kv", "nixl");
  must(cumempool_free(first));
  expect_refused(pool.sleep("kv", kOffload), {"nixl"});
  must(cumempool_free(second));
  must(pool.sleep("kv", kOffload).status);  // nothing is left of it
  must(pool.close());
  EXPECT_EQ(cumempool_unpin(pool.get(), pin), CUMEMPOOL_OK) << "after the close as well";
  std::uint64_t later = 9;
  EXPECT_EQ(cumempool_pin(pool.get(), "kv", "nixl", &later), CUMEMPOOL_CLOSED);
  EXPECT_EQ(later, 9U);
}

TEST_F(Pins, OnATagThatNobodyDeclaredAreRefused) {
  std::uint64_t pin = 9;
  EXPECT_EQ(cumempool_pin(pool.get(), "kv", "nixl", &pin), CUMEMPOOL_UNKNOWN_TAG);
  EXPECT_EQ(pin, 9U);
}

TEST_F(Pins, R7_WaitForATransitionOfAnotherThreadAndNotForTheirOwn) {
  filled("kv", 1);
  std::atomic<bool> inside{false};
  std::atomic<bool> go_on{false};
  std::atomic<int> nested{-1};
  faults.observe([&](const char* entry) {
    if (std::string(entry) != "unmap" || inside) return;
    std::uint64_t pin = 0;
    nested = cumempool_pin(pool.get(), "kv", "nested", &pin);
    inside = true;
    while (!go_on) std::this_thread::yield();
  });
  cumempool_status slept = CUMEMPOOL_INTERNAL;
  std::thread sleeper([&] { slept = pool.sleep("kv", kOffload).status; });
  while (!inside) std::this_thread::yield();
  std::atomic<bool> pinned{false};
  std::thread pinner([&] {
    pool.pin("kv", "nixl");
    pinned = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  EXPECT_FALSE(pinned);
  go_on = true;
  sleeper.join();
  pinner.join();
  faults.observe(nullptr);
  EXPECT_EQ(nested, CUMEMPOOL_BUSY);
  EXPECT_EQ(slept, CUMEMPOOL_OK);
  EXPECT_TRUE(pinned);
  must(pool.wake().status);
  expect_refused(pool.sleep("kv", kOffload), {"nixl"});
}

}  // namespace
}  // namespace cumempool::tests
