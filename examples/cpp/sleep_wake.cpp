// Weights and a cache that sleep and wake, in C++ with the public headers and libcumempool.so
// alone: `sleep_wake host` on a simulated device, `sleep_wake cuda` on GPU 0. Exits with 1 if not
// proven.
#include <cumempool/cumempool.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace {

constexpr int kDevice = 0;
constexpr std::uint64_t kGranularity = std::uint64_t{2} << 20;  // that of GPUs
constexpr std::uint64_t kBytes = std::uint64_t{16} << 20;       // of each of the two tags
constexpr unsigned char kPreset = 0xa5;                         // what no result looks like

void check(cumempool_status status) {
  if (status != CUMEMPOOL_OK) throw std::runtime_error(cumempool_last_error()->message);
}

void check_call(cumempool_result result, const char* call) {
  if (result == CUMEMPOOL_RESULT_SUCCESS) return;
  throw std::runtime_error(std::string(call) + " returned " + cumempool_result_name(result));
}

// Takes a step back when its block is left.
template <typename Step>
class Undo {
 public:
  explicit Undo(Step step) : step_(std::move(step)) {}
  ~Undo() { step_(); }
  Undo(const Undo&) = delete;
  Undo& operator=(const Undo&) = delete;

 private:
  Step step_;
};

using Driver = std::unique_ptr<const cumempool_driver, void (*)(const cumempool_driver*)>;
using Allocator = std::unique_ptr<cumempool_allocator, decltype(&cumempool_allocator_destroy)>;
using Report = std::unique_ptr<cumempool_report, decltype(&cumempool_report_destroy)>;
using Snapshot = std::unique_ptr<cumempool_snapshot, decltype(&cumempool_snapshot_destroy)>;

Driver open_driver(std::string_view name) {
  const cumempool_driver* driver = nullptr;
  if (name == "cuda") {
    check(cumempool_cuda_driver(&driver));
    return {driver, [](const cumempool_driver*) {}};  // stays until the process ends
  }
  cumempool_host_driver_options options{};
  options.size = sizeof options;
  options.device_count = 1;
  options.bytes_per_device = 4 * kBytes;
  options.granularity = kGranularity;
  check(cumempool_host_driver_create(&options, &driver));
  return {driver, &cumempool_host_driver_destroy};
}

Allocator make_allocator(const cumempool_driver* driver) {
  cumempool_allocator_options options{};
  options.size = sizeof options;
  options.retain_backups = 1;
  options.overflow.size = sizeof options.overflow;
  cumempool_allocator* allocator = nullptr;
  check(cumempool_allocator_create(driver, &options, &allocator));
  return {allocator, &cumempool_allocator_destroy};
}

// Memory of a tag, from here to the end of the block.
class Memory {
 public:
  Memory(cumempool_allocator* allocator, const char* tag) {
    check(cumempool_malloc(allocator, tag, kDevice, kBytes, &address_));
  }
  ~Memory() { static_cast<void>(cumempool_free(address_)); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  cumempool_address address() const noexcept { return address_; }

 private:
  cumempool_address address_ = 0;
};

// kBytes of host memory, which start at a page.
class HostBytes {
 public:
  explicit HostBytes(unsigned char preset)
      : data_(std::aligned_alloc(static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), kBytes),
              &std::free) {
    if (data_ == nullptr) throw std::bad_alloc();
    std::fill(begin(), end(), preset);
  }

  unsigned char* begin() const noexcept { return static_cast<unsigned char*>(data_.get()); }
  unsigned char* end() const noexcept { return begin() + kBytes; }

 private:
  std::unique_ptr<void, decltype(&std::free)> data_;
};

using Copy = std::function<cumempool_result(cumempool_stream)>;

// Runs one copy between the device and `bytes`: in the device's context, from or to pinned memory.
// A program that uses the CUDA runtime has its own ways to do so; this one works on every driver.
void copy_and_wait(const cumempool_driver& driver, const HostBytes& bytes, const Copy& copy) {
  check_call(driver.init(driver.self), "init");
  check_call(driver.context_retain(driver.self, kDevice), "context_retain");
  const Undo release([&] { driver.context_release(driver.self, kDevice); });
  cumempool_context_token token{};
  check_call(driver.context_enter(driver.self, kDevice, &token), "context_enter");
  const Undo leave([&] { driver.context_leave(driver.self, &token); });
  check_call(driver.host_register(driver.self, kDevice, bytes.begin(), kBytes), "host_register");
  const Undo unpin([&] { driver.host_unregister(driver.self, kDevice, bytes.begin()); });
  cumempool_stream stream = 0;
  check_call(driver.stream_create(driver.self, kDevice, &stream), "stream_create");
  const Undo destroy([&] { driver.stream_destroy(driver.self, kDevice, stream); });
  check_call(copy(stream), "copy");
  check_call(driver.stream_synchronize(driver.self, kDevice, stream), "stream_synchronize");
}

