// The fixture of the conformance suite: a driver under test with device 0 entered, and owners for
// what its tests take from it.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <ostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cumempool/driver.h"
#include "driver/builtin.hpp"
#include "driver/error.hpp"
#include "driver/host_driver.hpp"

// driver.h's entries take their own table's `self` first.
#define CALL(table, entry, ...) (table).entry((table).self, __VA_ARGS__)

namespace cumempool::conformance {

inline bool gpu_required() {
  const char* value = std::getenv("CUMEMPOOL_REQUIRE_GPU");
  return value != nullptr && std::string(value) == "1";
}

inline cumempool_result fence(const cumempool_driver& table, int device) {
  return CALL(table, fence, &device, std::size_t{1});
}

constexpr cumempool_access kRead = CUMEMPOOL_ACCESS_READ;
constexpr cumempool_access kReadWrite = CUMEMPOOL_ACCESS_READ_WRITE;

// Fails the test, and ends it, where a call that it builds on fails.
inline void must(cumempool_result result, const char* what) {
  if (result != CUMEMPOOL_RESULT_SUCCESS) {
    throw std::runtime_error(std::string(what) + " returned " + result_name(result));
  }
}

struct DriverUnderTest {
  std::string name;
  std::uint64_t granularity;  // of a host driver; 0 = the cuda driver
};

inline std::ostream& operator<<(std::ostream& out, const DriverUnderTest& driver) {
  return out << driver.name;
}

inline std::vector<DriverUnderTest> host_drivers() {
  return {{"host", 2u << 20}, {"host_of_small_granules", 64u << 10}};
}

// The cuda driver where there may be a GPU. It is opened by the tests, not here: this runs also
// where tests are only listed.
inline std::vector<DriverUnderTest> cuda_drivers() {
  const bool gpu = access("/dev/nvidiactl", F_OK) == 0 || access("/dev/dxg", F_OK) == 0;
  if (!gpu && !gpu_required()) return {};
  return {{"cuda", 0}};
}

inline std::string name_of_driver(const ::testing::TestParamInfo<DriverUnderTest>& info) {
  return info.param.name;
}

// The calling thread inside a device's context.
class Inside {
 public:
  explicit Inside(const cumempool_driver& table, int device = 0) : table_(table) {
    must(CALL(table_, context_enter, device, &token_), "context_enter");
  }
  ~Inside() { EXPECT_EQ(CALL(table_, context_leave, &token_), CUMEMPOOL_RESULT_SUCCESS); }
  Inside(const Inside&) = delete;
  Inside(Inside&&) = delete;
  Inside& operator=(const Inside&) = delete;
  Inside& operator=(Inside&&) = delete;

 private:
  const cumempool_driver& table_;
  cumempool_context_token token_{};
};

// A reserved address range.
class Range {
 public:
  Range(const cumempool_driver& table, std::size_t bytes) : table_(table), bytes_(bytes) {
    must(CALL(table_, reserve, bytes, &address_), "reserve");
  }
  ~Range() { EXPECT_EQ(CALL(table_, unreserve, address_, bytes_), CUMEMPOOL_RESULT_SUCCESS); }
  Range(const Range&) = delete;
  Range(Range&&) = delete;
  Range& operator=(const Range&) = delete;
  Range& operator=(Range&&) = delete;

  cumempool_address address() const { return address_; }

 private:
  const cumempool_driver& table_;
  std::size_t bytes_;
  cumempool_address address_ = 0;
};

// Maps and gives access.
inline void map_at(const cumempool_driver& table, cumempool_address address, std::size_t bytes,
                   cumempool_physical physical, int device = 0) {
  must(CALL(table, map, address, bytes, physical), "map");
  must(CALL(table, set_access, address, bytes, &device, std::size_t{1}, kReadWrite), "set_access");
}

// Accessible device memory with a range of its own; its handle is released once it is mapped.
class Block {
 public:
  Block(const cumempool_driver& table, std::size_t bytes,
        const cumempool_memory_properties& properties)
      : table_(table), bytes_(bytes), range_(table, bytes) {
    cumempool_physical physical = 0;
    must(CALL(table_, create, bytes, &properties, &physical), "create");
    map_at(table_, address(), bytes, physical, properties.device);
    must(CALL(table_, release, physical), "release");
  }
  ~Block() { EXPECT_EQ(CALL(table_, unmap, address(), bytes_), CUMEMPOOL_RESULT_SUCCESS); }
  Block(const Block&) = delete;
  Block(Block&&) = delete;
  Block& operator=(const Block&) = delete;
  Block& operator=(Block&&) = delete;

