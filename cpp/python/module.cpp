// The extension module cumempool._core: the C interface of cumempool.h as Python sees it. Failures
// are raised as the classes of cumempool.errors; the GIL is released around calls that may wait.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cumempool/cumempool.h"
#include "dlpack.hpp"

namespace py = pybind11;
using cumempool::python::DlManagedTensor;

namespace {

py::dict error_fields(const cumempool_error& error) {
  py::list secondary;
  for (std::size_t i = 0; i < error.secondary_count; ++i) secondary.append(error.secondary[i]);
  py::dict fields;
  fields["status"] = static_cast<int>(error.status);
  fields["message"] = error.message;
  fields["operation"] = error.operation;
  fields["tag"] = error.tag;
  fields["device"] = error.device;
  fields["bytes"] = error.bytes;
  fields["driver_call"] = error.driver_call;
  fields["result"] = error.result;
  fields["result_name"] = error.result_name;
  fields["free_bytes"] = error.free_bytes;
  fields["total_bytes"] = error.total_bytes;
  fields["advice"] = error.advice;
  fields["secondary"] = secondary;
  return fields;
}

[[noreturn]] void raise_fields(const py::dict& fields) {
  const py::object error =
      py::module_::import("cumempool.errors").attr("error_from_fields")(fields);
  PyErr_SetObject(py::type::of(error).ptr(), error.ptr());
  throw py::error_already_set();
}

void check(cumempool_status status) {
  if (status != CUMEMPOOL_OK) raise_fields(error_fields(*cumempool_last_error()));
}

// Runs a call of the C interface without the GIL, then raises what it failed with. The GIL is not
// taken back by a destructor: where the interpreter has ended meanwhile, Python ends this thread
// there by unwinding it, and unwinding out of a destructor would abort the process.
template <typename Call>
void call(Call&& body) {
  PyThreadState* const state = PyEval_SaveThread();
  const cumempool_status status = std::forward<Call>(body)();
  PyEval_RestoreThread(state);
  check(status);
}

// A C string ends at its first zero byte, so such a tag would silently become another one.
const char* tag_text(const std::string& tag) {
  if (tag.find('\0') != std::string::npos) {
    cumempool_error error{};
    error.status = CUMEMPOOL_INVALID_ARGUMENT;
    error.message = "a tag cannot contain a zero byte";
    error.operation = error.tag = error.driver_call = error.result_name = "";
    error.advice = "use 1 to 255 bytes of UTF-8 without a zero byte";
    error.device = -1;
    raise_fields(error_fields(error));
  }
  return tag.c_str();
}

// A driver and how its memory looks to DLPack. Host drivers go with the last user of their memory.
struct Driver {
  const cumempool_driver* table = nullptr;
  cumempool::python::DlDeviceType memory = cumempool::python::kDlCuda;
  bool owned = false;

  Driver() = default;
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;
  ~Driver() {
    if (owned) cumempool_host_driver_destroy(table);
  }

