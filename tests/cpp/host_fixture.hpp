// What the tests of the core stand on: a host driver that must end up empty, an allocator over it
// whose calls return values, and patterns in device memory, which the CPU reads at its address.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cumempool/cumempool.h"
#include "driver/host_driver.hpp"

namespace cumempool::tests {

constexpr std::size_t kGranule = std::size_t{64} << 10;
constexpr std::size_t kDeviceGranules = 64;
constexpr cumempool_on_sleep kOffload = CUMEMPOOL_ON_SLEEP_OFFLOAD;
constexpr cumempool_on_sleep kDiscard = CUMEMPOOL_ON_SLEEP_DISCARD;

// Ends the test where a call that it builds on fails.
inline void must(cumempool_status status) {
  if (status != CUMEMPOOL_OK) throw std::runtime_error(cumempool_last_error()->message);
}

// ---- contents ----------------------------------------------------------------------------------

inline std::uint8_t* bytes_at(cumempool_address address) {
  return reinterpret_cast<std::uint8_t*>(static_cast<std::uintptr_t>(address));  // NOLINT
}

// Differs from place to place and from seed to seed.
inline std::uint8_t pattern_byte(std::size_t index, std::uint32_t seed) {
  return static_cast<std::uint8_t>(index * 31 + (index >> 8) * 7 + (index >> 16) * 13 +
                                   std::size_t{seed} * 101);
}

inline void write_pattern(cumempool_address address, std::size_t bytes, std::uint32_t seed) {
  for (std::size_t i = 0; i < bytes; ++i) bytes_at(address)[i] = pattern_byte(i, seed);
}

// Whether `bytes` bytes from `offset` on hold what write_pattern(address, ...) wrote there.
inline bool holds_pattern(cumempool_address address, std::size_t offset, std::size_t bytes,
                          std::uint32_t seed) {
  for (std::size_t i = offset; i < offset + bytes; ++i) {
    if (bytes_at(address)[i] != pattern_byte(i, seed)) return false;
  }
  return true;
}

inline bool holds_pattern(cumempool_address address, std::size_t bytes, std::uint32_t seed) {
  return holds_pattern(address, 0, bytes, seed);
}

inline bool all_are(cumempool_address address, std::size_t bytes, std::uint8_t value) {
  return std::all_of(bytes_at(address), bytes_at(address) + bytes,
                     [value](std::uint8_t byte) { return byte == value; });
}

// ---- driver ------------------------------------------------------------------------------------

// A host driver; its end fails the test if anything was not given back.
class Host {
 public:
  explicit Host(std::uint64_t granules_per_device = kDeviceGranules, std::int32_t devices = 2,
                std::uint64_t granule = kGranule,
                std::uint32_t handle_types = CUMEMPOOL_HANDLE_POSIX_FD, bool rdma = false,
                cumempool_fence_way fence = CUMEMPOOL_FENCE_HOST_REGISTRATION) {
    cumempool_host_driver_options options{};
    options.size = sizeof options;
    options.device_count = devices;
    options.bytes_per_device = granules_per_device * granule;
    options.granularity = granule;
    options.handle_types = handle_types;
    options.rdma = rdma ? 1 : 0;
    options.fence = fence;
    must(cumempool_host_driver_create(&options, &table_));
  }
  ~Host() {
    expect_empty();
    cumempool_host_driver_destroy(table_);
  }
  Host(const Host&) = delete;
  Host(Host&&) = delete;
  Host& operator=(const Host&) = delete;
  Host& operator=(Host&&) = delete;

  const cumempool_driver& table() const { return *table_; }
  driver::HostDriverCounters counters() const { return driver::host_driver_counters(table_); }

  void expect_empty() const {
    const auto left = counters();
    EXPECT_EQ(left.reserved_bytes, 0U);
    EXPECT_EQ(left.handles, 0U);
    EXPECT_EQ(left.mapped_bytes, 0U);
    EXPECT_EQ(left.allocations, 0U);
    EXPECT_EQ(left.charged_bytes, 0U);
    EXPECT_EQ(left.registered_bytes, 0U);
    EXPECT_EQ(left.streams, 0U);
    EXPECT_EQ(left.events, 0U);
    EXPECT_EQ(left.retained_contexts, 0U);
    EXPECT_EQ(left.entered_contexts, 0U);
  }

