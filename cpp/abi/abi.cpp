// The C interface of cumempool.h: argument checks, conversions, nothing else.
#include <algorithm>
#include <cstddef>
#include <exception>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "abi/boundary.hpp"
#include "backup/host_limits.hpp"
#include "cumempool/cumempool.h"
#include "driver/builtin.hpp"
#include "pool/access.hpp"
#include "pool/allocator.hpp"
#include "pool/backup_plan.hpp"
#include "pool/offload.hpp"
#include "pool/records.hpp"
#include "pool/restore.hpp"
#include "pool/transitions.hpp"
#include "torch/slot_table.hpp"
#include "vmm/probe.hpp"
#include "vmm/shared_mapping.hpp"

using cumempool::Error;
using cumempool::abi::guarded;
using cumempool::abi::require;
using cumempool::driver::Driver;
namespace pool = cumempool::pool;
namespace torch = cumempool::torch;

struct cumempool_allocator {
  std::shared_ptr<pool::Allocator> core;
};

struct cumempool_report {
  pool::Report report;
  std::vector<const char*> problems;
};

struct cumempool_snapshot {
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

// Returns an array from a function without a status: NULL and 0 if `all` is NULL.
template <typename Item>
const Item* array(const std::vector<Item>* all, std::size_t* count) noexcept {
  if (count != nullptr) *count = all == nullptr ? 0 : all->size();
  return all == nullptr ? nullptr : all->data();
}

// Throws Error unless the size of a structure of the caller is that of this version.
template <typename Struct>
void require_size(const Struct& given, const char* what) {
  if (given.size == sizeof given) return;
  throw Error(CUMEMPOOL_INVALID_ARGUMENT, std::string(what) + ": size does not match this version");
}

std::vector<cumempool_device_stream> streams_of(const cumempool_device_stream* first,
                                                std::size_t count) {
  auto all = items(first, count, "streams is NULL");
  for (const cumempool_device_stream& stream : all) require_size(stream, "stream");
  return all;
}

pool::Allocator& core(cumempool_allocator* allocator) {
  require(allocator != nullptr, "allocator is NULL");
  return *allocator->core;
}

// Fills a report that was made before its transition, so that no failure can follow its success.
cumempool_report* fill(std::unique_ptr<cumempool_report> made, pool::Report&& report) noexcept {
  made->report = std::move(report);
  try {
    for (const std::string& problem : made->report.problems) {
      made->problems.push_back(problem.c_str());
    }
  } catch (const std::exception&) {
    // No memory for the whole list: it keeps the first problems.
  }
  return made.release();
}

pool::SleepRequest convert(pool::Allocator& allocator, const cumempool_sleep_request& request) {
  require_size(request, "sleep request");
  pool::SleepRequest converted;
  for (const auto& [tag, action] : items(request.tags, request.tag_count, "tags is NULL")) {
    require(action == CUMEMPOOL_ON_SLEEP_OFFLOAD || action == CUMEMPOOL_ON_SLEEP_DISCARD,
            "the action of a tag is neither offload nor discard");
    const pool::Tag& known = allocator.tags().find(text(tag, "a tag is NULL"));
    require(converted.actions.emplace(&known, action).second, "a tag is listed twice");
  }
  converted.drop_backups = request.drop_backups != 0;
  converted.dead = items(request.dead, request.dead_count, "dead is NULL");
  converted.dead_as_of = request.dead_as_of;
  converted.streams = streams_of(request.streams, request.stream_count);
  return converted;
}

pool::WakeRequest convert(pool::Allocator& allocator, const char* const* tags, size_t tag_count) {
  pool::WakeRequest request;
  request.all = tags == nullptr;
  for (std::size_t i = 0; tags != nullptr && i < tag_count; ++i) {
    request.tags.insert(&allocator.tags().find(text(tags[i], "a tag is NULL")));
  }
  return request;
}

}  // namespace

