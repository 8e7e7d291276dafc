// What a failure tells (R12): the sentence of Error, names of results, and check() on driver
// tables.
#include "driver/error.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "driver/builtin.hpp"
#include "driver/driver.hpp"

namespace cumempool {
namespace {

using driver::ContextScope;
using driver::Driver;
using driver::RetainedContext;

// A table whose contexts and memory are plain numbers, to see what check() asks of it.
struct ScriptedDriver {
  bool retained = true;
  int depth = 0;
  int retains = 0;
  cumempool_result memory_result = CUMEMPOOL_RESULT_SUCCESS;
  cumempool_driver table{};

  explicit ScriptedDriver(const char* name) {
    table.name = name;
    table.self = this;
    table.context_retain = [](void* self, int) -> cumempool_result {
      ++of(self).retains;
      return CUMEMPOOL_RESULT_SUCCESS;
    };
    table.context_release = [](void* self, int) -> cumempool_result {
      --of(self).retains;
      return CUMEMPOOL_RESULT_SUCCESS;
    };
    table.context_enter = [](void* self, int, cumempool_context_token*) -> cumempool_result {
      if (!of(self).retained) {
        return CUMEMPOOL_RESULT_INVALID_CONTEXT;
      }
      ++of(self).depth;
      return CUMEMPOOL_RESULT_SUCCESS;
    };
    table.context_leave = [](void* self, const cumempool_context_token*) -> cumempool_result {
      --of(self).depth;
      return CUMEMPOOL_RESULT_SUCCESS;
    };
    table.memory_info = [](void* self, int, std::uint64_t* free_bytes,
                           std::uint64_t* total_bytes) -> cumempool_result {
      *free_bytes = 1024;
      *total_bytes = 4096;
      return of(self).memory_result;
    };
  }

