// The functions that torch opens by name, called as torch calls them.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <set>
#include <thread>

#include "fault_driver.hpp"
#include "host_fixture.hpp"

#define EACH_OF_8(X, a, b, c, d, e, f, g, h) X(a) X(b) X(c) X(d) X(e) X(f) X(g) X(h)
#define EACH_SLOT(X)                           \
  EACH_OF_8(X, 0, 1, 2, 3, 4, 5, 6, 7)         \
  EACH_OF_8(X, 8, 9, 10, 11, 12, 13, 14, 15)   \
  EACH_OF_8(X, 16, 17, 18, 19, 20, 21, 22, 23) \
  EACH_OF_8(X, 24, 25, 26, 27, 28, 29, 30, 31) \
  EACH_OF_8(X, 32, 33, 34, 35, 36, 37, 38, 39) \
  EACH_OF_8(X, 40, 41, 42, 43, 44, 45, 46, 47) \
  EACH_OF_8(X, 48, 49, 50, 51, 52, 53, 54, 55) \
  EACH_OF_8(X, 56, 57, 58, 59, 60, 61, 62, 63)

#define DECLARE_SLOT(n)                                                \
  void* cumempool_malloc_##n(ssize_t bytes, int device, void* stream); \
  void cumempool_free_##n(void* address, ssize_t bytes, int device, void* stream);
extern "C" {
EACH_SLOT(DECLARE_SLOT)
}

namespace cumempool::tests {
namespace {

using Malloc = void* (*)(ssize_t, int, void*);
using Free = void (*)(void*, ssize_t, int, void*);

#define MALLOC_OF(n) &cumempool_malloc_##n,
#define FREE_OF(n) &cumempool_free_##n,
constexpr std::array<Malloc, 64> kMallocs = {EACH_SLOT(MALLOC_OF)};
constexpr std::array<Free, 64> kFrees = {EACH_SLOT(FREE_OF)};

cumempool_address address_of(const void* pointer) {
  return static_cast<cumempool_address>(reinterpret_cast<std::uintptr_t>(pointer));
}

class BoundSlot {
 public:
  BoundSlot(const Pool& pool, const char* tag,
            decltype(&cumempool_bind_slot) bind = &cumempool_bind_slot) {
    pool.declare(tag);
    must(bind(pool.get(), tag, &slot_));
  }
  ~BoundSlot() { unbind(); }
  BoundSlot(const BoundSlot&) = delete;
  BoundSlot(BoundSlot&&) = delete;
  BoundSlot& operator=(const BoundSlot&) = delete;
  BoundSlot& operator=(BoundSlot&&) = delete;

  void unbind() {
    if (!bound_) return;
    EXPECT_EQ(cumempool_unbind_slot(slot_), CUMEMPOOL_OK);
    bound_ = false;
  }
  std::uint32_t number() const { return slot_; }
  void* malloc(ssize_t bytes, int device = 0) const {
    return kMallocs.at(slot_)(bytes, device, nullptr);
  }
  void free(void* pointer) const { kFrees.at(slot_)(pointer, 0, 0, nullptr); }