 private:
  const cumempool_driver* table_ = nullptr;
};

// A program's own stream on a device, with the device's context held as torch holds it: past the
// table, which the program has nothing to do with.
class UserStream {
 public:
  explicit UserStream(const Host& host, int device = 0) : table_(host.table()), device_(device) {
    driver::host_driver_hold_context(&table_, device_, true);
    inside([&] { return table_.stream_create(table_.self, device_, &stream_); });
  }
  ~UserStream() {
    inside([&] { return table_.stream_destroy(table_.self, device_, stream_); });
    driver::host_driver_hold_context(&table_, device_, false);
  }
  UserStream(const UserStream&) = delete;
  UserStream(UserStream&&) = delete;
  UserStream& operator=(const UserStream&) = delete;
  UserStream& operator=(UserStream&&) = delete;

  cumempool_device_stream get() const {
    return {sizeof(cumempool_device_stream), device_, stream_};
  }

  // Queues a fill, which runs only when somebody waits for it.
  void fill(cumempool_address address, std::size_t bytes, std::uint8_t value) {
    inside([&] { return table_.fill(table_.self, device_, address, value, bytes, stream_); });
  }
  // Waits for all of it.
  cumempool_result synchronize() const {
    return inside([&] { return table_.stream_synchronize(table_.self, device_, stream_); }, false);
  }
  void set_capturing(bool capturing) {
    if (!driver::host_driver_set_capturing(&table_, device_, stream_, capturing)) {
      throw std::runtime_error("there is no such stream");
    }
  }

 private:
  static void check(cumempool_result result) {
    if (result != CUMEMPOOL_RESULT_SUCCESS) throw std::runtime_error(cumempool_result_name(result));
  }
  // The table lends its context for the one call.
  template <typename Call>
  cumempool_result inside(const Call& call, bool checked = true) const {
    cumempool_context_token token{};
    check(table_.context_retain(table_.self, device_));
    check(table_.context_enter(table_.self, device_, &token));
    const cumempool_result result = call();
    check(table_.context_leave(table_.self, &token));
    check(table_.context_release(table_.self, device_));
    if (checked) check(result);
    return result;
  }

  const cumempool_driver& table_;
  int device_;
  cumempool_stream stream_ = 0;
};

// ---- allocator ---------------------------------------------------------------------------------

// What a transition returned.
struct Outcome {
  Outcome() = default;
  // Takes the report, which may be NULL.
  Outcome(cumempool_status returned, cumempool_report* report) : status(returned) {
    if (report == nullptr) return;
    seconds = cumempool_report_seconds(report);
    std::size_t count = 0;
    const auto* all_rows = cumempool_report_rows(report, &count);
    rows.assign(all_rows, all_rows + count);
    const auto* all_problems = cumempool_report_problems(report, &count);
    problems.assign(all_problems, all_problems + count);
    cumempool_report_destroy(report);
  }

  cumempool_status status = CUMEMPOOL_OK;
  double seconds = 0;
  std::vector<cumempool_report_row> rows;  // tags valid as long as the allocator
  std::vector<std::string> problems;

  cumempool_report_row row(const std::string& tag, int device = 0) const {
    const auto found = std::find_if(rows.begin(), rows.end(), [&](const auto& candidate) {
      return candidate.tag == tag && candidate.device == device;
    });
    if (found == rows.end()) throw std::runtime_error("the report has no row for " + tag);
    return *found;
  }
};

struct Picture {
  cumempool_totals totals{};
  std::vector<cumempool_tag_stats> tags;  // names valid as long as the allocator
  std::vector<cumempool_allocation_info> allocations;
  std::string last_malloc_failure;

