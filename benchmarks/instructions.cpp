// Runs the pool's paths a fixed number of times on the host driver, each in a function of its own
// whose name begins with measure_, so that a profiler can count their instructions without a GPU.
// scripts/instruction_counts.sh reads them.
//
//   instructions [ALLOCATIONS]
//
// Allocations are as small as can be and nearly all of each is dead, so that the paths are counted
// and not the copying of bytes.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cumempool/cumempool.h"

extern "C" void* cumempool_malloc_0(ssize_t bytes, int device, void* stream);
extern "C" void cumempool_free_0(void* address, ssize_t bytes, int device, void* stream);

namespace {

constexpr size_t kGranularity = 4096;
constexpr size_t kLiveBytes = 512;  // the least that a dead range leaves
constexpr const char* kTag = "bench";

void require(cumempool_status status) {
  if (status == CUMEMPOOL_OK) return;
  std::fprintf(stderr, "instructions: %s\n", cumempool_last_error()->message);
  std::exit(1);
}

class Pool {
 public:
  explicit Pool(size_t allocations) : addresses_(allocations) {
    cumempool_host_driver_options host{};
    host.size = sizeof host;
    host.device_count = 1;
    host.bytes_per_device = 4 * allocations * kGranularity;
    host.granularity = kGranularity;
    require(cumempool_host_driver_create(&host, &driver_));
    cumempool_allocator_options options{};
    options.size = sizeof options;
    options.retain_backups = 1;
    require(cumempool_allocator_create(driver_, &options, &allocator_));
    require(cumempool_set_free_wait(allocator_, CUMEMPOOL_FREE_WAITS));  // all in this thread
    require(
        cumempool_declare_tag(allocator_, kTag, CUMEMPOOL_ON_SLEEP_UNSET, CUMEMPOOL_ON_WAKE_UNSET));
  }
  ~Pool() {
    cumempool_allocator_close(allocator_, 1);
    cumempool_allocator_destroy(allocator_);
    cumempool_host_driver_destroy(driver_);
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // A tag whose slot is bound does not sleep.
  void bind() {
    uint32_t slot = 1;
    require(cumempool_bind_slot(allocator_, kTag, &slot));
    if (slot != 0) std::abort();
  }
  void unbind() { require(cumempool_unbind_slot(0)); }

  void malloc_all() {
    for (void*& address : addresses_) {
      address = cumempool_malloc_0(kGranularity, 0, nullptr);
      if (address == nullptr) std::abort();
    }
  }

  void free_all() {
    for (void* address : addresses_) cumempool_free_0(address, kGranularity, 0, nullptr);
  }

  // Fresh contents for every allocation; the rest of each is dead.
  void change_all(int byte) {
    dead_.clear();
    for (void* address : addresses_) {
      std::memset(address, byte, kLiveBytes);
      const auto start = reinterpret_cast<cumempool_address>(address);
      dead_.push_back({start + kLiveBytes, kGranularity - kLiveBytes});
    }
  }

  void sleep(cumempool_on_sleep action) {
    const cumempool_tag_action tag{kTag, action};
    cumempool_sleep_request request{};
    request.size = sizeof request;
    request.tags = &tag;
    request.tag_count = 1;
    request.dead = dead_.data();
    request.dead_count = dead_.size();
    cumempool_report* report = nullptr;
    require(cumempool_sleep(allocator_, &request, &report));
    copied_bytes_ = total(report, &cumempool_report_row::backed_up_bytes) -
                    total(report, &cumempool_report_row::clean_bytes);
    cumempool_report_destroy(report);
  }

  void wake() {
    cumempool_report* report = nullptr;
    require(cumempool_wake(allocator_, nullptr, 0, nullptr, 0, &report));
    cumempool_report_destroy(report);
  }

  // A count of something else than what its name says would mislead.
  void require_copied(size_t bytes_of_each) const {
    if (copied_bytes_ == bytes_of_each * addresses_.size()) return;
    std::fprintf(stderr, "instructions: %llu bytes were copied\n",
                 static_cast<unsigned long long>(copied_bytes_));
    std::exit(1);
  }

 private:
  static uint64_t total(const cumempool_report* report, uint64_t cumempool_report_row::*field) {
    size_t count = 0;
    const cumempool_report_row* rows = cumempool_report_rows(report, &count);
    uint64_t sum = 0;
    for (size_t row = 0; row < count; ++row) sum += rows[row].*field;
    return sum;
  }

  const cumempool_driver* driver_ = nullptr;
  cumempool_allocator* allocator_ = nullptr;
  std::vector<void*> addresses_;
  std::vector<cumempool_extent> dead_;
  uint64_t copied_bytes_ = 0;
};

}  // namespace

// What the profiler looks for: C names, never inlined.
#define MEASURED extern "C" __attribute__((noinline, used)) void

MEASURED measure_malloc(Pool& pool) { pool.malloc_all(); }
MEASURED measure_free(Pool& pool) { pool.free_all(); }
MEASURED measure_sleep(Pool& pool) { pool.sleep(CUMEMPOOL_ON_SLEEP_OFFLOAD); }
MEASURED measure_clean_sleep(Pool& pool) { pool.sleep(CUMEMPOOL_ON_SLEEP_OFFLOAD); }
MEASURED measure_wake(Pool& pool) { pool.wake(); }
MEASURED measure_discard(Pool& pool) { pool.sleep(CUMEMPOOL_ON_SLEEP_DISCARD); }
MEASURED measure_remap(Pool& pool) { pool.wake(); }

int main(int argc, char** argv) {
  Pool pool(argc > 1 ? std::max(1ul, std::strtoul(argv[1], nullptr, 10)) : 256);
  // Once unmeasured, so that memory, threads and symbols are there.
  pool.bind();
  pool.malloc_all();
  pool.unbind();
  pool.change_all(1);
  pool.sleep(CUMEMPOOL_ON_SLEEP_OFFLOAD);
  pool.wake();
  pool.free_all();

  pool.bind();
  measure_malloc(pool);
  pool.unbind();
  pool.change_all(2);
  pool.sleep(CUMEMPOOL_ON_SLEEP_OFFLOAD);  // the first sleep of these allocations
  pool.wake();
  pool.change_all(3);
  measure_sleep(pool);
  pool.require_copied(kLiveBytes);
  measure_wake(pool);
  measure_clean_sleep(pool);
  pool.require_copied(0);
  pool.wake();
  measure_discard(pool);
  measure_remap(pool);
  measure_free(pool);
  return 0;
}
