// How the `cuda` driver opens libcuda, on a fake one: what it says when it cannot, that it tries
// again, which symbols it can do without, and what it does with the digest kernel and with memory.
// Each case runs in a child process, since libcuda is never closed.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <vector>

#include "driver/builtin.hpp"
#include "driver/driver.hpp"

namespace cumempool::driver {
namespace {

// A library that is loaded already is found by the name that it gives itself.
void* load_fake() {
  void* const library = dlopen(FAKE_LIBCUDA, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    _exit(2);
  }
  return library;
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

[[noreturn]] void give_access_to_many() {
  setenv("FAKE_DEVICES", "2", 1);
  load_fake();
  const cumempool_driver& table = cuda_driver();
  const std::vector<int> devices(100, 1);
  say_and_exit(result_name(table.set_access(table.self, 4096, 4096, devices.data(), devices.size(),
                                            CUMEMPOOL_ACCESS_READ_WRITE)));
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

// Where the fake finds nothing pinned.
cumempool_digest* pointer_to_lowest_page() {
  return reinterpret_cast<cumempool_digest*>(std::uintptr_t{64});  // NOLINT
}

// Digests of two extents, inside context_enter of device 0.
std::string digest_result(const cumempool_driver& table, std::uint64_t address = 4096,
                          bool pinned = true) {
  static cumempool_extent extents[2];
  static cumempool_digest digests[2];
  extents[0] = extents[1] = {address, 4096};
  auto* const to = pinned ? digests : pointer_to_lowest_page();
  return std::to_string(table.digest(table.self, 0, 1, extents, 2, to, 0)) + " ";
}

// Calls `use` inside device 0's context, and says its results and what it made libcuda do.
[[noreturn]] void use_inside(const char* variable, const char* value,
                             std::string (*use)(const cumempool_driver&)) {
  setenv(variable, value, 1);
  void* const library = load_fake();
  const cumempool_driver& table = cuda_driver();
  cumempool_context_token token{};
  table.context_retain(table.self, 0);
  table.context_enter(table.self, 0, &token);
  std::string text = use(table);
  table.context_leave(table.self, &token);
  table.context_release(table.self, 0);
  const auto calls = reinterpret_cast<const char* (*)()>(dlsym(library, "fake_calls"));
  say_and_exit(text + "| " + calls() + ".");
}

std::string twice(const cumempool_driver& table) {
  return digest_result(table) + digest_result(table);
}

std::string in_two_contexts(const cumempool_driver& table) {
  cumempool_context_token token{};
  std::string text = digest_result(table);
  const cumempool_context_token left{0, 0, -1};
  table.context_leave(table.self, &left);
  table.context_release(table.self, 0);
  table.context_retain(table.self, 0);
  table.context_enter(table.self, 0, &token);
  return text + digest_result(table);
}

std::string with_bad_arguments(const cumempool_driver& table) {
  return digest_result(table, 4104) + digest_result(table, 4096, false) +
         std::to_string(table.digest(table.self, 0, 1, nullptr, 0, nullptr, 0)) + " " +
         std::to_string(table.copy_on_device(table.self, 0, 4096, 4097, 2, 0)) + " ";
}

std::string text_of(std::initializer_list<cumempool_result> results) {
  std::string text;
  for (const auto result : results) text += std::to_string(result) + " ";
  return text;
}

std::string deallocate_what_was_allocated(const cumempool_driver& table) {
  void* self = table.self;
  cumempool_address address = 0;
  const auto nothing = table.allocate(self, 0, 0, &address);
  const auto made = table.allocate(self, 0, 4096, &address);
  const auto inside_it = table.deallocate(self, 0, address + 256);
  const auto elsewhere = table.deallocate(self, 0, 8192);
  const auto other_device = table.deallocate(self, 1, address);
  const auto first = table.deallocate(self, 0, address);
  const auto second = table.deallocate(self, 0, address);
  const auto third = table.deallocate(self, 0, address);
  return text_of({nothing, made, inside_it, elsewhere, other_device, first, second, third});
}

std::string deallocate_memory_of_another_device(const cumempool_driver& table) {
  cumempool_address address = 0;
  cumempool_context_token token{};
  const auto made = table.allocate(table.self, 0, 4096, &address);
  table.context_retain(table.self, 1);
  table.context_enter(table.self, 1, &token);
  const auto other = table.deallocate(table.self, 1, address);
  table.context_leave(table.self, &token);
  table.context_release(table.self, 1);
  return text_of({made, other, table.deallocate(table.self, 0, address)});
}

std::string retain_twice(const cumempool_driver& table) {
  const auto retained = table.context_retain(table.self, 0);
  return text_of({retained, table.context_release(table.self, 0)});
}

std::string reserve_each_size(const cumempool_driver& table) {
  constexpr std::size_t kMib = std::size_t{1} << 20;
  cumempool_address address = 0;
  std::string text;
  for (const std::size_t mib : {2U, 510U, 512U, 1280U}) {
    text += text_of({table.reserve(table.self, mib * kMib, &address)});
  }
  return text;
}

std::string give_each_access(const cumempool_driver& table) {
  const int devices[] = {0, 1};
  std::string text;
  for (const int access : {0, 1, 2, 3}) {
    text += text_of({table.set_access(table.self, 4096, 4096, devices, 2,
                                      static_cast<cumempool_access>(access))});
  }
  return text;
}

std::string fence_twice(const cumempool_driver& table) {
  const int device = 0;
  std::string text;
  for (int i = 0; i < 2; ++i) {
    int way = -1;
    const auto result = table.fence(table.self, &device, 1);
    table.device_attribute(table.self, device, CUMEMPOOL_ATTRIBUTE_FENCE, &way);
    text += std::to_string(result) + "/" + std::to_string(way) + " ";
  }
  return text;
}

// A way that is refused only after it was chosen.
std::string fence_then_refuse(const cumempool_driver& table) {
  const std::string first = fence_twice(table);
  setenv("FAKE_REGISTER", "801", 1);
  return first + fence_twice(table);
}

// With more set in the environment than one variable.
[[noreturn]] void fence_with(const char* waits, const char* variable, const char* value) {
  setenv("FAKE_WAITS", waits, 1);
  use_inside(variable, value, fence_twice);
}

[[noreturn]] void ask_what_older_drivers_do_not_know() {
  load_fake();
  const cumempool_driver& table = cuda_driver();
  int fabric = 7;
  int node = 7;
  int self_access = 7;
  table.device_attribute(table.self, 0, CUMEMPOOL_ATTRIBUTE_FABRIC, &fabric);
  table.device_attribute(table.self, 0, CUMEMPOOL_ATTRIBUTE_HOST_NUMA, &node);
  table.peer_access(table.self, 0, 0, &self_access);
  say_and_exit(std::to_string(fabric) + " " + std::to_string(node) + " " +
               std::to_string(self_access));
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

TEST(CudaOpenDeathTest, AccessIsGivenToAsManyDevicesAsAreListed) {
  EXPECT_EXIT(give_access_to_many(), normally, "SUCCESS");
}

TEST(CudaOpenDeathTest, C3ContextEntriesFailOutsideAContext) {
  EXPECT_EXIT(use_context_without_entering(), normally, "201 201");
}

TEST(CudaOpenDeathTest, DigestCodeIsLoadedOnceAndUnloadedWithTheContext) {
  EXPECT_EXIT(use_inside("FAKE_MODULE", "0", twice), normally,
              "0 0 \\| load cumempool_digest_kernel launch\\(2,256,0\\) launch\\(2,256,0\\) unload "
              "\\.");
}

TEST(CudaOpenDeathTest, DigestCodeIsLoadedAgainIntoANewContext) {
  EXPECT_EXIT(use_inside("FAKE_MODULE", "0", in_two_contexts), normally,
              "0 0 \\| load cumempool_digest_kernel launch\\(2,256,0\\) unload "
              "load cumempool_digest_kernel launch\\(2,256,0\\) unload \\.");
}

TEST(CudaOpenDeathTest, RefusedDigestCodeIsNotSupportedForGood) {
  for (const char* refusal : {"200", "209", "218", "221", "222", "223", "801"}) {
    EXPECT_EXIT(use_inside("FAKE_MODULE", refusal, twice), normally, "801 801 \\| load \\.");
  }
}

TEST(CudaOpenDeathTest, DigestCodeThatFailsToLoadOtherwiseIsTriedAgain) {
  EXPECT_EXIT(use_inside("FAKE_MODULE", "2", twice), normally, "2 2 \\| load load \\.");
}

TEST(CudaOpenDeathTest, DigestsAreNotSupportedWithoutTheSymbols) {
  for (const char* symbol : {"cuModuleLoadDataEx", "cuModuleGetFunction", "cuModuleUnload",
                             "cuLaunchKernel", "cuPointerGetAttribute"}) {
    EXPECT_EXIT(use_inside("FAKE_MISSING", symbol, twice), normally, "801 801 \\| \\.");
  }
}

TEST(CudaOpenDeathTest, BadArgumentsLaunchNothingAndNoExtentsOnlyLoadTheCode) {
  EXPECT_EXIT(use_inside("FAKE_MODULE", "0", with_bad_arguments), normally,
              "1 1 0 1 \\| load cumempool_digest_kernel unload \\.");
}

TEST(CudaOpenDeathTest, DeallocateTakesExactlyOneAddressOfAllocate) {
  EXPECT_EXIT(use_inside("FAKE_FREE", "0", deallocate_what_was_allocated), normally,
              "1 0 1 1 201 0 1 1 \\| alloc\\(0\\) alloc\\(4096\\) free \\.");
  EXPECT_EXIT(use_inside("FAKE_DEVICES", "2", deallocate_memory_of_another_device), normally,
              "0 1 0 \\| alloc\\(4096\\) free \\.");
}

TEST(CudaOpenDeathTest, MemoryThatCouldNotBeFreedMayBeFreedAgain) {
  EXPECT_EXIT(use_inside("FAKE_FREE", "719", deallocate_what_was_allocated), normally,
              "1 0 1 1 201 719 0 1 \\| alloc\\(0\\) alloc\\(4096\\) free free \\.");
}

TEST(CudaOpenDeathTest, AccessIsToReadOrToReadAndWrite) {
  EXPECT_EXIT(use_inside("FAKE_DEVICES", "2", give_each_access), normally,
              "1 0 1 0 \\| access\\(70,1\\) access\\(71,1\\) access\\(70,3\\) "
              "access\\(71,3\\) \\.");
}

TEST(CudaOpenDeathTest, AddressesAreTakenAheadWhileAContextIsHeldOnce) {
  EXPECT_EXIT(use_inside("FAKE_RESERVE", "0", retain_twice), normally,
              "0 0 \\| reserve\\(2097152,65536MiB\\) unreserve\\(65536MiB,2097152\\) \\.");
}

TEST(CudaOpenDeathTest, AContextIsHeldWithoutAddressesAhead) {
  EXPECT_EXIT(use_inside("FAKE_RESERVE", "2", retain_twice), normally,
              "0 0 \\| reserve\\(2097152,65536MiB\\) \\.");
}

TEST(CudaOpenDeathTest, LargeRangesBeginWithAPageDirectory) {
  EXPECT_EXIT(use_inside("FAKE_RESERVE", "0", reserve_each_size), normally,
              "0 0 0 0 \\| reserve\\(2097152,65536MiB\\) reserve\\(2097152,0MiB\\) "
              "reserve\\(534773760,0MiB\\) reserve\\(536870912,512MiB\\) "
              "reserve\\(1342177280,512MiB\\) unreserve\\(65536MiB,2097152\\) \\.");
}

TEST(CudaOpenDeathTest, C10TheFirstWayThatIsSeenToWaitIsTheFence) {
  EXPECT_EXIT(fence_with("rfc", "FAKE_REGISTER", "0"), normally,
              "0/1 0/1 \\| register register \\.");
  EXPECT_EXIT(fence_with("rfc", "FAKE_REGISTER", "801"), normally,
              "0/2 0/2 \\| register alloc\\(512\\) alloc\\(512\\) free alloc\\(512\\) free "
              "free \\.");
  EXPECT_EXIT(fence_with("c", "FAKE_REGISTER", "0"), normally,
              "0/3 0/3 \\| register alloc\\(512\\) alloc\\(512\\) free synchronize synchronize "
              "free \\.");
  EXPECT_EXIT(fence_with("rfc", "FAKE_ATS", "1"), normally, "0/2 0/2 \\| alloc");
}

TEST(CudaOpenDeathTest, C10WhereNothingWaitsTheFenceSaysSo) {
  EXPECT_EXIT(fence_with("", "FAKE_REGISTER", "0"), normally, "801/4 801/4 ");
}

TEST(CudaOpenDeathTest, C10AWayThatIsRefusedLaterGivesPlaceToTheNext) {
  EXPECT_EXIT(use_inside("FAKE_WAITS", "rfc", fence_then_refuse), normally, "0/1 0/1 0/2 0/2 ");
}

TEST(CudaOpenDeathTest, C10ALostContextIsNoReasonToChooseAnotherWay) {
  EXPECT_EXIT(fence_with("rfc", "FAKE_REGISTER", "700"), normally,
              "700/0 700/0 \\| register register \\.");
}

[[noreturn]] void fence_while_capturing() {
  setenv("FAKE_REGISTER", "801", 1);
  setenv("FAKE_ALLOC", "2", 1);
  use_inside("FAKE_CAPTURING", "906", fence_twice);
}

TEST(CudaOpenDeathTest, C10ACaptureIsNotBrokenByTheLastWay) {
  EXPECT_EXIT(fence_while_capturing(), normally,
              "900/0 900/0 \\| register alloc\\(512\\) register alloc\\(512\\) \\.");
}

TEST(CudaOpenDeathTest, OlderDriversKnowNeitherFabricNorNumaNode) {
  EXPECT_EXIT(ask_what_older_drivers_do_not_know(), normally, "0 -1 1");
}

}  // namespace
}  // namespace cumempool::driver
