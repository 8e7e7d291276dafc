// The C interface of cumempool.h: argument checks, conversions, nothing else.
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "abi/boundary.hpp"
#include "cumempool/cumempool.h"
#include "driver/builtin.hpp"
#include "pool/allocator.hpp"
#include "pool/prepare.hpp"
#include "pool/registry.hpp"
#include "pool/sleep.hpp"
#include "pool/slot_table.hpp"
#include "pool/snapshot.hpp"
#include "pool/wake.hpp"
#include "vmm/probe.hpp"

using cumempool::Error;
using cumempool::abi::guarded;
using cumempool::abi::require;
using cumempool::driver::Driver;
namespace pool = cumempool::pool;

struct cumempool_allocator {
  std::shared_ptr<pool::Allocator> core;
};

// Reports and snapshots keep the allocator alive, whose tags their names point into.
struct cumempool_report {
  std::shared_ptr<pool::Allocator> core;
  pool::Report report;
  std::vector<const char*> problems;
};

struct cumempool_snapshot {
  std::shared_ptr<pool::Allocator> core;
  pool::Snapshot snapshot;
};

namespace {

std::string text(const char* value, const char* problem) {
  require(value != nullptr, problem);
  return value;
}

template <typename Item>
std::vector<Item> items(const Item* first, std::size_t count, const char* problem) {
  require(first != nullptr || count == 0, problem);
  return count == 0 ? std::vector<Item>{} : std::vector<Item>(first, first + count);
}

pool::Allocator& core(cumempool_allocator* allocator) {
  require(allocator != nullptr, "allocator is NULL");
  return *allocator->core;
}

cumempool_report* make_report(const cumempool_allocator& allocator, pool::Report&& report) {
  auto made = std::make_unique<cumempool_report>();
  made->core = allocator.core;
  made->report = std::move(report);
  for (const std::string& problem : made->report.problems) {
    made->problems.push_back(problem.c_str());
  }
  return made.release();
}

pool::SleepRequest convert(pool::Allocator& allocator, const cumempool_sleep_request& request) {
  require(request.size == sizeof request, "sleep request: size is not that of this version");
  pool::SleepRequest converted;
  for (const auto& [tag, action] : items(request.tags, request.tag_count, "tags is NULL")) {
    require(action == CUMEMPOOL_ON_SLEEP_OFFLOAD || action == CUMEMPOOL_ON_SLEEP_DISCARD,
            "the action of a tag is neither offload nor discard");
    const pool::Tag& known = allocator.tags().find(text(tag, "a tag is NULL"));
    require(converted.actions.emplace(&known, action).second, "a tag is listed twice");
  }
  converted.drop_backups = request.drop_backups != 0;
  converted.dead = items(request.dead, request.dead_count, "dead is NULL");
  converted.streams = items(request.streams, request.stream_count, "streams is NULL");
  return converted;
}

}  // namespace

const char* cumempool_version(void) { return CUMEMPOOL_VERSION; }

const cumempool_error* cumempool_last_error(void) { return cumempool::abi::last_error(); }

const char* cumempool_result_name(cumempool_result result) {
  return cumempool::result_name(result);
}

// ---- drivers -----------------------------------------------------------------------------------

cumempool_status cumempool_cuda_driver(const cumempool_driver** driver) {
  return guarded("cuda_driver", [&] {
    require(driver != nullptr, "driver is NULL");
    *driver = &cumempool::driver::cuda_driver();
    cumempool::driver::watch_forks();
  });
}

cumempool_status cumempool_host_driver_create(const cumempool_host_driver_options* options,
                                              const cumempool_driver** driver) {
  return guarded("host_driver_create", [&] {
    require(driver != nullptr && options != nullptr, "an argument is NULL");
    require(options->size == sizeof *options, "options: size is not that of this version");
    const cumempool_driver* made = cumempool::driver::make_host_driver(*options);
    Driver(*made).init();
    *driver = made;
    cumempool::driver::watch_forks();
  });
}