  cumempool_tag_stats tag(const std::string& name, int device = 0) const {
    const auto found = std::find_if(tags.begin(), tags.end(), [&](const auto& candidate) {
      return candidate.tag == name && candidate.device == device;
    });
    if (found == tags.end()) throw std::runtime_error("the snapshot has no row for " + name);
    return *found;
  }
};

struct SleepCall {
  std::vector<cumempool_tag_action> tags;
  std::vector<cumempool_extent> dead{};
  std::vector<cumempool_device_stream> streams{};
  bool drop_backups = false;
  std::uint64_t dead_as_of = 0;
};

inline cumempool_backup_policy backup_in(cumempool_backup_tier tier,
                                         const char* directory = nullptr, std::int32_t peer = 0) {
  return {sizeof(cumempool_backup_policy), tier, directory, peer, 0};
}

// Valid as long as `peers`.
inline cumempool_memory_policy memory_of(cumempool_backing backing,
                                         const std::vector<std::int32_t>& peers, bool all_peers,
                                         bool rdma = true) {
  return {sizeof(cumempool_memory_policy),
          backing,
          all_peers ? 1U : 0U,
          static_cast<std::uint32_t>(peers.size()),
          peers.data(),
          rdma ? 0U : 1U,
          0};
}

inline cumempool_allocator_options pool_options(std::uint64_t host_backup_limit = 0,
                                                bool retain_backups = false) {
  cumempool_allocator_options options{};
  options.size = sizeof options;
  options.retain_backups = retain_backups ? 1 : 0;
  options.host_backup_limit = host_backup_limit;
  return options;
}

// A wake in a thread of its own; its end waits for that thread.
class Waking {
 public:
  Waking(cumempool_allocator* allocator, const std::optional<std::vector<const char*>>& tags,
         const std::vector<cumempool_address>& first,
         const std::vector<cumempool_device_stream>& streams)
      : status_(cumempool_wake_begin(allocator, tags ? tags->data() : nullptr,
                                     tags ? tags->size() : 0, first.data(), first.size(),
                                     streams.data(), streams.size(), &waking_)) {}
  ~Waking() { destroy(); }
  Waking(const Waking&) = delete;
  Waking(Waking&&) = delete;
  Waking& operator=(const Waking&) = delete;
  Waking& operator=(Waking&&) = delete;

  cumempool_status status() const { return status_; }  // of the beginning
  cumempool_waking* get() const { return waking_; }
  cumempool_status wait(cumempool_address address, const cumempool_device_stream& stream) const {
    return cumempool_waking_wait(waking_, address, stream);
  }
  bool done() const { return cumempool_waking_done(waking_) != 0; }
  Outcome finish() const {
    cumempool_report* report = nullptr;
    const cumempool_status status = cumempool_waking_finish(waking_, &report);
    return {status, report};
  }
  void destroy() {
    cumempool_waking_destroy(waking_);
    waking_ = nullptr;
  }

 private:
  cumempool_waking* waking_ = nullptr;
  cumempool_status status_;
};

// A view of a backup, until its end.
class View {
 public:
  View(cumempool_allocator* allocator, cumempool_address address, std::uint64_t bytes,
       bool writable = false) {
    view_.size = sizeof view_;
    status_ = cumempool_view_backup(allocator, address, bytes, writable ? 1 : 0, &view_);
  }
  ~View() { end(); }
  View(const View&) = delete;
  View(View&&) = delete;
  View& operator=(const View&) = delete;
  View& operator=(View&&) = delete;

  cumempool_status status() const { return status_; }
  std::uint8_t* data() const { return static_cast<std::uint8_t*>(view_.data); }
  // As an address, for the functions that compare contents.
  cumempool_address address() const { return reinterpret_cast<std::uintptr_t>(view_.data); }
  void end() {
    cumempool_end_backup_view(view_.lease);
    view_.lease = nullptr;
  }

 private:
  cumempool_backup_view view_{};
  cumempool_status status_;
};

class Pool {
 public:
  Pool(const cumempool_driver& table, const cumempool_allocator_options& options) {
    must(cumempool_allocator_create(&table, &options, &allocator_));
    must(cumempool_set_free_wait(allocator_, CUMEMPOOL_FREE_WAITS));
  }
  explicit Pool(const cumempool_driver& table, std::uint64_t host_backup_limit = 0)
      : Pool(table, pool_options(host_backup_limit)) {}
  explicit Pool(const Host& host, std::uint64_t host_backup_limit = 0)
      : Pool(host.table(), host_backup_limit) {}
  // Frees what the test left: an address stays reserved until it is freed, also past the allocator.
  ~Pool() {
    if (allocator_ == nullptr) return;
    for (const auto& left : snapshot().allocations) cumempool_free(left.address);
    destroy();
  }
  Pool(const Pool&) = delete;
  Pool(Pool&&) = delete;
  Pool& operator=(const Pool&) = delete;
  Pool& operator=(Pool&&) = delete;

  cumempool_allocator* get() const { return allocator_; }
  void destroy() {
    cumempool_allocator_destroy(allocator_);
    allocator_ = nullptr;
  }