  int device_count() const {
    int count = 0;
    const cumempool_result result = table->device_count(table->self, &count);
    return result == CUMEMPOOL_RESULT_SUCCESS ? count : 0;
  }
};
using DriverPointer = std::shared_ptr<Driver>;

DriverPointer open_cuda() {
  auto driver = std::make_shared<Driver>();
  call([&] { return cumempool_cuda_driver(&driver->table); });
  return driver;
}

DriverPointer open_host(int devices, std::uint64_t bytes_per_device, std::uint64_t granularity,
                        bool rdma) {
  cumempool_host_driver_options options{};
  options.size = sizeof options;
  options.device_count = devices;
  options.bytes_per_device = bytes_per_device;
  options.granularity = granularity;
  options.handle_types = CUMEMPOOL_HANDLE_POSIX_FD;
  options.rdma = rdma ? 1 : 0;
  auto driver = std::make_shared<Driver>();
  call([&] { return cumempool_host_driver_create(&options, &driver->table); });
  driver->memory = cumempool::python::kDlCpu;
  driver->owned = true;
  return driver;
}

py::dict probe_device(const Driver& driver, int device) {
  cumempool_device_probe probe{};
  probe.size = sizeof probe;
  call([&] { return cumempool_probe_device(driver.table, device, &probe); });
  py::dict fields;
  fields["name"] = std::string(probe.name);
  fields["compute_capability"] = probe.compute_capability;
  fields["virtual_memory"] = probe.virtual_memory != 0;
  fields["usable"] = probe.usable != 0;
  fields["handle_types"] = probe.handle_types;
  fields["handle_types_claimed"] = probe.handle_types_claimed;
  fields["rdma"] = probe.rdma != 0;
  fields["rdma_claimed"] = probe.rdma_claimed != 0;
  fields["granularity"] = probe.granularity;
  fields["free_bytes"] = probe.free_bytes;
  fields["total_bytes"] = probe.total_bytes;
  fields["reason"] = std::string(probe.reason);
  return fields;
}

bool context_active(const Driver& driver, int device) {
  int active = 0;
  const auto* table = driver.table;
  return table->context_active(table->self, device, &active) == CUMEMPOOL_RESULT_SUCCESS &&
         active != 0;
}

int driver_version(const Driver& driver) {
  int version = 0;
  const auto* table = driver.table;
  return table->driver_version(table->self, &version) == CUMEMPOOL_RESULT_SUCCESS ? version : 0;
}

py::dict report_fields(cumempool_report* raw) {
  const std::unique_ptr<cumempool_report, decltype(&cumempool_report_destroy)> report(
      raw, &cumempool_report_destroy);
  std::size_t count = 0;
  py::list rows;
  const cumempool_report_row* row = cumempool_report_rows(report.get(), &count);
  for (std::size_t i = 0; i < count; ++i, ++row) {
    py::dict fields;
    fields["tag"] = row->tag;
    fields["device"] = row->device;
    fields["allocations"] = row->allocations;
    fields["freed_bytes"] = row->freed_bytes;
    fields["mapped_bytes"] = row->mapped_bytes;
    fields["backed_up_bytes"] = row->backed_up_bytes;
    fields["restored_bytes"] = row->restored_bytes;
    fields["discarded_bytes"] = row->discarded_bytes;
    fields["zeroed_bytes"] = row->zeroed_bytes;
    fields["copy_seconds"] = row->copy_seconds;
    rows.append(fields);
  }
  py::list problems;
  const char* const* problem = cumempool_report_problems(report.get(), &count);
  for (std::size_t i = 0; i < count; ++i) problems.append(problem[i]);
  py::dict fields;
  fields["seconds"] = cumempool_report_seconds(report.get());
  fields["rows"] = rows;
  fields["problems"] = problems;
  return fields;
}

const char* state_name(cumempool_state state) {
  switch (state) {
    case CUMEMPOOL_AWAKE:
      return "awake";
    case CUMEMPOOL_ASLEEP_BACKED_UP:
      return "backed_up";
    case CUMEMPOOL_ASLEEP_DISCARDED:
      return "discarded";
  }
  return "unknown";
}

py::dict allocation_fields(const cumempool_allocation_info& info) {
  py::dict fields;
  fields["address"] = info.address;
  fields["bytes"] = info.bytes;
  fields["requested_bytes"] = info.requested_bytes;
  fields["tag"] = info.tag;
  fields["device"] = info.device;
  fields["state"] = state_name(info.state);
  fields["generation"] = info.generation;
  fields["backup_bytes"] = info.backup_bytes;
  fields["sequence"] = info.sequence;
  return fields;
}

py::dict tag_fields(const cumempool_tag_stats& stats) {
  py::dict fields;
  fields["tag"] = stats.tag;
  fields["device"] = stats.device;
  fields["on_sleep"] = static_cast<int>(stats.on_sleep);
  fields["on_wake"] = static_cast<int>(stats.on_wake);
  fields["handle_types"] = stats.handle_types;
  fields["rdma"] = stats.rdma != 0;
  fields["awake_allocations"] = stats.awake_allocations;
  fields["awake_bytes"] = stats.awake_bytes;
  fields["backed_up_allocations"] = stats.backed_up_allocations;
  fields["backed_up_bytes"] = stats.backed_up_bytes;
  fields["discarded_allocations"] = stats.discarded_allocations;
  fields["discarded_bytes"] = stats.discarded_bytes;
  fields["backup_bytes"] = stats.backup_bytes;
  fields["unreleased_bytes"] = stats.unreleased_bytes;
  return fields;
}

py::dict totals_fields(const cumempool_totals& totals) {
  py::dict fields;
  fields["reserved_address_bytes"] = totals.reserved_address_bytes;
  fields["physical_bytes"] = totals.physical_bytes;
  fields["mapped_bytes"] = totals.mapped_bytes;
  fields["pending_free_bytes"] = totals.pending_free_bytes;
  fields["host_bytes"] = totals.host_bytes;
  fields["host_used_bytes"] = totals.host_used_bytes;
  fields["malloc_calls"] = totals.malloc_calls;
  fields["malloc_failures"] = totals.malloc_failures;
  fields["free_calls"] = totals.free_calls;
  fields["sleeps"] = totals.sleeps;
  fields["wakes"] = totals.wakes;
  fields["failed_transitions"] = totals.failed_transitions;
  return fields;
}

// What keeps the memory behind a capsule, and the driver under it, alive.
struct Lease {
  DlManagedTensor tensor{};
  std::int64_t shape = 0;
  std::int64_t stride = 1;
  cumempool_address address = 0;
  DriverPointer driver;
};

void end_lease(DlManagedTensor* tensor) {
  const std::unique_ptr<Lease> lease(static_cast<Lease*>(tensor->manager_ctx));
  cumempool_free(lease->address);
}

// A capsule that torch did not consume still owns its memory.
void drop_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
  auto* tensor = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  tensor->deleter(tensor);
}