 private:
  std::uint32_t slot_ = 0;
  bool bound_ = true;
};

class Slots : public ::testing::Test {
 protected:
  Host host;
  Pool pool{host};
};

TEST_F(Slots, AllocateUnderTheTagTheyAreBoundTo) {
  const BoundSlot weights(pool, "weights");
  const BoundSlot kv(pool, "kv");
  EXPECT_NE(weights.number(), kv.number());
  void* const first = weights.malloc(100);
  void* const second = kv.malloc(kGranule + 1, 1);
  EXPECT_STREQ(pool.find(address_of(first)).tag, "weights");
  EXPECT_STREQ(pool.find(address_of(second)).tag, "kv");
  EXPECT_EQ(pool.find(address_of(second)).device, 1);
  EXPECT_EQ(pool.find(address_of(second)).requested_bytes, kGranule + 1);
  write_pattern(address_of(second), 2 * kGranule, 1);
  weights.free(first);
  kv.free(second);
  EXPECT_EQ(host.counters().charged_bytes, 0U);
}

TEST_F(Slots, EachOfThemIsBoundOnceAndThenTheyAreOut) {
  ASSERT_EQ(cumempool_slot_count(), 64U);
  pool.declare("kv");
  std::set<std::uint32_t> bound;
  std::uint32_t slot = 0;
  for (std::uint32_t i = 0; i < cumempool_slot_count(); ++i) {
    ASSERT_EQ(cumempool_bind_slot(pool.get(), "kv", &slot), CUMEMPOOL_OK);
    bound.insert(slot);
  }
  EXPECT_EQ(bound.size(), 64U);
  for (const std::uint32_t number : bound) {
    void* const memory = kMallocs.at(number)(1, 0, nullptr);
    EXPECT_NE(memory, nullptr) << number;
    kFrees.at(number)(memory, 1, 0, nullptr);
  }
  slot = 99;
  EXPECT_EQ(cumempool_bind_slot(pool.get(), "kv", &slot), CUMEMPOOL_OUT_OF_SLOTS);
  EXPECT_EQ(slot, 99U);
  EXPECT_STREQ(cumempool_last_error()->tag, "kv");
  EXPECT_STRNE(cumempool_last_error()->advice, "");
  EXPECT_EQ(cumempool_unbind_slot(17), CUMEMPOOL_OK);
  EXPECT_EQ(cumempool_bind_slot(pool.get(), "kv", &slot), CUMEMPOOL_OK);
  EXPECT_EQ(slot, 17U) << "a slot is free again when it is unbound";
  for (const std::uint32_t number : bound) EXPECT_EQ(cumempool_unbind_slot(number), CUMEMPOOL_OK);
}

TEST_F(Slots, ThatAreNotBoundReturnNullAndCannotBeUnbound) {
  BoundSlot slot(pool, "kv");
  slot.unbind();
  EXPECT_EQ(slot.malloc(100), nullptr);
  EXPECT_EQ(cumempool_unbind_slot(slot.number()), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_unbind_slot(64), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_unbind_slot(UINT32_MAX), CUMEMPOOL_INVALID_ARGUMENT);
}

TEST_F(Slots, R1_OutOfMemoryReturnsNullAndLeavesNoErrorBehind) {
  const BoundSlot slot(pool, "kv");
  cumempool_address address = 0;
  ASSERT_EQ(cumempool_free(1), CUMEMPOOL_NOT_OWNED);  // the thread's last error from now on
  EXPECT_EQ(slot.malloc((kDeviceGranules + 1) * kGranule), nullptr);
  EXPECT_EQ(cumempool_last_error()->status, CUMEMPOOL_NOT_OWNED);
  void* const memory = slot.malloc(kDeviceGranules * kGranule);
  EXPECT_NE(memory, nullptr) << "what fits is still granted";
  EXPECT_EQ(slot.malloc(1), nullptr);
  slot.free(memory);
  EXPECT_EQ(pool.try_malloc("kv", 1, 0, address), CUMEMPOOL_OK);

  const Picture picture = pool.snapshot();
  EXPECT_EQ(picture.totals.malloc_failures, 2U);
  EXPECT_EQ(picture.totals.malloc_calls, 4U);
  EXPECT_NE(picture.last_malloc_failure.find("OUT_OF_MEMORY"), std::string::npos)
      << picture.last_malloc_failure;
  EXPECT_NE(picture.last_malloc_failure.find("'kv'"), std::string::npos);
  expect_exact_numbers(pool, host);
}

TEST_F(Slots, R1_SizesAndDevicesThatCannotBeReturnNull) {
  const BoundSlot slot(pool, "kv");
  constexpr ssize_t kHuge = ssize_t{1} << 62;
  for (const ssize_t bytes :
       {ssize_t{0}, ssize_t{-1}, -kHuge, kHuge, kHuge + 1, ssize_t{PTRDIFF_MAX}}) {
    EXPECT_EQ(slot.malloc(bytes), nullptr) << bytes;
  }
  for (const int device : {-1, 2, 64, INT32_MAX, INT32_MIN}) {
    EXPECT_EQ(slot.malloc(1, device), nullptr) << device;
  }
  expect_exact_numbers(pool, host);
  EXPECT_EQ(host.counters().reserved_bytes, 0U);
}

TEST_F(Slots, R1_FreeTakesAnythingAndTouchesNothingOfOthers) {
  const BoundSlot slot(pool, "kv");
  int on_stack = 5;
  slot.free(nullptr);
  slot.free(&on_stack);
  void* const memory = slot.malloc(1);
  slot.free(static_cast<char*>(memory) + 1);
  EXPECT_EQ(pool.find(address_of(memory)).address, address_of(memory));
  slot.free(memory);
  slot.free(memory);
  EXPECT_EQ(pool.snapshot().totals.free_calls, 1U);
}

TEST_F(Slots, R10_FreeGoesOnWorkingAfterUnbind) {
  BoundSlot first(pool, "weights");
  void* const memory = first.malloc(kGranule);
  first.unbind();
  const BoundSlot second(pool, "kv");  // the same slot, for another tag
  ASSERT_EQ(second.number(), first.number());
  EXPECT_STREQ(pool.find(address_of(memory)).tag, "weights");
  first.free(memory);
  EXPECT_EQ(host.counters().reserved_bytes, 0U);
}

TEST_F(Slots, R6_FreeGoesOnWorkingWhileAsleepAndFromAnyThread) {
  const BoundSlot slot(pool, "weights", &cumempool_bind_lasting_slot);
  void* const memory = slot.malloc(kGranule);
  must(pool.sleep("weights", kOffload).status);
  std::thread([&] { slot.free(memory); }).join();
  EXPECT_EQ(host.counters().reserved_bytes, 0U);
  EXPECT_EQ(pool.snapshot().totals.host_used_bytes, 0U);
}

TEST_F(Slots, R6_FreeGoesOnWorkingAfterCloseAndAfterTheHandleIsGone) {
  BoundSlot slot(pool, "weights");
  void* const first = slot.malloc(kGranule);
  void* const second = slot.malloc(2 * kGranule);
  EXPECT_EQ(pool.close(), CUMEMPOOL_IN_USE);
  EXPECT_EQ(pool.close(true), CUMEMPOOL_OK);
  EXPECT_EQ(host.counters().charged_bytes, 0U);
  EXPECT_EQ(host.counters().reserved_bytes, 3 * kGranule) << "reserved until they are freed";
  EXPECT_EQ(slot.malloc(1), nullptr);
  slot.free(first);
  EXPECT_EQ(host.counters().reserved_bytes, 2 * kGranule);
  slot.unbind();
  pool.destroy();
  slot.free(second);
  host.expect_empty();
}

TEST_F(Slots, BindingIsRefusedAfterClose) {
  pool.declare("kv");
  must(pool.close());
  std::uint32_t slot = 0;
  EXPECT_EQ(cumempool_bind_slot(pool.get(), "kv", &slot), CUMEMPOOL_CLOSED);
}

TEST_F(Slots, ABoundSlotKeepsTheAllocatorFromClosing) {
  BoundSlot slot(pool, "kv");
  EXPECT_EQ(pool.close(), CUMEMPOOL_IN_USE);
  EXPECT_NE(std::string(cumempool_last_error()->message).find("1 open scope"), std::string::npos);
  slot.unbind();
  EXPECT_EQ(pool.close(), CUMEMPOOL_OK);
}

TEST_F(Slots, CountWhatTheyWereAskedForSinceTheyWereBound) {
  std::uint64_t count = 99;
  std::uint32_t number = 0;
  {
    const BoundSlot slot(pool, "kv");
    number = slot.number();
    EXPECT_EQ(cumempool_slot_mallocs(number, &count), CUMEMPOOL_OK);
    EXPECT_EQ(count, 0U);
    slot.free(slot.malloc(1));
    EXPECT_EQ(slot.malloc(ssize_t{1} << 62), nullptr);
    EXPECT_EQ(cumempool_slot_mallocs(number, &count), CUMEMPOOL_OK);
    EXPECT_EQ(count, 2U);
  }
  EXPECT_EQ(cumempool_slot_mallocs(number, &count), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_slot_mallocs(UINT32_MAX, &count), CUMEMPOOL_INVALID_ARGUMENT);
  const BoundSlot again(pool, "kv");
  EXPECT_EQ(cumempool_slot_mallocs(again.number(), &count), CUMEMPOOL_OK);
  EXPECT_EQ(count, 0U);
  EXPECT_EQ(cumempool_slot_mallocs(again.number(), nullptr), CUMEMPOOL_INVALID_ARGUMENT);
}

// ---- and sleep ---------------------------------------------------------------------------------

TEST_F(Slots, ATagCannotSleepWhileASlotOfItIsBound) {
  const auto other = pool.malloc("other", kGranule);
  BoundSlot slot(pool, "kv");
  void* const memory = slot.malloc(1);
  const SleepCall both{{{"other", kOffload}, {"kv", kDiscard}}};
  for (const Outcome& refused : {pool.sleep(both), pool.sleep("kv", kOffload), pool.swap(both)}) {
    EXPECT_EQ(refused.status, CUMEMPOOL_IN_USE);
  }
  EXPECT_STREQ(cumempool_last_error()->operation, "swap");
  EXPECT_STREQ(cumempool_last_error()->tag, "kv");
  EXPECT_STRNE(cumempool_last_error()->advice, "");
  EXPECT_EQ(pool.find(address_of(memory)).state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(pool.find(other).state, CUMEMPOOL_AWAKE) << "all or nothing";
  EXPECT_EQ(pool.sleep("other", kOffload).status, CUMEMPOOL_OK);
  slot.unbind();
  EXPECT_EQ(pool.sleep("kv", kOffload).status, CUMEMPOOL_OK);
  const BoundSlot later(pool, "kv");  // of what sleeps it is given nothing
  void* const more = later.malloc(1);
  EXPECT_EQ(pool.find(address_of(more)).state, CUMEMPOOL_AWAKE);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_OK);
  later.free(memory);
  later.free(more);
}

TEST_F(Slots, ALastingSlotLetsItsTagSleep) {
  const BoundSlot slot(pool, "graphs", &cumempool_bind_lasting_slot);
  void* const memory = slot.malloc(1);
  write_pattern(address_of(memory), kGranule, 3);
  EXPECT_EQ(pool.sleep("graphs", kOffload).status, CUMEMPOOL_OK);
  EXPECT_EQ(pool.wake().status, CUMEMPOOL_OK);
  EXPECT_TRUE(holds_pattern(address_of(memory), kGranule, 3));
  slot.free(memory);
}

// What a scope is given never sleeps before it ends, whichever thread comes first.
TEST_F(Slots, WhatAScopeIsGivenStaysAwakeWhileOthersPutItsTagToSleep) {
  pool.declare("kv");
  std::atomic<bool> stop{false};
  std::atomic<int> slept{0};
  std::thread sleeper([&] {
    while (!stop) {
      const cumempool_status status = pool.sleep("kv", kOffload).status;
      if (status == CUMEMPOOL_OK) ++slept;
      EXPECT_TRUE(status == CUMEMPOOL_OK || status == CUMEMPOOL_IN_USE);
      EXPECT_EQ(pool.wake().status, CUMEMPOOL_OK);
    }
  });
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(500);
  for (std::uint32_t seed = 0; std::chrono::steady_clock::now() < end || slept == 0; ++seed) {
    void* left = nullptr;  // dies when its scope has ended
    {
      const BoundSlot slot(pool, "kv");
      left = slot.malloc(kGranule);
      EXPECT_EQ(pool.find(address_of(left)).state, CUMEMPOOL_AWAKE);
      write_pattern(address_of(left), kGranule, seed);
      EXPECT_TRUE(holds_pattern(address_of(left), kGranule, seed));
    }
    std::this_thread::yield();
    kFrees.front()(left, 0, 0, nullptr);
  }
  stop = true;
  sleeper.join();
}

// ---- failures ----------------------------------------------------------------------------------

TEST_F(Slots, R1_AFailureOfAnyDriverCallReturnsNull) {
  driver::FaultDriver faults(host.table());
  const Pool faulty(faults.table());
  const BoundSlot slot(faulty, "kv");
  slot.free(slot.malloc(1));
  for (const char* entry : {"reserve", "create", "map", "set_access"}) {
    faults.fail_nth(entry, 1, 719);
    EXPECT_EQ(slot.malloc(1), nullptr) << entry;
    EXPECT_EQ(host.counters().reserved_bytes, 0U) << entry;
  }
}

}  // namespace
}  // namespace cumempool::tests
