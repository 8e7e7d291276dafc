// R14: a forked child is told so by every call, and the parent goes on as before.
#include <sys/wait.h>
#include <unistd.h>

#include <string>

#include "host_fixture.hpp"

extern "C" {
void* cumempool_malloc_0(ssize_t bytes, int device, void* stream);
void cumempool_free_0(void* address, ssize_t bytes, int device, void* stream);
}

namespace cumempool::tests {
namespace {

// Runs `body` in a forked child and returns what it returned; -1 where the child crashed.
template <typename Body>
int in_child(const Body& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) return -1;
  return WEXITSTATUS(status);
}

class Fork : public ::testing::Test {
 protected:
  Host host;
  Pool pool{host};
};

TEST_F(Fork, R14_EveryCallInTheChildFailsWithANamedError) {
  const auto address = pool.malloc("weights", kGranule);
  // Returns the number of the first call that did not answer as it should; 0 = all did.
  const auto child = [&] {
    int number = 0;
    const auto forked = [&](cumempool_status status) {
      ++number;
      return status == CUMEMPOOL_FORKED && cumempool_last_error()->status == CUMEMPOOL_FORKED;
    };
    cumempool_allocation_info info{};
    info.size = sizeof info;
    cumempool_address made = 0;
    cumempool_snapshot* snapshot = nullptr;
    cumempool_allocator* allocator = nullptr;
    const cumempool_driver* driver = nullptr;
    const cumempool_allocator_options options = pool_options();
    std::uint64_t bytes = 0;
    std::uint32_t slot = 0;
    const bool all =
        forked(pool.sleep("weights", kOffload).status) && forked(pool.wake().status) &&
        forked(pool.try_malloc("weights", 1, 0, made)) && forked(cumempool_free(address)) &&
        forked(cumempool_find(nullptr, address, &info)) &&
        forked(cumempool_take_snapshot(pool.get(), 1, &snapshot)) &&
        forked(cumempool_bind_slot(pool.get(), "weights", &slot)) &&
        forked(cumempool_unbind_slot(0)) &&
        forked(cumempool_release_host_memory(pool.get(), &bytes)) &&
        forked(cumempool_declare_tag(pool.get(), "a", kOffload, CUMEMPOOL_ON_WAKE_UNSET)) &&
        forked(pool.close(true)) && forked(cumempool_cuda_driver(&driver)) &&
        forked(cumempool_allocator_create(&host.table(), &options, &allocator));
    return all ? 0 : number;
  };
  EXPECT_EQ(in_child(child), 0);
}

TEST_F(Fork, R12_TheErrorSaysWhatToDo) {
  const auto child = [&] {
    (void)pool.wake();
    return std::string(cumempool_last_error()->message).find("spawn") == std::string::npos ? 1 : 0;
  };
  EXPECT_EQ(in_child(child), 0);
}

TEST_F(Fork, R1_SlotsInTheChildReturnNullAndFreeNothing) {
  pool.declare("weights");
  std::uint32_t slot = 9;
  must(cumempool_bind_slot(pool.get(), "weights", &slot));
  ASSERT_EQ(slot, 0U);
  void* const memory = cumempool_malloc_0(100, 0, nullptr);
  ASSERT_NE(memory, nullptr);
  EXPECT_EQ(in_child([&] {
              cumempool_free_0(memory, 100, 0, nullptr);
              return cumempool_malloc_0(100, 0, nullptr) == nullptr ? 0 : 1;
            }),
            0);
  cumempool_free_0(memory, 100, 0, nullptr);
  EXPECT_EQ(host.counters().reserved_bytes, 0U);
  must(cumempool_unbind_slot(slot));
}

TEST_F(Fork, R14_DestroyingInTheChildTouchesNothing) {
  const auto address = pool.malloc("weights", kGranule);
  write_pattern(address, kGranule, 1);
  EXPECT_EQ(in_child([&] {
              cumempool_allocator_destroy(pool.get());
              cumempool_host_driver_destroy(&host.table());
              return 0;
            }),
            0);
  EXPECT_TRUE(holds_pattern(address, kGranule, 1));
}

TEST_F(Fork, R14_TheParentGoesOnAsleepOrAwake) {
  const auto address = pool.malloc("weights", kGranule);
  write_pattern(address, kGranule, 1);
  EXPECT_EQ(in_child([] { return 0; }), 0);
  must(pool.sleep("weights", kOffload).status);
  EXPECT_EQ(in_child([&] { return pool.wake().status == CUMEMPOOL_FORKED ? 0 : 1; }), 0);
  must(pool.wake().status);
  EXPECT_TRUE(holds_pattern(address, kGranule, 1));
  expect_exact_numbers(pool, host);
}

}  // namespace
}  // namespace cumempool::tests