struct cumempool_waking {
  std::unique_ptr<cumempool_report> report;  // filled when the wake ends
  std::unique_ptr<pool::AsyncWake> waking;
};

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
    require_size(*options, "options");
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

cumempool_status cumempool_host_driver_launch(const cumempool_driver* driver, int device,
                                              void (*function)(void*), void* argument) {
  return guarded("host_driver_launch", [&] {
    require(driver != nullptr && function != nullptr, "an argument is NULL");
    cumempool::driver::host_driver_launch(driver, device, function, argument);
  });
}

cumempool_status cumempool_probe_device(const cumempool_driver* driver, int device,
                                        cumempool_device_probe* probe) {
  return guarded("probe", [&] {
    require(driver != nullptr && probe != nullptr, "an argument is NULL");
    require_size(*probe, "probe");
    cumempool_device_probe filled = *probe;
    const Driver table(*driver);
    table.init();
    cumempool::vmm::probe_device(table, device, filled);
    *probe = filled;
  });
}

cumempool_status cumempool_host_room(cumempool_host_memory* memory) {
  return guarded("host_room", [&] {
    require(memory != nullptr, "memory is NULL");
    require_size(*memory, "host memory");
    const cumempool::backup::HostRoom room = cumempool::backup::host_room();
    memory->free_bytes = room.bytes;
    memory->limit_bytes = room.limit;
    const std::size_t most = sizeof memory->source - 1;
    memory->source[room.source.copy(memory->source, most)] = '\0';
  });
}

// ---- allocators --------------------------------------------------------------------------------

