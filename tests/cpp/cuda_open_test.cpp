// How the `cuda` driver opens libcuda, on a fake one: what it says when it cannot, that it tries
// again, and which symbols it can do without. Each case runs in a child process, since libcuda is
// never closed.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "driver/builtin.hpp"
#include "driver/driver.hpp"

namespace cumempool::driver {
namespace {

// A library that is loaded already is found by the name that it gives itself.
void load_fake() {
  if (dlopen(FAKE_LIBCUDA, RTLD_NOW | RTLD_LOCAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    _exit(2);
  }
}

std::string failure_to_open() {
  try {
    cuda_driver();
  } catch (const Error& error) {
    return (error.status == CUMEMPOOL_UNAVAILABLE ? "" : "wrong status: ") + error.message();
  }
  return "opened";
}

[[noreturn]] void say_and_exit(const std::string& text) {
  std::fprintf(stderr, "%s\n", text.c_str());
  _exit(0);
}

[[noreturn]] void open_fake(const char* variable, const char* value) {
  setenv(variable, value, 1);
  load_fake();
  say_and_exit(failure_to_open());
}

[[noreturn]] void open_again_after_failure() {
  setenv("FAKE_CUINIT", "999", 1);
  load_fake();
  const std::string first = failure_to_open();
  unsetenv("FAKE_CUINIT");
  say_and_exit(first.find("CUDA_ERROR_UNKNOWN") == std::string::npos ? first : failure_to_open());
}

[[noreturn]] void name_of_second_device() {
  setenv("FAKE_DEVICES", "2", 1);
  load_fake();
  const Driver driver(cuda_driver());
  say_and_exit(std::to_string(driver.device_count()) + " devices, " + driver.device_name(1));
}

[[noreturn]] void export_without_the_symbol() {
  setenv("FAKE_MISSING", "cuMemExportToShareableHandle", 1);
  load_fake();
  const cumempool_driver& table = cuda_driver();
  int fd = -1;
  const auto result = table.export_handle(table.self, 1, CUMEMPOOL_HANDLE_POSIX_FD, &fd);
  say_and_exit(result_name(result));
}

[[noreturn]] void unmap_parts_of_what_was_mapped() {
  load_fake();
  const cumempool_driver& table = cuda_driver();
  void* self = table.self;
  const auto first = table.map(self, 4096, 4096, 1);
  const auto second = table.map(self, 8192, 4096, 1);
  const auto both = table.unmap(self, 4096, 8192);
  const auto part = table.unmap(self, 4096, 2048);
  const auto exact = table.unmap(self, 4096, 4096);
  const auto again = table.unmap(self, 4096, 4096);
  std::string results;
  for (const auto result : {first, second, both, part, exact, again}) {
    results += std::to_string(result) + " ";
  }
  say_and_exit(results);
}

[[noreturn]] void use_context_without_entering() {
  load_fake();
  const cumempool_driver& table = cuda_driver();
  cumempool_stream stream = 0;
  cumempool_context_token token{};
  const auto outside = table.stream_create(table.self, 0, &stream);
  const auto not_held = table.context_enter(table.self, 0, &token);
  say_and_exit(std::to_string(outside) + " " + std::to_string(not_held));
}

const testing::ExitedWithCode normally(0);

TEST(CudaOpenDeathTest, FailingInitSaysResultAndAdvice) {
  EXPECT_EXIT(open_fake("FAKE_CUINIT", "100"), normally,
              "opening the CUDA driver: cuInit returned CUDA_ERROR_NO_DEVICE \\(100\\). "
              "Check CUDA_VISIBLE_DEVICES");
  EXPECT_EXIT(open_fake("FAKE_CUINIT", "803"), normally, "reboot after the driver update");
}

TEST(CudaOpenDeathTest, MissingRequiredSymbolIsNamedWithItsVersion) {
  EXPECT_EXIT(open_fake("FAKE_MISSING", "cuMemCreate"), normally,
              "libcuda.so.1 has no cuMemCreate, which came with CUDA 10.2. Install");
}

TEST(CudaOpenDeathTest, MissingOptionalSymbolIsNotSupported) {
  EXPECT_EXIT(export_without_the_symbol(), normally, "CUDA_ERROR_NOT_SUPPORTED");
}

TEST(CudaOpenDeathTest, FailureIsTriedAgain) {
  EXPECT_EXIT(open_again_after_failure(), normally, "opened");
}

TEST(CudaOpenDeathTest, DevicesAreThoseOfTheDriver) {
  EXPECT_EXIT(name_of_second_device(), normally, "2 devices, device 71");
}

TEST(CudaOpenDeathTest, C6UnmapTakesExactlyOneMapping) {
  EXPECT_EXIT(unmap_parts_of_what_was_mapped(), normally, "0 0 1 1 0 1");
}

TEST(CudaOpenDeathTest, C3ContextEntriesFailOutsideAContext) {
  EXPECT_EXIT(use_context_without_entering(), normally, "201 201");
}

}  // namespace
}  // namespace cumempool::driver