  cumempool_address address() const { return range_.address(); }

 private:
  const cumempool_driver& table_;
  std::size_t bytes_;
  Range range_;
};

// Device memory of the ordinary kind.
class Allocation {
 public:
  Allocation(const cumempool_driver& table, std::size_t bytes) : table_(table) {
    must(CALL(table_, allocate, 0, bytes, &address_), "allocate");
  }
  ~Allocation() { EXPECT_EQ(CALL(table_, deallocate, 0, address_), CUMEMPOOL_RESULT_SUCCESS); }
  Allocation(const Allocation&) = delete;
  Allocation(Allocation&&) = delete;
  Allocation& operator=(const Allocation&) = delete;
  Allocation& operator=(Allocation&&) = delete;

  cumempool_address address() const { return address_; }

 private:
  const cumempool_driver& table_;
  cumempool_address address_ = 0;
};

// Page-aligned host memory of zeros; registered as one range, unless `registered` is false.
class HostBuffer {
 public:
  HostBuffer(const cumempool_driver& table, std::size_t bytes, bool registered = true)
      : table_(table), bytes_(bytes), registered_(registered) {
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) throw std::runtime_error("mmap failed");
    data_ = static_cast<std::uint8_t*>(pages);
    if (registered) must(CALL(table_, host_register, 0, data_, bytes), "host_register");
  }
  ~HostBuffer() {
    if (registered_) {
      EXPECT_EQ(CALL(table_, host_unregister, 0, data_), CUMEMPOOL_RESULT_SUCCESS);
    }
    munmap(data_, bytes_);
  }
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer(HostBuffer&&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;
  HostBuffer& operator=(HostBuffer&&) = delete;

  std::uint8_t* data() const { return data_; }
  bool all_are(std::uint8_t byte) const { return all_are(0, bytes_, byte); }
  bool all_are(std::size_t offset, std::size_t bytes, std::uint8_t byte) const {
    return std::all_of(data_ + offset, data_ + offset + bytes,
                       [byte](std::uint8_t value) { return value == byte; });
  }

 private:
  const cumempool_driver& table_;
  std::size_t bytes_;
  bool registered_;
  std::uint8_t* data_ = nullptr;
};

class Stream {
 public:
  explicit Stream(const cumempool_driver& table) : table_(table) {
    must(CALL(table_, stream_create, 0, &stream_), "stream_create");
  }
  ~Stream() { EXPECT_EQ(CALL(table_, stream_destroy, 0, stream_), CUMEMPOOL_RESULT_SUCCESS); }
  Stream(const Stream&) = delete;
  Stream(Stream&&) = delete;
  Stream& operator=(const Stream&) = delete;
  Stream& operator=(Stream&&) = delete;

  cumempool_stream get() const { return stream_; }

 private:
  const cumempool_driver& table_;
  cumempool_stream stream_ = 0;
};

class Event {
 public:
  explicit Event(const cumempool_driver& table) : table_(table) {
    must(CALL(table_, event_create, 0, &event_), "event_create");
  }
  ~Event() { EXPECT_EQ(CALL(table_, event_destroy, 0, event_), CUMEMPOOL_RESULT_SUCCESS); }
  Event(const Event&) = delete;
  Event(Event&&) = delete;
  Event& operator=(const Event&) = delete;
  Event& operator=(Event&&) = delete;

  cumempool_event get() const { return event_; }

 private:
  const cumempool_driver& table_;
  cumempool_event event_ = 0;
};

// Bytes that differ from place to place and from seed to seed.
inline void write_pattern(std::uint8_t* data, std::size_t bytes, std::uint32_t seed) {
  std::uint32_t state = seed * 2654435761u + 1u;
  for (std::size_t i = 0; i < bytes; ++i) {
    state = state * 1664525u + 1013904223u;
    data[i] = static_cast<std::uint8_t>(state >> 24);
  }
}

// The digests of extents, asked for and waited for on one stream. The arrays lie in one buffer.
inline std::vector<cumempool_digest> digests_of(const cumempool_driver& table, std::uint64_t seed,
                                                const std::vector<cumempool_extent>& extents,
                                                cumempool_stream stream = 0) {
  const std::size_t bytes = extents.size() * sizeof(cumempool_extent);
  const HostBuffer buffer(table, (2 * bytes + 4095) / 4096 * 4096);
  auto* const arguments = reinterpret_cast<cumempool_extent*>(buffer.data());
  auto* const results = reinterpret_cast<cumempool_digest*>(buffer.data() + bytes);
  std::copy(extents.begin(), extents.end(), arguments);
  must(CALL(table, digest, 0, seed, arguments, extents.size(), results, stream), "digest");
  must(CALL(table, stream_synchronize, 0, stream), "stream_synchronize");
  return {results, results + extents.size()};
}

class DriverConformance : public ::testing::TestWithParam<DriverUnderTest> {
 protected:
  // Larger than anything else that may move the free memory of a GPU meanwhile.
  static constexpr std::size_t kManyGranules = 32;

