// Copies through pinned buffers: bytes, order, errors of either side, and nothing left behind.
#include "backup/bounce_buffers.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "backup/copy_queue.hpp"
#include "conformance_fixture.hpp"
#include "fault_driver.hpp"
#include "host_fixture.hpp"

namespace cumempool::tests {
namespace {

using backup::BounceBuffers;
using backup::CopyQueue;
using driver::Driver;
using driver::FaultDriver;

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::size_t kBuffer = BounceBuffers::kBufferBytes;

std::size_t live_threads() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return static_cast<std::size_t>(std::distance(begin(tasks), end(tasks)));
}

// Where sinks put bytes, and sources find them.
class Shelf {
 public:
  backup::BufferWork sink(std::size_t number) {
    return [this, number](std::byte* data, std::size_t bytes) {
      std::vector<std::byte> copy(data, data + bytes);
      const std::lock_guard lock(mutex_);
      pieces_[number] = std::move(copy);
    };
  }
  backup::BufferWork source(std::size_t number) {
    return [this, number](std::byte* data, std::size_t bytes) {
      const std::lock_guard lock(mutex_);
      ASSERT_EQ(pieces_.at(number).size(), bytes);
      std::memcpy(data, pieces_.at(number).data(), bytes);
    };
  }

 private:
  std::mutex mutex_;
  std::map<std::size_t, std::vector<std::byte>> pieces_;
};

// Bytes of device memory in equal pieces, out to a shelf and in again.
class BounceBuffersTest : public ::testing::Test {
 protected:
  static constexpr std::size_t kPieces = 30;
  static constexpr std::size_t kPiece = 4096;

  void out_all(BounceBuffers& staged) {
    for (std::size_t i = 0; i < kPieces; ++i) staged.out(at(i), kPiece, shelf.sink(i));
    staged.finish();
  }
  void in_all(BounceBuffers& staged) {
    for (std::size_t i = 0; i < kPieces; ++i) staged.in(at(i), kPiece, shelf.source(i));
    staged.finish();
    queue.drain();
  }
  void expect_round_trip(BounceBuffers& staged) {
    write_pattern(memory.address(), kPieces * kPiece, 1);
    out_all(staged);
    write_pattern(memory.address(), kPieces * kPiece, 2);
    in_all(staged);
    EXPECT_TRUE(holds_pattern(memory.address(), kPieces * kPiece, 1));
  }
  cumempool_address at(std::size_t piece) const { return memory.address() + piece * kPiece; }