using Pair = std::pair<std::uint64_t, std::uint64_t>;

// A cumempool_sleep_request and what it points to.
class SleepRequest {
 public:
  SleepRequest(const std::vector<std::pair<std::string, int>>& tags, bool drop_backups,
               const std::vector<Pair>& dead, std::vector<cumempool_device_stream> streams)
      : streams_(std::move(streams)) {
    actions_.reserve(tags.size());
    for (const auto& [tag, action] : tags) {
      actions_.push_back({tag_text(tag), static_cast<cumempool_on_sleep>(action)});
    }
    extents_.reserve(dead.size());
    for (const auto& [address, bytes] : dead) extents_.push_back({address, bytes});
    request_.size = sizeof request_;
    request_.drop_backups = drop_backups ? 1 : 0;
    request_.tags = actions_.data();
    request_.tag_count = actions_.size();
    request_.dead = extents_.data();
    request_.dead_count = extents_.size();
    request_.streams = streams_.data();
    request_.stream_count = streams_.size();
  }
  ~SleepRequest() = default;
  SleepRequest(const SleepRequest&) = delete;
  SleepRequest& operator=(const SleepRequest&) = delete;

  const cumempool_sleep_request* get() const noexcept { return &request_; }

 private:
  std::vector<cumempool_tag_action> actions_;
  std::vector<cumempool_extent> extents_;
  std::vector<cumempool_device_stream> streams_;
  cumempool_sleep_request request_{};
};

class Allocator {
 public:
  using Stream = std::pair<int, std::uint64_t>;

  Allocator(DriverPointer driver, std::uint64_t host_backup_limit) : driver_(std::move(driver)) {
    cumempool_allocator_options options{};
    options.size = sizeof options;
    options.host_backup_limit = host_backup_limit;
    call([&] { return cumempool_allocator_create(driver_->table, &options, &allocator_); });
  }
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;
  // Tensors may outlive this object, and nobody has asked for their contents to be lost: while
  // memory is in use the allocator and its driver stay, for the rest of the process.
  ~Allocator() {
    if (cumempool_allocator_close(allocator_, 0) == CUMEMPOOL_IN_USE) {
      driver_->owned = false;  // a host driver is not destroyed, then
      return;
    }
    cumempool_allocator_destroy(allocator_);
  }