void upload(const cumempool_driver& driver, const Memory& memory, const HostBytes& from) {
  copy_and_wait(driver, from, [&](cumempool_stream stream) {
    return driver.copy_to_device(driver.self, kDevice, memory.address(), from.begin(), kBytes,
                                 stream);
  });
}

HostBytes download(const cumempool_driver& driver, const Memory& memory) {
  HostBytes to(kPreset);
  copy_and_wait(driver, to, [&](cumempool_stream stream) {
    return driver.copy_to_host(driver.self, kDevice, to.begin(), memory.address(), kBytes, stream);
  });
  return to;
}

// Bytes that no two places near each other share.
HostBytes weights_of_a_model() {
  HostBytes bytes(0);
  std::uint32_t state = 1;
  for (unsigned char& byte : bytes) {
    state = state * 1664525u + 1013904223u;
    byte = static_cast<unsigned char>(state >> 24);
  }
  return bytes;
}

// Weights are backed up; the cache is given up, and wakes filled with zero bytes.
void put_to_sleep(cumempool_allocator* allocator) {
  const cumempool_tag_action actions[] = {{"weights", CUMEMPOOL_ON_SLEEP_OFFLOAD},
                                          {"kv_cache", CUMEMPOOL_ON_SLEEP_DISCARD}};
  cumempool_sleep_request request{};
  request.size = sizeof request;
  request.tags = std::begin(actions);
  request.tag_count = std::size(actions);
  cumempool_report* report = nullptr;
  check(cumempool_sleep(allocator, &request, &report));
  const Report owner(report, &cumempool_report_destroy);
  std::printf("slept in %.1f ms\n", 1e3 * cumempool_report_seconds(report));
}

void wake_up(cumempool_allocator* allocator) {
  cumempool_report* report = nullptr;
  check(cumempool_wake(allocator, nullptr, 0, nullptr, 0, &report));
  const Report owner(report, &cumempool_report_destroy);
  std::printf("woke in %.1f ms\n", 1e3 * cumempool_report_seconds(report));
}

// Device memory that the allocator holds.
std::uint64_t physical_bytes(cumempool_allocator* allocator) {
  cumempool_snapshot* snapshot = nullptr;
  check(cumempool_take_snapshot(allocator, 0, &snapshot));
  const Snapshot owner(snapshot, &cumempool_snapshot_destroy);
  return cumempool_snapshot_totals(snapshot)->physical_bytes;
}

cumempool_allocation_info look_at(cumempool_allocator* allocator, const Memory& memory) {
  cumempool_allocation_info info{};
  info.size = sizeof info;
  check(cumempool_find(allocator, memory.address(), &info));
  return info;
}

bool prove(bool holds, const char* what) {
  std::printf("%s: %s\n", holds ? "proven" : "NOT PROVEN", what);
  return holds;
}

bool sleeps_and_wakes(const cumempool_driver& driver, cumempool_allocator* allocator) {
  check(cumempool_declare_tag(allocator, "weights", CUMEMPOOL_ON_SLEEP_OFFLOAD,
                              CUMEMPOOL_ON_WAKE_UNSET));
  check(cumempool_declare_tag(allocator, "kv_cache", CUMEMPOOL_ON_SLEEP_DISCARD,
                              CUMEMPOOL_ON_WAKE_ZERO));
  const Memory weights(allocator, "weights");
  const Memory cache(allocator, "kv_cache");
  const HostBytes values = weights_of_a_model();
  upload(driver, weights, values);
  upload(driver, cache, values);

  bool good = prove(physical_bytes(allocator) == 2 * kBytes, "awake, both tags hold memory");
  const std::uint64_t before = look_at(allocator, weights).generation;
  put_to_sleep(allocator);
  good &= prove(physical_bytes(allocator) == 0, "asleep, they hold none of the device's memory");
  wake_up(allocator);
  good &= prove(look_at(allocator, weights).generation > before,
                "awake again, at the same addresses in new physical memory");
  const HostBytes restored = download(driver, weights);
  good &= prove(std::equal(values.begin(), values.end(), restored.begin()),
                "the weights are equal bit for bit");
  const HostBytes emptied = download(driver, cache);
  good &= prove(std::all_of(emptied.begin(), emptied.end(), [](auto byte) { return byte == 0; }),
                "the cache is zero");
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view name = argc == 2 ? argv[1] : "";
  if (name != "host" && name != "cuda") {
    std::fputs("usage: sleep_wake host|cuda\n", stderr);
    return 2;
  }
  try {
    const Driver driver = open_driver(name);
    const Allocator allocator = make_allocator(driver.get());
    std::printf("cumempool %s, driver %s\n", cumempool_version(), driver->name);
    return sleeps_and_wakes(*driver, allocator.get()) ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "NOT PROVEN: %s\n", error.what());
    return 1;
  }
}