  Host host{16 * kBuffer / kGranule};
  FaultDriver faults{host.table()};
  Driver table{faults.table()};
  driver::RetainedContext context{table, 0};
  driver::ContextScope scope{table, 0};
  conformance::Block memory{table.table(), kBuffer, {0, 0, 0, 0}};
  CopyQueue queue{table, 0};
  Shelf shelf;
};

// By the number of threads; 0 = the calling thread.
class BounceBuffersThreadsTest : public BounceBuffersTest,
                                 public ::testing::WithParamInterface<unsigned> {};

INSTANTIATE_TEST_SUITE_P(Threads, BounceBuffersThreadsTest, ::testing::Values(0U, 1U, 4U));

TEST_P(BounceBuffersThreadsTest, PiecesOfAnySizeComeBackEqual) {
  BounceBuffers staged(table, queue, GetParam());
  for (const std::size_t bytes : {std::size_t{16}, std::size_t{528}, kMiB - 16, kMiB, kMiB + 16,
                                  3 * kMiB + 4096 + 32, kBuffer - 16, kBuffer}) {
    write_pattern(memory.address(), bytes, 3);
    staged.out(memory.address(), bytes, shelf.sink(0));
    staged.finish();
    write_pattern(memory.address(), bytes, 4);
    staged.in(memory.address(), bytes, shelf.source(0));
    staged.finish();
    queue.drain();
    EXPECT_TRUE(holds_pattern(memory.address(), bytes, 3)) << bytes;
  }
}

TEST_P(BounceBuffersThreadsTest, TakesManyMorePiecesThanItHasBuffers) {
  BounceBuffers staged(table, queue, GetParam());
  for (int round = 0; round < 3; ++round) expect_round_trip(staged);
}

TEST_P(BounceBuffersThreadsTest, CopiesInAreMadeInTheOrderOfTheCalls) {
  BounceBuffers staged(table, queue, GetParam());
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < kPieces; ++i) {
    const auto source = [i](std::byte* data, std::size_t bytes) {
      if (i % 3 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      std::memset(data, static_cast<int>(i), bytes);
    };
    const std::uint64_t before = queue.enqueued();
    staged.in(memory.address(), kPiece, source);
    staged.when_queued([&, i, before] {
      EXPECT_GT(queue.enqueued(), before);
      order.push_back(i);
    });
  }
  staged.finish();
  queue.drain();
  ASSERT_EQ(order.size(), kPieces);
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
  EXPECT_TRUE(all_are(memory.address(), kPiece, kPieces - 1)) << "the last call has the last word";
}

TEST_P(BounceBuffersThreadsTest, ChangingTheDirectionFinishesFirst) {
  BounceBuffers staged(table, queue, GetParam());
  for (std::uint8_t i = 1; i < 20; ++i) {
    staged.in(memory.address(), kPiece,
              [i](std::byte* data, std::size_t bytes) { std::memset(data, i, bytes); });
    std::atomic<int> seen{0};
    staged.out(memory.address(), kPiece,
               [&](std::byte* data, std::size_t) { seen = std::to_integer<int>(*data); });
    staged.finish();
    EXPECT_EQ(seen, i);
  }
}

TEST_P(BounceBuffersThreadsTest, TheFirstErrorOfAThreadIsThrownAndAbandonMakesItReady) {
  BounceBuffers staged(table, queue, GetParam());
  for (const bool outwards : {true, false}) {
    for (const std::size_t bad : {std::size_t{0}, kPieces / 2, kPieces - 1}) {
      std::atomic<int> running{0};
      const auto step = [&](std::size_t i) {
        const auto work = [&running, i, bad](std::byte*, std::size_t) {
          ++running;
          std::this_thread::sleep_for(std::chrono::microseconds(200));
          --running;
          if (i == bad) throw Error(CUMEMPOOL_BACKUP_FAILED, "piece " + std::to_string(i));
        };
        outwards ? staged.out(at(i), kPiece, work) : staged.in(at(i), kPiece, work);
      };
      const auto all = [&] {
        for (std::size_t i = 0; i < kPieces; ++i) step(i);
        staged.finish();
      };
      try {
        all();
        ADD_FAILURE() << "nothing was thrown";
      } catch (const Error& error) {
        EXPECT_EQ(error.problem, "piece " + std::to_string(bad));
        EXPECT_EQ(error.status, CUMEMPOOL_BACKUP_FAILED);
      }
      EXPECT_THROW(step(0), Error) << "until it is abandoned";
      EXPECT_THROW(staged.finish(), Error);
      staged.abandon();
      EXPECT_EQ(running, 0);
      EXPECT_EQ(host.counters().queued_commands, 0U);
      expect_round_trip(staged);
    }
  }
}

TEST_F(BounceBuffersTest, AfterAnErrorTheJobsThatWaitAreSkipped) {
  BounceBuffers staged(table, queue, 1);
  std::atomic<std::size_t> calls{0};
  const auto all = [&] {
    for (std::size_t i = 0; i < kPieces; ++i) {
      staged.out(at(i), kPiece, [&](std::byte*, std::size_t) {
        if (++calls == 3) throw Error(CUMEMPOOL_BACKUP_FAILED, "the third");
      });
    }
    staged.finish();
  };
  EXPECT_THROW(all(), Error);
  staged.abandon();
  EXPECT_EQ(calls, 3U);
}

TEST_F(BounceBuffersTest, OtherExceptionsBecomeErrors) {
  BounceBuffers staged(table, queue);
  const auto status_of = [&](const auto& exception) {
    try {
      staged.out(at(0), kPiece, [&](std::byte*, std::size_t) { throw exception; });
      staged.finish();
    } catch (const Error& error) {
      staged.abandon();
      return error;
    }
    return Error(CUMEMPOOL_OK, "");
  };
  EXPECT_EQ(status_of(std::bad_alloc()).status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  const Error other = status_of(std::runtime_error("out of luck"));
  EXPECT_EQ(other.status, CUMEMPOOL_INTERNAL);
  EXPECT_NE(other.problem.find("out of luck"), std::string::npos);
}

TEST_F(BounceBuffersTest, ACallWaitsForTheCopiesBeforeItAndForNoOthers) {
  BounceBuffers staged(table, queue, 1);
  std::vector<int> calls;
  staged.when_queued([&] { calls.push_back(0); });
  EXPECT_EQ(calls.size(), 1U) << "there is nothing to wait for";
  std::atomic<bool> go{false};
  staged.in(at(0), kPiece, [&](std::byte*, std::size_t) {
    while (!go) std::this_thread::yield();
  });
  const std::uint64_t before = queue.enqueued();
  staged.when_queued([&] {
    calls.push_back(1);
    EXPECT_EQ(queue.enqueued(), before + 1);
  });
  staged.when_queued([&] { calls.push_back(2); });
  staged.in(at(1), kPiece, [](std::byte*, std::size_t) {});
  EXPECT_EQ(calls.size(), 1U);
  go = true;
  staged.finish();
  queue.drain();
  EXPECT_EQ(calls, (std::vector<int>{0, 1, 2}));
}

TEST_F(BounceBuffersTest, WhatSuchACallThrowsComesOut) {
  BounceBuffers staged(table, queue);
  staged.in(at(0), kPiece, [](std::byte*, std::size_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  });
  const auto rest = [&] {
    staged.when_queued([] { throw Error(CUMEMPOOL_DRIVER_ERROR, "no event"); });
    staged.finish();
  };
  EXPECT_THROW(rest(), Error);
  EXPECT_THROW(staged.when_queued([] {}), Error) << "nobody knows what is in the queue";
  staged.abandon();
  expect_round_trip(staged);
}

TEST_F(BounceBuffersTest, AllThreadsWorkAtATime) {
  constexpr int wanted = BounceBuffers::kThreads;
  BounceBuffers staged(table, queue);
  for (const bool outwards : {true, false}) {
    std::mutex mutex;
    std::condition_variable changed;
    int running = 0;
    int most = 0;
    const auto work = [&](std::byte*, std::size_t) {
      std::unique_lock lock(mutex);
      most = std::max(most, ++running);
      changed.notify_all();
      changed.wait_for(lock, std::chrono::seconds(20), [&] { return most >= wanted; });
      --running;
    };
    for (std::size_t i = 0; i < kPieces; ++i) {
      outwards ? staged.out(at(i), kPiece, work) : staged.in(at(i), kPiece, work);
    }
    staged.finish();
    EXPECT_GE(most, wanted) << (outwards ? "out" : "in");
  }
}

// A disk answers out of order: what came early must not keep the rest from being read.
TEST_F(BounceBuffersTest, AllThreadsGoOnWorkingWhileTheFirstPieceIsLate) {
  constexpr std::size_t wanted = BounceBuffers::kThreads + 2;
  BounceBuffers staged(table, queue);
  std::mutex mutex;
  std::condition_variable changed;
  std::size_t begun = 0;
  for (std::size_t i = 0; i < kPieces; ++i) {
    staged.in(at(i), kPiece, [&, i](std::byte*, std::size_t) {
      std::unique_lock lock(mutex);
      ++begun;
      changed.notify_all();
      if (i != 0) return;
      changed.wait_for(lock, std::chrono::seconds(20), [&] { return begun >= wanted; });
      EXPECT_GE(begun, wanted);
    });
  }
  staged.finish();
}

TEST_F(BounceBuffersTest, OthersMayDrainTheQueue) {
  BounceBuffers staged(table, queue);
  for (int i = 0; i < 5; ++i) {
    expect_round_trip(staged);  // drains it, with buffers that it has not settled
    const std::size_t mark = queue.mark();
    queue.wait(mark);
    queue.end_mark(mark);
  }
}

TEST_F(BounceBuffersTest, R13_MakesItsBuffersAtFirstUseAndGivesAllBack) {
  std::thread([] {}).join();  // the thread sanitizer starts one of its own beside the first
  const std::size_t threads = live_threads();
  BounceBuffers staged(table, queue, 3);
  staged.finish();
  staged.abandon();
  EXPECT_EQ(staged.bytes(), 0U);
  EXPECT_EQ(host.counters().registrations, 0U);
  EXPECT_EQ(staged.release(), 0U);
  for (int round = 0; round < 2; ++round) {
    expect_round_trip(staged);
    EXPECT_GE(staged.bytes(), 4 * kBuffer);
    EXPECT_EQ(host.counters().registered_bytes, staged.bytes());
    EXPECT_EQ(host.counters().registrations, 1U);
    EXPECT_EQ(live_threads(), threads + 3);
    const std::uint64_t held = staged.bytes();
    EXPECT_EQ(staged.release(), held);
    EXPECT_EQ(staged.bytes(), 0U);
    EXPECT_EQ(host.counters().registrations, 0U);
    EXPECT_EQ(host.counters().events, 0U);
    EXPECT_EQ(live_threads(), threads);
  }
}

TEST_F(BounceBuffersTest, BuffersThatWillNotBeUnpinnedStayInUse) {
  BounceBuffers staged(table, queue);
  expect_round_trip(staged);
  const std::uint64_t held = staged.bytes();
  faults.fail_nth("host_unregister", 1, CUMEMPOOL_RESULT_OPERATING_SYSTEM);
  EXPECT_EQ(staged.release(), 0U);
  EXPECT_EQ(staged.bytes(), held);
  expect_round_trip(staged);
  EXPECT_EQ(staged.release(), held);
}

TEST_F(BounceBuffersTest, MemoryThatCannotBePinnedIsNamedAsSuch) {
  BounceBuffers staged(table, queue);
  faults.fail_nth("host_register", 1, CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  try {
    staged.out(at(0), kPiece, shelf.sink(0));
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
    EXPECT_NE(error.message().find("ulimit -l"), std::string::npos);
  }
  EXPECT_EQ(staged.bytes(), 0U);
  expect_round_trip(staged);
}

TEST_F(BounceBuffersTest, AbandonThatFailsMayBeRepeated) {
  BounceBuffers staged(table, queue);
  for (std::size_t i = 0; i < 5; ++i) staged.out(at(i), kPiece, shelf.sink(i));
  faults.fail_nth("stream_synchronize", 1, CUMEMPOOL_RESULT_OPERATING_SYSTEM);
  EXPECT_THROW(staged.abandon(), Error);
  EXPECT_THROW(staged.out(at(0), kPiece, shelf.sink(0)), Error);
  EXPECT_THROW(staged.finish(), Error);
  staged.abandon();
  expect_round_trip(staged);
}

TEST_F(BounceBuffersTest, AfterAnAbandonThatFailedTheBuffersCanBeReleased) {
  BounceBuffers staged(table, queue);
  for (std::size_t i = 0; i < 5; ++i) staged.out(at(i), kPiece, shelf.sink(i));
  faults.fail_nth("stream_synchronize", 1, CUMEMPOOL_RESULT_OPERATING_SYSTEM);
  EXPECT_THROW(staged.abandon(), Error);
  EXPECT_NE(staged.release(), 0U) << "unpinning waits for the copies";
  staged.abandon();
  expect_round_trip(staged);
}

// R4: whichever call the driver fails, an Error is thrown, and after abandon() all is as
// before.
TEST_P(BounceBuffersThreadsTest, R4_EveryDriverCallMayFail) {
  for (const char* entry : {"context_enter", "context_leave", "context_retain", "context_release",
                            "event_destroy", "host_unregister"}) {
    faults.exclude(entry);
  }
  std::uint64_t failed = 0;
  for (std::uint64_t n = 1; n <= failed + 1; ++n) {
    BounceBuffers staged(table, queue, GetParam());
    write_pattern(memory.address(), kPieces * kPiece, 1);
    const std::uint64_t before = faults.failures();
    faults.fail_nth_of_any(n, CUMEMPOOL_RESULT_OPERATING_SYSTEM);
    try {
      out_all(staged);
      in_all(staged);
      EXPECT_EQ(faults.failures(), before) << "call " << n << " failed, and nobody said so";
    } catch (const Error& error) {
      EXPECT_FALSE(error.driver_call.empty());
      ++failed;
    }
    faults.fail_nothing();
    staged.abandon();
    queue.drain();
    EXPECT_EQ(host.counters().queued_commands, 0U);
    expect_round_trip(staged);
    staged.release();
    EXPECT_EQ(host.counters().registrations, 0U);
  }
  EXPECT_GT(failed, 4 * kPieces) << "each piece is copied and recorded, twice";
}

}  // namespace
}  // namespace cumempool::tests