void cumempool_host_driver_destroy(const cumempool_driver* driver) {
  if (driver == nullptr || cumempool::driver::in_forked_child()) return;
  cumempool::driver::destroy_host_driver(driver);
}

cumempool_status cumempool_probe_device(const cumempool_driver* driver, int device,
                                        cumempool_device_probe* probe) {
  return guarded("probe", [&] {
    require(driver != nullptr && probe != nullptr, "an argument is NULL");
    require(probe->size == sizeof *probe, "probe: size is not that of this version");
    cumempool_device_probe filled = *probe;
    const Driver table(*driver);
    table.init();
    cumempool::vmm::probe_device(table, device, filled);
    *probe = filled;
  });
}

// ---- allocators --------------------------------------------------------------------------------

cumempool_status cumempool_allocator_create(const cumempool_driver* driver,
                                            const cumempool_allocator_options* options,
                                            cumempool_allocator** allocator) {
  return guarded("allocator_create", [&] {
    require(driver != nullptr && options != nullptr && allocator != nullptr, "an argument is NULL");
    require(options->size == sizeof *options, "options: size is not that of this version");
    require(driver->version == CUMEMPOOL_DRIVER_VERSION && driver->size == sizeof *driver,
            "the driver table is of another version");
    auto made = std::make_unique<cumempool_allocator>();
    made->core = std::make_shared<pool::Allocator>(Driver(*driver), *options);
    *allocator = made.release();
  });
}

cumempool_status cumempool_allocator_close(cumempool_allocator* allocator, int force) {
  return guarded("close", [&] { core(allocator).close(force != 0); });
}

void cumempool_allocator_destroy(cumempool_allocator* allocator) {
  if (allocator == nullptr || cumempool::driver::in_forked_child()) return;
  cumempool_allocator_close(allocator, 1);  // also what a failed close has left
  delete allocator;
}

cumempool_status cumempool_declare_tag(cumempool_allocator* allocator, const char* tag,
                                       cumempool_on_sleep on_sleep, cumempool_on_wake on_wake) {
  return guarded("declare_tag", [&] {
    pool::Allocator& open = core(allocator);
    open.check_open("declare_tag");
    open.tags().declare(text(tag, "tag is NULL"), {on_sleep, on_wake});
  });
}

cumempool_status cumempool_malloc(cumempool_allocator* allocator, const char* tag, int device,
                                  size_t bytes, cumempool_address* address) {
  return guarded("malloc", [&] {
    require(address != nullptr, "address is NULL");
    pool::Allocator& from = core(allocator);
    *address = from.malloc(from.tags().find(text(tag, "tag is NULL")), device, bytes);
  });
}

cumempool_status cumempool_free(cumempool_address address) {
  return guarded("free", [&] {
    const pool::RecordPointer record = pool::Registry::instance().take(address);
    if (record == nullptr) {
      throw Error(CUMEMPOOL_NOT_OWNED, "no live allocation starts at that address");
    }
    const std::shared_ptr<pool::Allocator> owner = record->owner;  // outlives its last record
    owner->free(record);
  });
}

// ---- slots -------------------------------------------------------------------------------------

uint32_t cumempool_slot_count(void) { return pool::kSlotCount; }

cumempool_status cumempool_bind_slot(cumempool_allocator* allocator, const char* tag,
                                     uint32_t* slot) {
  return guarded("bind_slot", [&] {
    require(slot != nullptr, "slot is NULL");
    const pool::Tag& known = core(allocator).tags().find(text(tag, "tag is NULL"));
    *slot = pool::SlotTable::instance().bind(allocator->core, known);
  });
}

cumempool_status cumempool_unbind_slot(uint32_t slot) {
  return guarded("unbind_slot", [&] { pool::SlotTable::instance().unbind(slot); });
}

// ---- transitions -------------------------------------------------------------------------------

