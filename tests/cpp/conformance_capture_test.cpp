// The contract of driver.h held to account on any driver, fourth part: no entry disturbs a stream
// capture (C4). The table cannot start one: on a GPU libcuda is asked, the host driver pretends.
#include <dlfcn.h>

#include <array>
#include <thread>

#include "conformance_fixture.hpp"

namespace cumempool::conformance {
namespace {

// Of cuda.h, which only the driver includes: CUstreamCaptureMode.
enum Mode : int { kGlobal = 0, kThreadLocal = 1, kRelaxed = 2 };

template <typename Function>
Function libcuda(const char* name) {
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  void* const symbol = library == nullptr ? nullptr : dlsym(library, name);
  if (symbol == nullptr) throw std::runtime_error(std::string(name) + " is missing");
  return reinterpret_cast<Function>(symbol);
}

// A capture that is under way on a stream of device 0.
class Capture {
 public:
  Capture(const cumempool_driver& table, bool cuda, cumempool_stream stream, Mode mode)
      : table_(table), cuda_(cuda), stream_(stream) {
    if (cuda_) {
      using Begin = int (*)(std::uint64_t, int);
      must(libcuda<Begin>("cuStreamBeginCapture_v2")(stream_, mode), "cuStreamBeginCapture");
    } else {
      driver::host_driver_set_capturing(&table_, 0, stream_, true);
    }
  }

  // Puts work into the capture, where there is a real one.
  void use(cumempool_address address) const {
    if (cuda_)
      must(CALL(table_, fill, 0, address, std::uint8_t{1}, std::size_t{64}, stream_), "fill");
  }

  // Says what ending the capture said: success where nothing has disturbed it.
  cumempool_result end() const {
    int capturing = 0;
    must(CALL(table_, stream_is_capturing, 0, stream_, &capturing), "stream_is_capturing");
    EXPECT_EQ(capturing, 1);
    if (!cuda_) {
      driver::host_driver_set_capturing(&table_, 0, stream_, false);
      return CUMEMPOOL_RESULT_SUCCESS;
    }
    std::uint64_t graph = 0;
    using End = int (*)(std::uint64_t, std::uint64_t*);
    using Destroy = int (*)(std::uint64_t);
    const int result = libcuda<End>("cuStreamEndCapture")(stream_, &graph);
    if (graph != 0) libcuda<Destroy>("cuGraphDestroy")(graph);
    return graph != 0 ? result : CUMEMPOOL_RESULT_NOT_FOUND;
  }

 private:
  const cumempool_driver& table_;
  bool cuda_;
  cumempool_stream stream_;
};

// Streams wait for each other, and events are asked and waited for.
void use_streams_and_events(const cumempool_driver& table, cumempool_address address,
                            const HostBuffer& pages) {
  const Stream first(table);
  const Stream second(table);
  const Event event(table);
  must(CALL(table, fill, 0, address, std::uint8_t{3}, std::size_t{4096}, first.get()), "fill");
  must(CALL(table, event_record, 0, event.get(), first.get()), "event_record");
  must(CALL(table, stream_wait_event, 0, second.get(), event.get()), "stream_wait_event");
  must(CALL(table, copy_on_device, 0, address + 4096, address, std::size_t{4096}, second.get()),
       "copy_on_device");
  must(CALL(table, copy_to_host, 0, pages.data(), address + 4096, std::size_t{4096}, second.get()),
       "copy_to_host");
  must(CALL(table, event_record, 0, event.get(), second.get()), "event_record");
  cumempool_result result = CUMEMPOOL_RESULT_NOT_READY;
  while (result == CUMEMPOOL_RESULT_NOT_READY) result = CALL(table, event_query, 0, event.get());
  must(result, "event_query");
  EXPECT_TRUE(pages.all_are(0, 4096, 3));
  must(CALL(table, copy_to_device, 0, address, pages.data(), std::size_t{4096}, second.get()),
       "copy_to_device");
  must(CALL(table, event_synchronize, 0, event.get()), "event_synchronize");
  must(CALL(table, stream_synchronize, 0, second.get()), "stream_synchronize");
}

void use_ordinary_memory(const cumempool_driver& table, const HostBuffer& pages) {
  const Stream stream(table);
  const Allocation memory(table, 2u << 20);
  must(CALL(table, fill, 0, memory.address(), std::uint8_t{4}, std::size_t{4096}, stream.get()),
       "fill");
  must(
      CALL(table, copy_to_host, 0, pages.data(), memory.address(), std::size_t{4096}, stream.get()),
      "copy_to_host");
  must(CALL(table, stream_synchronize, 0, stream.get()), "stream_synchronize");
  EXPECT_TRUE(pages.all_are(0, 4096, 4));
}

// Every entry that works on memory, streams or events, at least once. The first digest of a context
// also loads the code for it.
void use_all(const cumempool_driver& table, const cumempool_memory_properties& properties,
             std::size_t granule) {
  const Block block(table, granule, properties);
  const HostBuffer pages(table, 8192);
  use_streams_and_events(table, block.address(), pages);
  use_ordinary_memory(table, pages);
  const Stream stream(table);
  const auto first = digests_of(table, 1, {{block.address(), 4096}}, stream.get());
  const auto second = digests_of(table, 1, {{block.address() + 4096, 4096}}, stream.get());
  EXPECT_EQ(first.front().low, second.front().low);
  std::uint64_t bytes = 0;
  must(CALL(table, memory_info, 0, &bytes, &bytes), "memory_info");
  must(fence(table, 0), "fence");
}

TEST_P(DriverConformance, C4_EntriesLeaveACaptureOfTheirThreadIntact) {
  const Block block(table(), granule(), properties());
  const Stream stream(table());
  for (const Mode mode : {kRelaxed, kThreadLocal, kGlobal}) {
    const Capture capture(table(), is_cuda(), stream.get(), mode);
    capture.use(block.address());
    use_all(table(), properties(), granule());
    capture.use(block.address());
    EXPECT_EQ(capture.end(), CUMEMPOOL_RESULT_SUCCESS) << mode;
  }
}

TEST_P(DriverConformance, C4_EntriesLeaveACaptureOfAnotherThreadIntact) {
  const Block block(table(), granule(), properties());
  const Stream stream(table());
  for (const Mode mode : {kRelaxed, kThreadLocal, kGlobal}) {
    const Capture capture(table(), is_cuda(), stream.get(), mode);
    capture.use(block.address());
    std::thread([&] {
      try {
        const Inside inside(table());
        use_all(table(), properties(), granule());
      } catch (const std::runtime_error& error) {
        ADD_FAILURE() << error.what();
      }
    }).join();
    capture.use(block.address());
    EXPECT_EQ(capture.end(), CUMEMPOOL_RESULT_SUCCESS) << mode;
  }
}

}  // namespace
}  // namespace cumempool::conformance