  void close(bool force) {
    call([&] { return cumempool_allocator_close(allocator_, force ? 1 : 0); });
  }

  void declare_tag(const std::string& tag, int on_sleep, int on_wake) {
    const char* name = tag_text(tag);
    call([&] {
      return cumempool_declare_tag(allocator_, name, static_cast<cumempool_on_sleep>(on_sleep),
                                   static_cast<cumempool_on_wake>(on_wake));
    });
  }

  std::uint64_t malloc(const std::string& tag, int device, std::size_t bytes) {
    const char* name = tag_text(tag);
    cumempool_address address = 0;
    call([&] { return cumempool_malloc(allocator_, name, device, bytes, &address); });
    return address;
  }

  py::capsule malloc_capsule(const std::string& tag, int device, std::size_t bytes) {
    auto lease = std::make_unique<Lease>();
    lease->address = malloc(tag, device, bytes);
    lease->driver = driver_;
    lease->shape = static_cast<std::int64_t>(bytes);
    const bool on_cpu = driver_->memory == cumempool::python::kDlCpu;
    // Integer to pointer: the address is the driver's.
    void* data = reinterpret_cast<void*>(  // NOLINT(performance-no-int-to-ptr)
        static_cast<std::uintptr_t>(lease->address));
    lease->tensor.dl_tensor = {data,
                               {driver_->memory, on_cpu ? 0 : device},
                               1,
                               {cumempool::python::kDlUnsigned, 8, 1},
                               &lease->shape,
                               &lease->stride,
                               0};
    lease->tensor.manager_ctx = lease.get();
    lease->tensor.deleter = &end_lease;
    PyObject* capsule = PyCapsule_New(&lease->tensor, "dltensor", &drop_capsule);
    if (capsule == nullptr) {
      cumempool_free(lease->address);
      throw py::error_already_set();
    }
    static_cast<void>(lease.release());
    return py::reinterpret_steal<py::capsule>(capsule);
  }

  std::uint32_t bind_slot(const std::string& tag) {
    const char* name = tag_text(tag);
    std::uint32_t slot = 0;
    call([&] { return cumempool_bind_slot(allocator_, name, &slot); });
    return slot;
  }

  py::dict sleep(const std::vector<std::pair<std::string, int>>& tags, bool drop_backups,
                 const std::vector<Pair>& dead, const std::vector<Stream>& streams) {
    const SleepRequest request(tags, drop_backups, dead, device_streams(streams));
    cumempool_report* report = nullptr;
    call([&] { return cumempool_sleep(allocator_, request.get(), &report); });
    return report_fields(report);
  }

  std::uint64_t prepare(const std::vector<std::pair<std::string, int>>& tags,
                        const std::vector<Pair>& dead) {
    const SleepRequest request(tags, false, dead, {});
    std::uint64_t pinned = 0;
    call([&] { return cumempool_prepare(allocator_, request.get(), &pinned); });
    return pinned;
  }

  py::dict wake(const std::optional<std::vector<std::string>>& tags,
                const std::vector<Stream>& streams) {
    std::vector<const char*> names;
    if (tags) {
      for (const std::string& tag : *tags) names.push_back(tag_text(tag));
      names.push_back(nullptr);  // so that an empty list is not taken for "all"
    }
    const auto current = device_streams(streams);
    cumempool_report* report = nullptr;
    call([&] {
      return cumempool_wake(allocator_, tags ? names.data() : nullptr, tags ? tags->size() : 0,
                            current.data(), current.size(), &report);
    });
    return report_fields(report);
  }

  std::uint64_t release_host_memory() {
    std::uint64_t bytes = 0;
    call([&] { return cumempool_release_host_memory(allocator_, &bytes); });
    return bytes;
  }

