// Puts one allocation to sleep and wakes it, through the C interface alone, on the host driver.
// Says "version, free bytes asleep, same address, same contents" on one line.
#include <cumempool/cumempool.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

void require(cumempool_status status) {
  if (status != CUMEMPOOL_OK) {
    std::fprintf(stderr, "%s\n", cumempool_last_error()->message);
    std::exit(1);
  }
}

}  // namespace

int main() {
  constexpr std::size_t bytes = 1 << 20;
  cumempool_host_driver_options host{};
  host.size = sizeof(host);
  host.device_count = 1;
  host.bytes_per_device = bytes;
  host.granularity = 64 << 10;
  const cumempool_driver* driver = nullptr;
  require(cumempool_host_driver_create(&host, &driver));
  cumempool_allocator_options options{};
  options.size = sizeof(options);
  cumempool_allocator* allocator = nullptr;
  require(cumempool_allocator_create(driver, &options, &allocator));
  require(cumempool_declare_tag(allocator, "weights", CUMEMPOOL_ON_SLEEP_OFFLOAD,
                                CUMEMPOOL_ON_WAKE_UNSET));
  cumempool_address address = 0;
  require(cumempool_malloc(allocator, "weights", 0, bytes, &address));
  // On the host driver the CPU uses the device's addresses.
  void* memory = reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
  std::memset(memory, 0x5a, bytes);

  const cumempool_tag_action action = {"weights", CUMEMPOOL_ON_SLEEP_OFFLOAD};
  cumempool_sleep_request request{};
  request.size = sizeof(request);
  request.tags = &action;
  request.tag_count = 1;
  cumempool_report* report = nullptr;
  require(cumempool_sleep(allocator, &request, &report));
  std::size_t rows = 0;
  const unsigned long long freed = cumempool_report_rows(report, &rows)->freed_bytes;
  cumempool_report_destroy(report);
  require(cumempool_wake(allocator, nullptr, 0, nullptr, 0, &report));
  cumempool_report_destroy(report);

  cumempool_allocation_info info{};
  info.size = sizeof info;
  require(cumempool_find(allocator, address, &info));
  const bool same = std::string(bytes, 0x5a) == std::string(static_cast<char*>(memory), bytes);
  std::printf("%s %llu %d %d\n", cumempool_version(), freed, info.address == address ? 1 : 0,
              same ? 1 : 0);
  require(cumempool_free(address));
  require(cumempool_allocator_close(allocator, 0));
  cumempool_allocator_destroy(allocator);
  cumempool_host_driver_destroy(driver);
  return 0;
}