  void declare(const char* tag, cumempool_on_wake on_wake = CUMEMPOOL_ON_WAKE_UNSET) const {
    must(cumempool_declare_tag(allocator_, tag, CUMEMPOOL_ON_SLEEP_UNSET, on_wake));
  }
  cumempool_status set_backup(const char* tag, const cumempool_backup_policy& policy) const {
    declare(tag);
    return cumempool_set_backup(allocator_, tag, &policy);
  }
  cumempool_status set_memory(const char* tag, cumempool_backing backing,
                              const std::vector<std::int32_t>& peers = {}, bool all_peers = false,
                              bool rdma = true) const {
    declare(tag);
    const cumempool_memory_policy policy = memory_of(backing, peers, all_peers, rdma);
    return cumempool_set_memory(allocator_, tag, &policy);
  }
  std::uint64_t pin(const char* tag, const char* holder) const {
    std::uint64_t pin = 0;
    must(cumempool_pin(allocator_, tag, holder, &pin));
    return pin;
  }
  cumempool_status try_malloc(const char* tag, std::size_t bytes, int device,
                              cumempool_address& address) const {
    return cumempool_malloc(allocator_, tag, device, bytes, &address);
  }
  cumempool_address malloc(const char* tag, std::size_t bytes, int device = 0) const {
    declare(tag);
    cumempool_address address = 0;
    must(try_malloc(tag, bytes, device, address));
    return address;
  }

  static cumempool_sleep_request request_for(const SleepCall& call) {
    cumempool_sleep_request request{};
    request.size = sizeof request;
    request.drop_backups = call.drop_backups ? 1 : 0;
    request.tags = call.tags.data();
    request.tag_count = call.tags.size();
    request.dead = call.dead.data();
    request.dead_count = call.dead.size();
    request.dead_as_of = call.dead_as_of;
    request.streams = call.streams.data();
    request.stream_count = call.streams.size();
    return request;
  }

  cumempool_status prepare(const SleepCall& call, std::uint64_t& pinned,
                           const std::vector<const char*>& yielding = {}) const {
    const cumempool_sleep_request request = request_for(call);
    return cumempool_prepare(allocator_, &request, yielding.data(), yielding.size(), &pinned);
  }

  Outcome sleep(const SleepCall& call) const {
    const cumempool_sleep_request request = request_for(call);
    cumempool_report* report = nullptr;
    const cumempool_status status = cumempool_sleep(allocator_, &request, &report);
    return {status, report};
  }
  std::uint64_t moment() const {
    std::uint64_t moment = 0;
    must(cumempool_moment(allocator_, &moment));
    return moment;
  }
  Outcome sleep(const char* tag, cumempool_on_sleep action) const {
    return sleep(SleepCall{{{tag, action}}});
  }

  // Every tag, or only the listed ones.
  Outcome wake(const std::optional<std::vector<const char*>>& tags = std::nullopt,
               const std::vector<cumempool_device_stream>& streams = {}) const {
    static const char* const none = nullptr;
    cumempool_report* report = nullptr;
    const char* const* first = !tags ? nullptr : tags->empty() ? &none : tags->data();
    const cumempool_status status = cumempool_wake(allocator_, first, tags ? tags->size() : 0,
                                                   streams.data(), streams.size(), &report);
    return {status, report};
  }

  Outcome swap(const SleepCall& sleep,
               const std::optional<std::vector<const char*>>& wake = std::nullopt) const {
    const cumempool_sleep_request leaving = request_for(sleep);
    cumempool_swap_request request{};
    request.size = sizeof request;
    request.sleep = &leaving;
    request.wake_tags = wake ? wake->data() : nullptr;
    request.wake_tag_count = wake ? wake->size() : 0;
    cumempool_report* report = nullptr;
    const cumempool_status status = cumempool_swap(allocator_, &request, &report);
    return {status, report};
  }

  Waking begin_wake(const std::optional<std::vector<const char*>>& tags = std::nullopt,
                    const std::vector<cumempool_address>& first = {},
                    const std::vector<cumempool_device_stream>& streams = {}) const {
    return {allocator_, tags, first, streams};
  }

  std::uint64_t release_host_memory() const {
    std::uint64_t released = 0;
    must(cumempool_release_host_memory(allocator_, &released));
    return released;
  }

  cumempool_status close(bool force = false) const {
    return cumempool_allocator_close(allocator_, force ? 1 : 0);
  }