cumempool_status cumempool_allocator_create(const cumempool_driver* driver,
                                            const cumempool_allocator_options* options,
                                            cumempool_allocator** allocator) {
  return guarded("allocator_create", [&] {
    require(driver != nullptr && options != nullptr && allocator != nullptr, "an argument is NULL");
    require_size(*options, "options");
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

int cumempool_allocator_closed(const cumempool_allocator* allocator) {
  return allocator != nullptr && allocator->core->closed() ? 1 : 0;
}

void cumempool_allocator_destroy(cumempool_allocator* allocator) {
  if (allocator == nullptr || cumempool::driver::in_forked_child()) return;
  cumempool_allocator_close(allocator, 1);  // also after a close that failed half-way
  delete allocator;
}

// Runs `body`, which checks and changes a choice of a tag. Its errors name the tag.
template <typename Body>
void change_tag(const pool::Tag& tag, const Body& body) {
  try {
    body();
  } catch (Error& error) {
    error.tag = tag.name;
    throw;
  }
}

cumempool_status cumempool_declare_tag(cumempool_allocator* allocator, const char* tag,
                                       cumempool_on_sleep on_sleep, cumempool_on_wake on_wake) {
  return guarded("declare_tag", [&] {
    pool::Allocator& open = core(allocator);
    open.check_open("declare_tag");
    open.tags().declare(text(tag, "tag is NULL"), on_sleep, on_wake);
  });
}

cumempool_status cumempool_set_backup(cumempool_allocator* allocator, const char* tag,
                                      const cumempool_backup_policy* policy) {
  return guarded("set_backup", [&] {
    require(policy != nullptr, "policy is NULL");
    require_size(*policy, "backup policy");
    pool::Allocator& open = core(allocator);
    open.check_open("set_backup");
    pool::Tag& known = open.tags().find(text(tag, "tag is NULL"));
    if (policy->tier == CUMEMPOOL_BACKUP_UNSET) return;
    change_tag(known, [&] {
      const pool::BackupChoice choice = pool::backup_choice(*policy);
      pool::check_peer(open, choice);
      open.tags().set_backup(known, choice);
    });
  });
}

cumempool_status cumempool_set_memory(cumempool_allocator* allocator, const char* tag,
                                      const cumempool_memory_policy* policy) {
  return guarded("set_memory", [&] {
    require(policy != nullptr, "policy is NULL");
    require_size(*policy, "memory policy");
    require(policy->peers != nullptr || policy->peer_count == 0, "peers is NULL");
    pool::Allocator& open = core(allocator);
    open.check_open("set_memory");
    pool::Tag& known = open.tags().find(text(tag, "tag is NULL"));
    cumempool_memory_policy full = *policy;
    if (full.backing == CUMEMPOOL_BACKING_UNSET) full.backing = CUMEMPOOL_BACKING_VMM;
    change_tag(known, [&] { open.set_memory(known, pool::memory_choice(full)); });
  });
}

cumempool_status cumempool_pin(cumempool_allocator* allocator, const char* tag, const char* holder,
                               uint64_t* pin) {
  return guarded("pin", [&] {
    require(pin != nullptr, "pin is NULL");
    pool::Allocator& open = core(allocator);
    open.check_open("pin");
    pool::Tag& known = open.tags().find(text(tag, "tag is NULL"));
    const std::string name = text(holder, "holder is NULL");
    const pool::TransitionLock::Turn turn = open.transition_lock().enter("pin");
    *pin = open.tags().pin(known, name);
  });
}

cumempool_status cumempool_unpin(cumempool_allocator* allocator, uint64_t pin) {
  return guarded("unpin",
                 [&] { require(core(allocator).tags().unpin(pin), "there is no such pin"); });
}

cumempool_status cumempool_malloc(cumempool_allocator* allocator, const char* tag, int device,
                                  size_t bytes, cumempool_address* address) {
  return guarded("malloc", [&] {
    require(address != nullptr, "address is NULL");
    pool::Allocator& from = core(allocator);
    *address = from.malloc(from.tags().find(text(tag, "tag is NULL")), device, bytes);
  });
}

cumempool_status cumempool_malloc_preserved(cumempool_allocator* allocator, const char* tag,
                                            int device, size_t bytes, cumempool_address* address) {
  return guarded("malloc", [&] {
    require(address != nullptr, "address is NULL");
    pool::Allocator& from = core(allocator);
    *address = from.malloc(from.tags().find(text(tag, "tag is NULL")), device, bytes, true);
  });
}

cumempool_status cumempool_preserve(cumempool_allocator* allocator, cumempool_address address) {
  return guarded("preserve", [&] { core(allocator).preserve(address); });
}

cumempool_status cumempool_set_memory_margin(cumempool_allocator* allocator, uint64_t bytes) {
  return guarded("set_memory_margin", [&] { core(allocator).set_memory_margin(bytes); });
}

cumempool_status cumempool_reset_peaks(cumempool_allocator* allocator) {
  return guarded("reset_peaks", [&] { core(allocator).reset_peaks(); });
}

cumempool_status cumempool_progress(cumempool_allocator* allocator, uint64_t* done_bytes,
                                    uint64_t* total_bytes) {
  return guarded("progress", [&] {
    const auto& counters = core(allocator).counters();
    if (done_bytes == nullptr || total_bytes == nullptr) {
      throw Error(CUMEMPOOL_INVALID_ARGUMENT, "an output is NULL");
    }
    *total_bytes = counters.bytes_to_copy;
    *done_bytes = counters.copied_bytes;
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

cumempool_status cumempool_set_free_wait(cumempool_allocator* allocator, uint64_t nanoseconds) {
  return guarded("set_free_wait", [&] {
    using Duration = pool::Reaper::Duration;
    const auto forever = static_cast<std::uint64_t>(pool::Reaper::kForever.count());
    core(allocator).set_free_wait(
        Duration(static_cast<Duration::rep>(std::min(nanoseconds, forever))));
  });
}

// ---- slots -------------------------------------------------------------------------------------

uint32_t cumempool_slot_count(void) { return torch::kSlotCount; }

namespace {

cumempool_status bind(cumempool_allocator* allocator, const char* tag, bool lasting,
                      uint32_t* slot) {
  return guarded("bind_slot", [&] {
    require(slot != nullptr, "slot is NULL");
    pool::Tag& known = core(allocator).tags().find(text(tag, "tag is NULL"));
    *slot = torch::SlotTable::instance().bind(allocator->core, known, lasting);
  });
}

}  // namespace

cumempool_status cumempool_bind_slot(cumempool_allocator* allocator, const char* tag,
                                     uint32_t* slot) {
  return bind(allocator, tag, false, slot);
}

cumempool_status cumempool_bind_lasting_slot(cumempool_allocator* allocator, const char* tag,
                                             uint32_t* slot) {
  return bind(allocator, tag, true, slot);
}

cumempool_status cumempool_preserve_slot(uint32_t slot) {
  return guarded("preserve_slot", [&] { torch::SlotTable::instance().preserve(slot); });
}

cumempool_status cumempool_slot_mallocs(uint32_t slot, uint64_t* count) {
  return guarded("slot_mallocs", [&] {
    require(count != nullptr, "count is NULL");
    *count = torch::SlotTable::instance().mallocs(slot);
  });
}

cumempool_status cumempool_unbind_slot(uint32_t slot) {
  return guarded("unbind_slot", [&] { torch::SlotTable::instance().unbind(slot); });
}

// ---- transitions -------------------------------------------------------------------------------

cumempool_status cumempool_moment(cumempool_allocator* allocator, uint64_t* moment) {
  return guarded("moment", [&] {
    require(moment != nullptr, "moment is NULL");
    *moment = core(allocator).records().moment();
  });
}

cumempool_status cumempool_sleep(cumempool_allocator* allocator,
                                 const cumempool_sleep_request* request,
                                 cumempool_report** report) {
  return guarded("sleep", [&] {
    require(request != nullptr && report != nullptr, "an argument is NULL");
    pool::Allocator& sleeping = core(allocator);
    sleeping.check_open("sleep");
    auto made = std::make_unique<cumempool_report>();
    *report = fill(std::move(made), pool::sleep(sleeping, convert(sleeping, *request)));
  });
}

cumempool_status cumempool_prepare(cumempool_allocator* allocator,
                                   const cumempool_sleep_request* request,
                                   const char* const* yielding, size_t yielding_count,
                                   uint64_t* pinned_bytes) {
  return guarded("prepare", [&] {
    require(request != nullptr && pinned_bytes != nullptr, "an argument is NULL");
    pool::Allocator& preparing = core(allocator);
    preparing.check_open("prepare");
    std::set<const pool::Tag*> yield;
    for (const char* tag : items(yielding, yielding_count, "yielding is NULL")) {
      yield.insert(&preparing.tags().find(text(tag, "a tag is NULL")));
    }
    *pinned_bytes = pool::prepare(preparing, convert(preparing, *request), yield);
  });
}

cumempool_status cumempool_wake(cumempool_allocator* allocator, const char* const* tags,
                                size_t tag_count, const cumempool_device_stream* streams,
                                size_t stream_count, cumempool_report** report) {
  return guarded("wake", [&] {
    require(report != nullptr, "report is NULL");
    pool::Allocator& waking = core(allocator);
    waking.check_open("wake");
    pool::WakeRequest request = convert(waking, tags, tag_count);
    request.streams = streams_of(streams, stream_count);
    auto made = std::make_unique<cumempool_report>();
    *report = fill(std::move(made), pool::wake(waking, request));
  });
}

cumempool_status cumempool_swap(cumempool_allocator* allocator,
                                const cumempool_swap_request* request, cumempool_report** report) {
  return guarded("swap", [&] {
    require(request != nullptr && report != nullptr && request->sleep != nullptr,
            "an argument is NULL");
    require_size(*request, "swap request");
    pool::Allocator& swapping = core(allocator);
    swapping.check_open("swap");
    const pool::SleepRequest sleep = convert(swapping, *request->sleep);
    const pool::WakeRequest wake = convert(swapping, request->wake_tags, request->wake_tag_count);
    for (const pool::Tag* tag : wake.tags) {
      require(sleep.actions.count(tag) == 0, "a tag is in both lists: to sleep and to wake");
    }
    auto made = std::make_unique<cumempool_report>();
    *report = fill(std::move(made), pool::swap(swapping, sleep, wake));
  });
}

cumempool_status cumempool_wake_begin(cumempool_allocator* allocator, const char* const* tags,
                                      size_t tag_count, const cumempool_address* first,
                                      size_t first_count, const cumempool_device_stream* streams,
                                      size_t stream_count, cumempool_waking** waking) {
  return guarded("wake", [&] {
    require(waking != nullptr, "waking is NULL");
    pool::Allocator& sleeping = core(allocator);
    sleeping.check_open("wake");
    pool::WakeRequest request = convert(sleeping, tags, tag_count);
    request.streams = streams_of(streams, stream_count);
    for (const cumempool_address address : items(first, first_count, "first is NULL")) {
      const pool::RecordPointer record = pool::Registry::instance().find(address);
      if (record == nullptr || record->owner != allocator->core) {
        throw Error(CUMEMPOOL_NOT_OWNED,
                    "an address in `first` lies in no allocation of this allocator");
      }
      request.first.insert(record.get());
    }
    auto made = std::make_unique<cumempool_waking>();
    made->report = std::make_unique<cumempool_report>();
    made->waking = std::make_unique<pool::AsyncWake>(allocator->core, std::move(request));
    *waking = made.release();
  });
}

cumempool_status cumempool_waking_wait(cumempool_waking* waking, cumempool_address address,
                                       cumempool_device_stream stream) {
  return guarded("wait", [&] {
    require(waking != nullptr, "waking is NULL");
    require_size(stream, "stream");
    waking->waking->wait(address, stream);
  });
}

int cumempool_waking_done(const cumempool_waking* waking) {
  return waking != nullptr && waking->waking->done() ? 1 : 0;
}

cumempool_status cumempool_waking_finish(cumempool_waking* waking, cumempool_report** report) {
  return guarded("wake", [&] {
    require(waking != nullptr && report != nullptr, "an argument is NULL");
    std::optional<pool::Report> ended = waking->waking->finish();
    *report = ended ? fill(std::move(waking->report), std::move(*ended)) : nullptr;
  });
}

void cumempool_waking_destroy(cumempool_waking* waking) {
  // A forked child lacks the thread that runs its parent's wake.
  if (waking == nullptr || cumempool::driver::in_forked_child()) return;
  delete waking;
}

cumempool_status cumempool_view_backup(cumempool_allocator* allocator, cumempool_address address,
                                       uint64_t bytes, int writable, cumempool_backup_view* view) {
  return guarded("read_backup", [&] {
    require(view != nullptr, "view is NULL");
    require_size(*view, "backup view");
    core(allocator).check_open("read_backup");
    auto made = std::make_unique<pool::BackupView>(allocator->core, address, bytes, writable != 0);
    view->data = made->data();
    view->bytes = bytes;
    view->lease = made.release();
  });
}

void cumempool_end_backup_view(void* lease) {
  if (lease == nullptr || cumempool::driver::in_forked_child()) return;
  delete static_cast<pool::BackupView*>(lease);
}

double cumempool_report_seconds(const cumempool_report* report) {
  return report == nullptr ? 0 : report->report.seconds;
}

const cumempool_report_row* cumempool_report_rows(const cumempool_report* report, size_t* count) {
  return array(report == nullptr ? nullptr : &report->report.rows, count);
}

const char* const* cumempool_report_problems(const cumempool_report* report, size_t* count) {
  return array(report == nullptr ? nullptr : &report->problems, count);
}

void cumempool_report_destroy(cumempool_report* report) { delete report; }

cumempool_status cumempool_release_host_memory(cumempool_allocator* allocator,
                                               uint64_t* released_bytes) {
  return guarded("release_host_memory", [&] {
    require(released_bytes != nullptr, "released_bytes is NULL");
    *released_bytes = core(allocator).release_host_memory();
  });
}

// ---- sharing -----------------------------------------------------------------------------------

struct cumempool_shared {
  std::unique_ptr<cumempool::vmm::SharedMapping> mapping;
};

cumempool_status cumempool_export(cumempool_allocator* allocator, cumempool_address address,
                                  uint32_t handle_type, void* exported,
                                  cumempool_allocation_info* info) {
  return guarded("export", [&] {
    require(exported != nullptr && info != nullptr, "an argument is NULL");
    require_size(*info, "allocation info");
    core(allocator).check_open("export");
    *info = pool::export_memory(*allocator->core, address, handle_type, exported);
  });
}

cumempool_status cumempool_shared_open(const cumempool_driver* driver, int device,
                                       uint32_t handle_type, const void* exported, uint64_t bytes,
                                       cumempool_access access, cumempool_shared** shared) {
  return guarded("open_shared", [&] {
    require(driver != nullptr && exported != nullptr && shared != nullptr, "an argument is NULL");
    require(access == CUMEMPOOL_ACCESS_READ || access == CUMEMPOOL_ACCESS_READ_WRITE,
            "access is neither READ nor READ_WRITE");
    require(bytes != 0, "bytes is 0");
    auto made = std::make_unique<cumempool_shared>();
    try {
      made->mapping = std::make_unique<cumempool::vmm::SharedMapping>(
          Driver(*driver), device, handle_type, exported, bytes, access);
    } catch (Error& error) {
      if (error.result == CUMEMPOOL_RESULT_NOT_SUPPORTED) error.status = CUMEMPOOL_UNSUPPORTED;
      throw;
    }
    *shared = made.release();
  });
}

cumempool_address cumempool_shared_address(const cumempool_shared* shared) {
  return shared == nullptr ? 0 : shared->mapping->address();
}

cumempool_status cumempool_shared_close(cumempool_shared* shared) {
  return guarded("close_shared", [&] {
    require(shared != nullptr, "shared is NULL");
    shared->mapping->close();
  });
}

void cumempool_shared_destroy(cumempool_shared* shared) {
  // A forked child has the parent's addresses but none of its mappings.
  if (shared == nullptr || cumempool::driver::in_forked_child()) return;
  delete shared;
}

// ---- what there is -----------------------------------------------------------------------------

cumempool_status cumempool_find(cumempool_allocator* allocator, cumempool_address address,
                                cumempool_allocation_info* info) {
  return guarded("find", [&] {
    require(info != nullptr, "info is NULL");
    require_size(*info, "allocation info");
    *info = pool::find_allocation(allocator == nullptr ? nullptr : allocator->core.get(), address);
  });
}

cumempool_status cumempool_take_snapshot(cumempool_allocator* allocator, int allocations,
                                         cumempool_snapshot** snapshot) {
  return guarded("snapshot", [&] {
    require(snapshot != nullptr, "snapshot is NULL");
    auto made = std::make_unique<cumempool_snapshot>();
    made->snapshot = pool::take_snapshot(core(allocator), allocations != 0);
    *snapshot = made.release();
  });
}

const cumempool_totals* cumempool_snapshot_totals(const cumempool_snapshot* snapshot) {
  return snapshot == nullptr ? nullptr : &snapshot->snapshot.totals;
}

const cumempool_tag_stats* cumempool_snapshot_tags(const cumempool_snapshot* snapshot,
                                                   size_t* count) {
  return array(snapshot == nullptr ? nullptr : &snapshot->snapshot.tags, count);
}

const cumempool_allocation_info* cumempool_snapshot_allocations(const cumempool_snapshot* snapshot,
                                                                size_t* count) {
  return array(snapshot == nullptr ? nullptr : &snapshot->snapshot.allocations, count);
}

const char* cumempool_snapshot_last_malloc_failure(const cumempool_snapshot* snapshot) {
  return snapshot == nullptr ? "" : snapshot->snapshot.last_malloc_failure.c_str();
}

void cumempool_snapshot_destroy(cumempool_snapshot* snapshot) { delete snapshot; }