cumempool_status cumempool_sleep(cumempool_allocator* allocator,
                                 const cumempool_sleep_request* request,
                                 cumempool_report** report) {
  return guarded("sleep", [&] {
    require(request != nullptr && report != nullptr, "an argument is NULL");
    pool::Allocator& sleeping = core(allocator);
    sleeping.check_open("sleep");
    *report = make_report(*allocator, pool::sleep(sleeping, convert(sleeping, *request)));
  });
}

cumempool_status cumempool_prepare(cumempool_allocator* allocator,
                                   const cumempool_sleep_request* request, uint64_t* pinned_bytes) {
  return guarded("prepare", [&] {
    require(request != nullptr && pinned_bytes != nullptr, "an argument is NULL");
    pool::Allocator& preparing = core(allocator);
    preparing.check_open("prepare");
    *pinned_bytes = pool::prepare(preparing, convert(preparing, *request));
  });
}

cumempool_status cumempool_wake(cumempool_allocator* allocator, const char* const* tags,
                                size_t tag_count, const cumempool_device_stream* streams,
                                size_t stream_count, cumempool_report** report) {
  return guarded("wake", [&] {
    require(report != nullptr, "report is NULL");
    pool::Allocator& waking = core(allocator);
    waking.check_open("wake");
    pool::WakeRequest request;
    request.all = tags == nullptr;
    for (std::size_t i = 0; tags != nullptr && i < tag_count; ++i) {
      request.tags.insert(&waking.tags().find(text(tags[i], "a tag is NULL")));
    }
    request.streams = items(streams, stream_count, "streams is NULL");
    *report = make_report(*allocator, pool::wake(waking, request));
  });
}

double cumempool_report_seconds(const cumempool_report* report) { return report->report.seconds; }

const cumempool_report_row* cumempool_report_rows(const cumempool_report* report, size_t* count) {
  *count = report->report.rows.size();
  return report->report.rows.data();
}

const char* const* cumempool_report_problems(const cumempool_report* report, size_t* count) {
  *count = report->problems.size();
  return report->problems.data();
}

void cumempool_report_destroy(cumempool_report* report) { delete report; }

cumempool_status cumempool_release_host_memory(cumempool_allocator* allocator,
                                               uint64_t* released_bytes) {
  return guarded("release_host_memory", [&] {
    require(released_bytes != nullptr, "released_bytes is NULL");
    *released_bytes = core(allocator).release_host_memory();
  });
}

// ---- what there is -----------------------------------------------------------------------------

cumempool_status cumempool_find(cumempool_allocator* allocator, cumempool_address address,
                                cumempool_allocation_info* info) {
  return guarded("find", [&] {
    require(info != nullptr, "info is NULL");
    *info = pool::find_allocation(allocator == nullptr ? nullptr : allocator->core.get(), address);
  });
}

cumempool_status cumempool_take_snapshot(cumempool_allocator* allocator, int allocations,
                                         cumempool_snapshot** snapshot) {
  return guarded("snapshot", [&] {
    require(snapshot != nullptr, "snapshot is NULL");
    auto made = std::make_unique<cumempool_snapshot>();
    made->snapshot = pool::take_snapshot(core(allocator), allocations != 0);
    made->core = allocator->core;
    *snapshot = made.release();
  });
}

const cumempool_totals* cumempool_snapshot_totals(const cumempool_snapshot* snapshot) {
  return &snapshot->snapshot.totals;
}

const cumempool_tag_stats* cumempool_snapshot_tags(const cumempool_snapshot* snapshot,
                                                   size_t* count) {
  *count = snapshot->snapshot.tags.size();
  return snapshot->snapshot.tags.data();
}

const cumempool_allocation_info* cumempool_snapshot_allocations(const cumempool_snapshot* snapshot,
                                                                size_t* count) {
  *count = snapshot->snapshot.allocations.size();
  return snapshot->snapshot.allocations.data();
}

const char* cumempool_snapshot_last_malloc_failure(const cumempool_snapshot* snapshot) {
  return snapshot->snapshot.last_malloc_failure.c_str();
}

void cumempool_snapshot_destroy(cumempool_snapshot* snapshot) { delete snapshot; }