  Picture snapshot(bool allocations = true) const {
    cumempool_snapshot* taken = nullptr;
    must(cumempool_take_snapshot(allocator_, allocations ? 1 : 0, &taken));
    Picture picture;
    picture.totals = *cumempool_snapshot_totals(taken);
    std::size_t count = 0;
    const auto* tags = cumempool_snapshot_tags(taken, &count);
    picture.tags.assign(tags, tags + count);
    const auto* infos = cumempool_snapshot_allocations(taken, &count);
    picture.allocations.assign(infos, infos + count);
    picture.last_malloc_failure = cumempool_snapshot_last_malloc_failure(taken);
    cumempool_snapshot_destroy(taken);
    return picture;
  }

  cumempool_allocation_info find(cumempool_address address) const {
    cumempool_allocation_info info{};
    info.size = sizeof info;
    must(cumempool_find(allocator_, address, &info));
    return info;
  }

 private:
  cumempool_allocator* allocator_ = nullptr;
};

// R13: the rows of the tags add up to the totals, and the totals to what the driver says it gave,
// where `pool` is the only allocator on that driver, no view is open, and nothing else runs.
// `settled`: no copy failed in a way that nobody knows whether it still runs.
inline void expect_exact_numbers(const Pool& pool, const driver::HostDriverCounters& counters,
                                 bool settled = true) {
  const Picture picture = pool.snapshot();
  const cumempool_totals& totals = picture.totals;
  EXPECT_EQ(totals.physical_bytes + totals.peer_bytes, counters.charged_bytes);
  EXPECT_EQ(totals.host_bytes + totals.staging_bytes, counters.registered_bytes);

  std::uint64_t awake = 0;
  std::uint64_t asleep = 0;
  std::uint64_t unreleased = 0;
  std::uint64_t ordinary = 0;  // has no reservation, and no mapping that the driver counts
  bool peers = false;          // their addresses and mappings are not counted
  for (const cumempool_tag_stats& tag : picture.tags) {
    peers = peers || tag.backup_tier == CUMEMPOOL_BACKUP_PEER;
    awake += tag.awake_bytes;
    asleep += tag.backed_up_bytes + tag.discarded_bytes;
    unreleased += tag.unreleased_bytes;
  }
  std::uint64_t ordinary_allocations = 0;
  std::uint64_t pinned_backups = 0;
  for (const cumempool_allocation_info& info : picture.allocations) {
    if (info.backup_tier == CUMEMPOOL_BACKUP_PINNED) pinned_backups += info.backup_bytes;
    if (info.backing != CUMEMPOOL_BACKING_CUDA_MALLOC) continue;
    ordinary += info.bytes;
    ordinary_allocations += 1;
  }
  const std::uint64_t reserved = awake + asleep - ordinary;
  // What waits to be freed may be ordinary as well; nobody says how much of it is.
  EXPECT_LE(ordinary_allocations, counters.allocations);
  const bool all_told = counters.allocations == ordinary_allocations;
  const std::uint64_t waiting = totals.pending_free_bytes + totals.leaked_bytes;
  if (all_told && totals.leaked_bytes == 0) {
    EXPECT_EQ(totals.reserved_address_bytes, reserved + totals.pending_free_bytes);
  }
  if (all_told) {
    EXPECT_LE(totals.reserved_address_bytes, reserved + waiting);
  }
  EXPECT_GE(totals.reserved_address_bytes, reserved);
  if (!peers) {
    EXPECT_EQ(totals.reserved_address_bytes, counters.reserved_bytes);
    if (all_told) {
      EXPECT_EQ(totals.mapped_bytes, counters.mapped_bytes + ordinary);
    }
    EXPECT_GE(totals.mapped_bytes, counters.mapped_bytes + ordinary);
  }
  // What waits to be freed, or is leaked, may have given up its memory already, and keep only its
  // address.
  EXPECT_GE(totals.physical_bytes, awake + unreleased);
  EXPECT_LE(totals.physical_bytes, awake + unreleased + waiting);
  EXPECT_GE(totals.mapped_bytes, awake);
  EXPECT_LE(totals.mapped_bytes, awake + unreleased + waiting);
  if (totals.pending_free_bytes == 0 && settled) {
    EXPECT_EQ(totals.host_used_bytes, pinned_backups);
  }
  EXPECT_GE(totals.host_used_bytes, pinned_backups);
  EXPECT_LE(totals.host_used_bytes, totals.host_bytes);
}

inline void expect_exact_numbers(const Pool& pool, const Host& host, bool settled = true) {
  expect_exact_numbers(pool, host.counters(), settled);
}

}  // namespace cumempool::tests