  static ScriptedDriver& of(void* self) { return *static_cast<ScriptedDriver*>(self); }
};

Error failure(const ScriptedDriver& scripted, const char* call, cumempool_result result,
              int device = 0, std::uint64_t bytes = 2048) {
  try {
    driver::check(scripted.table, call, result, device, bytes);
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "check() did not throw";
  return Error(CUMEMPOOL_INTERNAL, "");
}

TEST(FormatBytes, UsesTheLargestUnitThatFits) {
  EXPECT_EQ(format_bytes(0), "0 bytes");
  EXPECT_EQ(format_bytes(1), "1 byte");
  EXPECT_EQ(format_bytes(1023), "1023 bytes");
  EXPECT_EQ(format_bytes(1024), "1.00 KiB");
  EXPECT_EQ(format_bytes(2u << 20), "2.00 MiB");
  EXPECT_EQ(format_bytes((1u << 30) - 1), "1.00 GiB");
  EXPECT_EQ(format_bytes(std::uint64_t{3} << 39), "1.50 TiB");
  EXPECT_EQ(format_bytes(UINT64_MAX), "16.00 EiB");
}

TEST(ResultName, IsTheNameInCudaH) {
  EXPECT_STREQ(result_name(CUMEMPOOL_RESULT_SUCCESS), "CUDA_SUCCESS");
  EXPECT_STREQ(result_name(CUMEMPOOL_RESULT_OUT_OF_MEMORY), "CUDA_ERROR_OUT_OF_MEMORY");
  EXPECT_STREQ(result_name(719), "CUDA_ERROR_LAUNCH_FAILED");
  EXPECT_STREQ(result_name(-5), "CUDA_ERROR_UNRECOGNIZED");
  EXPECT_STREQ(result_name(12345), "CUDA_ERROR_UNRECOGNIZED");
}

TEST(ResultName, IsThereForEveryResultOfCudaHAndForNoOther) {
  const std::string unknown = result_name(-1);
  std::set<std::string> names;
  for (cumempool_result result = 0; result <= 1000; ++result) {
    const std::string name = result_name(result);
    if (name == unknown) continue;
    EXPECT_EQ(name.rfind(result == 0 ? "CUDA_SUCCESS" : "CUDA_ERROR_", 0), 0U) << name;
    EXPECT_TRUE(names.insert(name).second) << name << " names two results";
  }
  EXPECT_GT(names.size(), 100U);
  EXPECT_STREQ(result_name(1), "CUDA_ERROR_INVALID_VALUE");
  EXPECT_STREQ(result_name(999), "CUDA_ERROR_UNKNOWN");
}

TEST(ErrorMessage, SaysAllItKnowsInOrder) {
  Error error(CUMEMPOOL_OUT_OF_MEMORY, "no room to wake");
  error.operation = "wake";
  error.tag = "kv";
  error.device = 1;
  error.bytes = 2u << 20;
  error.driver_call = "cuMemCreate";
  error.result = CUMEMPOOL_RESULT_OUT_OF_MEMORY;
  error.free_bytes = 512;
  error.total_bytes = 1u << 30;
  error.secondary = {"cuMemUnmap returned CUDA_ERROR_UNKNOWN (999)", "another"};
  error.advice = "Free something.";
  EXPECT_EQ(error.message(),
            "wake of tag 'kv' on device 1 (2.00 MiB): no room to wake; cuMemCreate returned "
            "CUDA_ERROR_OUT_OF_MEMORY (2); 512 bytes of 1.00 GiB are free; then also failed: "
            "cuMemUnmap returned CUDA_ERROR_UNKNOWN (999), another. Free something.");
  EXPECT_EQ(error.what(), error.message());
}

TEST(ErrorMessage, LeavesOutWhatIsNotKnown) {
  EXPECT_EQ(Error(CUMEMPOOL_CLOSED, "the allocator is closed").message(),
            "the allocator is closed");
  Error error(CUMEMPOOL_UNKNOWN_TAG, "never declared");
  error.tag = "kv";
  EXPECT_EQ(error.message(), "tag 'kv': never declared");
  error.tag.clear();
  error.device = 0;
  EXPECT_EQ(error.message(), "device 0: never declared");
}

TEST(Check, ReturnsOnSuccess) {
  const ScriptedDriver scripted("cuda");
  EXPECT_NO_THROW(driver::check(scripted.table, "create", CUMEMPOOL_RESULT_SUCCESS));
}

TEST(Check, NamesTheCudaFunctionOnlyOnCuda) {
  const auto result = CUMEMPOOL_RESULT_INVALID_VALUE;
  EXPECT_EQ(failure(ScriptedDriver("cuda"), "create", result).driver_call, "cuMemCreate");
  EXPECT_EQ(failure(ScriptedDriver("cuda"), "set_access", result).driver_call, "cuMemSetAccess");
  EXPECT_EQ(failure(ScriptedDriver("cuda"), "fence", result).driver_call, "cuMemHostRegister");
  EXPECT_EQ(failure(ScriptedDriver("host"), "create", result).driver_call, "host.create");
}

TEST(Check, OutOfMemoryTellsFreeMemory) {
  const ScriptedDriver scripted("cuda");
  const Error error = failure(scripted, "create", CUMEMPOOL_RESULT_OUT_OF_MEMORY, 3);
  EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_MEMORY);
  EXPECT_EQ(error.device, 3);
  EXPECT_EQ(error.bytes, 2048u);
  EXPECT_EQ(error.free_bytes, 1024u);
  EXPECT_EQ(error.total_bytes, 4096u);
  EXPECT_NE(error.advice, "");
  EXPECT_EQ(scripted.depth, 0);
}

TEST(Check, OutOfMemoryIsReportedWhereMemoryCannotBeAsked) {
  ScriptedDriver scripted("cuda");
  scripted.memory_result = CUMEMPOOL_RESULT_DEINITIALIZED;
  EXPECT_EQ(failure(scripted, "create", CUMEMPOOL_RESULT_OUT_OF_MEMORY).total_bytes, 0u);
  EXPECT_EQ(scripted.depth, 0);
  scripted.memory_result = CUMEMPOOL_RESULT_SUCCESS;
  scripted.retained = false;
  EXPECT_EQ(failure(scripted, "create", CUMEMPOOL_RESULT_OUT_OF_MEMORY).total_bytes, 0u);
  scripted.retained = true;
  EXPECT_EQ(failure(scripted, "map", CUMEMPOOL_RESULT_OUT_OF_MEMORY, -1).total_bytes, 0u);
}

TEST(Check, FailureToPinIsAboutHostMemory) {
  const ScriptedDriver scripted("cuda");
  const Error error = failure(scripted, "host_register", CUMEMPOOL_RESULT_OUT_OF_MEMORY);
  EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  EXPECT_NE(error.advice.find("ulimit -l"), std::string::npos);
}

TEST(Check, OtherResultsAreDriverErrorsWithAdvice) {
  const ScriptedDriver scripted("cuda");
  for (const cumempool_result result : {1, 4, 201, 700, 719, 801, 900, 999, 4242}) {
    const Error error = failure(scripted, "map", result);
    EXPECT_EQ(error.status, CUMEMPOOL_DRIVER_ERROR) << result;
    EXPECT_EQ(error.result, result);
    EXPECT_NE(error.advice, "") << result;
  }
  EXPECT_NE(failure(scripted, "fence", 719).advice.find("restart the process"), std::string::npos);
}

TEST(Check, R12_AdviceIsAboutWhatTheDriverSaid) {
  const ScriptedDriver scripted("cuda");
  const struct {
    const char* call;
    std::vector<cumempool_result> results;
    const char* says;
  } cases[] = {
      {"init", {3}, "spawn"},
      {"create", {4}, "before the process exits"},
      {"create", {100, 101}, "CUDA_VISIBLE_DEVICES"},
      {"map", {201, 709}, "do not reset the device"},
      {"create", {800, 801}, "does not grant this kind of memory"},
      {"digest", {800, 801}, "digest kernel"},
      {"export_handle", {304}, "ulimit -n"},
      {"host_register", {712}, "cudaHostRegister"},
      {"fence", {214, 220}, "nvidia-smi -q"},
      {"fence", {700, 702, 710, 714, 715, 716, 717, 718, 719}, "CUDA_LAUNCH_BLOCKING=1 to find"},
      {"host_register", {900, 901, 906}, "after the capture has ended"},
      {"map", {205, 999}, "report this message"},
  };
  for (const auto& [call, results, says] : cases) {
    for (const cumempool_result result : results) {
      const Error error = failure(scripted, call, result);
      EXPECT_EQ(error.status, CUMEMPOOL_DRIVER_ERROR) << result;
      EXPECT_NE(error.advice.find(says), std::string::npos) << result << ": " << error.advice;
    }
  }
}

TEST(ContextOwners, GiveBackWhatTheyTook) {
  ScriptedDriver scripted("cuda");
  {
    const RetainedContext retained(Driver(scripted.table), 0);
    const ContextScope outer(Driver(scripted.table), 0);
    const ContextScope inner(Driver(scripted.table), 0);
    EXPECT_EQ(scripted.retains, 1);
    EXPECT_EQ(scripted.depth, 2);
  }
  EXPECT_EQ(scripted.retains, 0);
  EXPECT_EQ(scripted.depth, 0);
  scripted.retained = false;
  EXPECT_THROW(ContextScope(Driver(scripted.table), 0), Error);
}

}  // namespace
}  // namespace cumempool