  void SetUp() override {
    if (is_cuda()) {
      open_cuda();
    } else {
      open_host();
    }
    if (table_ == nullptr) return;
    must(table_->init(table_->self), "init");
    must(CALL(*table_, context_retain, 0), "context_retain");
    must(CALL(*table_, granularity, &properties_, &granule_), "granularity");
    must(CALL(*table_, context_enter, 0, &token_), "context_enter");
    entered_ = true;
  }

  void TearDown() override {
    if (entered_) {
      EXPECT_EQ(CALL(*table_, context_leave, &token_), CUMEMPOOL_RESULT_SUCCESS);
      EXPECT_EQ(CALL(*table_, context_release, 0), CUMEMPOOL_RESULT_SUCCESS);
    }
    if (table_ == nullptr || is_cuda()) return;
    const auto left = driver::host_driver_counters(table_);
    EXPECT_EQ(
        left.reservations + left.handles + left.mappings + left.allocations + left.charged_bytes,
        0u);
    EXPECT_EQ(left.registrations + left.streams + left.events + left.queued_commands, 0u);
    EXPECT_EQ(left.retained_contexts + left.entered_contexts, 0u);
    driver::destroy_host_driver(table_);
  }

  bool is_cuda() const { return GetParam().granularity == 0; }
  const cumempool_driver& table() const { return *table_; }
  std::size_t granule() const { return granule_; }
  const cumempool_memory_properties& properties() const { return properties_; }

  std::uint64_t free_bytes() const {
    std::uint64_t free = 0;
    std::uint64_t total = 0;
    must(CALL(table(), memory_info, 0, &free, &total), "memory_info");
    return free;
  }

  cumempool_physical create(std::size_t bytes) const {
    cumempool_physical physical = 0;
    must(CALL(table(), create, bytes, &properties_, &physical), "create");
    return physical;
  }

  void upload(cumempool_address address, const HostBuffer& from, std::size_t bytes) const {
    must(CALL(table(), copy_to_device, 0, address, from.data(), bytes, cumempool_stream{0}),
         "copy_to_device");
    must(CALL(table(), stream_synchronize, 0, cumempool_stream{0}), "stream_synchronize");
  }

  void download(const HostBuffer& to, cumempool_address address, std::size_t bytes) const {
    must(CALL(table(), copy_to_host, 0, to.data(), address, bytes, cumempool_stream{0}),
         "copy_to_host");
    must(CALL(table(), stream_synchronize, 0, cumempool_stream{0}), "stream_synchronize");
  }

  // Whether the driver makes and exports memory as file descriptors.
  bool exports_descriptors() const {
    int supported = 0;
    must(CALL(table(), device_attribute, 0, CUMEMPOOL_ATTRIBUTE_POSIX_FD, &supported),
         "device_attribute");
    return supported != 0;
  }

 private:
  void open_cuda() {
    try {
      table_ = &driver::cuda_driver();
    } catch (const Error& error) {
      if (gpu_required()) FAIL() << error.message();
      GTEST_SKIP() << "the cuda driver does not open here: " << error.message();
    }
  }

  void open_host() {
    cumempool_host_driver_options options{};
    options.size = sizeof(options);
    options.device_count = 2;
    options.granularity = GetParam().granularity;
    options.bytes_per_device = 64 * options.granularity;
    options.handle_types = CUMEMPOOL_HANDLE_POSIX_FD;
    table_ = driver::make_host_driver(options);
  }

  const cumempool_driver* table_ = nullptr;
  cumempool_memory_properties properties_{};  // of device 0, cannot be exported
  std::size_t granule_ = 0;
  cumempool_context_token token_{};
  bool entered_ = false;
};

}  // namespace cumempool::conformance