  py::dict snapshot(bool allocations) {
    cumempool_snapshot* raw = nullptr;
    call([&] { return cumempool_take_snapshot(allocator_, allocations ? 1 : 0, &raw); });
    const std::unique_ptr<cumempool_snapshot, decltype(&cumempool_snapshot_destroy)> snapshot(
        raw, &cumempool_snapshot_destroy);
    std::size_t count = 0;
    py::list tags;
    const cumempool_tag_stats* stats = cumempool_snapshot_tags(raw, &count);
    for (std::size_t i = 0; i < count; ++i) tags.append(tag_fields(stats[i]));
    py::list infos;
    const cumempool_allocation_info* info = cumempool_snapshot_allocations(raw, &count);
    for (std::size_t i = 0; i < count; ++i) infos.append(allocation_fields(info[i]));
    py::dict fields;
    fields["totals"] = totals_fields(*cumempool_snapshot_totals(raw));
    fields["tags"] = tags;
    fields["allocations"] = infos;
    fields["last_malloc_failure"] = cumempool_snapshot_last_malloc_failure(raw);
    return fields;
  }

  py::dict find(std::uint64_t address) {
    cumempool_allocation_info info{};
    call([&] { return cumempool_find(allocator_, address, &info); });
    return allocation_fields(info);
  }

 private:
  static std::vector<cumempool_device_stream> device_streams(const std::vector<Stream>& streams) {
    std::vector<cumempool_device_stream> converted;
    converted.reserve(streams.size());
    for (const auto& [device, stream] : streams) converted.push_back({device, 0, stream});
    return converted;
  }

  DriverPointer driver_;
  cumempool_allocator* allocator_ = nullptr;
};

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C interface of libcumempool.";
  module.def("version", &cumempool_version);
  module.def("slot_count", &cumempool_slot_count);
  module.def("open_cuda", &open_cuda);
  module.def("open_host", &open_host, py::arg("devices"), py::arg("bytes_per_device"),
             py::arg("granularity"), py::arg("rdma"));
  module.def(
      "free", [](std::uint64_t address) { call([&] { return cumempool_free(address); }); },
      py::arg("address"));
  module.def(
      "unbind_slot", [](std::uint32_t slot) { call([&] { return cumempool_unbind_slot(slot); }); },
      py::arg("slot"));

  py::class_<Driver, DriverPointer>(module, "Driver")
      .def_property_readonly("name", [](const Driver& driver) { return driver.table->name; })
      .def_property_readonly("version", &driver_version)
      .def_property_readonly("device_count", &Driver::device_count)
      .def("context_active", &context_active, py::arg("device"))
      .def("probe", &probe_device, py::arg("device"));

  py::class_<Allocator>(module, "Allocator")
      .def(py::init<DriverPointer, std::uint64_t>(), py::arg("driver"),
           py::arg("host_backup_limit"))
      .def("close", &Allocator::close, py::arg("force"))
      .def("declare_tag", &Allocator::declare_tag, py::arg("tag"), py::arg("on_sleep"),
           py::arg("on_wake"))
      .def("malloc", &Allocator::malloc, py::arg("tag"), py::arg("device"), py::arg("bytes"))
      .def("malloc_capsule", &Allocator::malloc_capsule, py::arg("tag"), py::arg("device"),
           py::arg("bytes"))
      .def("bind_slot", &Allocator::bind_slot, py::arg("tag"))
      .def("sleep", &Allocator::sleep, py::arg("tags"), py::arg("drop_backups"), py::arg("dead"),
           py::arg("streams"))
      .def("prepare", &Allocator::prepare, py::arg("tags"), py::arg("dead"))
      .def("wake", &Allocator::wake, py::arg("tags"), py::arg("streams"))
      .def("release_host_memory", &Allocator::release_host_memory)
      .def("snapshot", &Allocator::snapshot, py::arg("allocations"))
      .def("find", &Allocator::find, py::arg("address"));
}
