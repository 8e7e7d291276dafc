// The extension module cumempool._core: the C interface of cumempool.h for Python. It raises
// failures as the classes of cumempool.errors, and releases the GIL around calls that may wait, in
// destructors as well.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cumempool/cumempool.h"
#include "drivers.hpp"
#include "errors.hpp"
#include "memory.hpp"
#include "records.hpp"
#include "requests.hpp"

namespace py = pybind11;

namespace cumempool::python {
namespace {

class AllocatorObject;

// Makes a class throw if there is no memory for an object: pybind11 does not check objects that
// functions make.
void refuse_without_memory(PyHeapTypeObject* type) {
  type->ht_type.tp_alloc = [](PyTypeObject* of, Py_ssize_t items) {
    PyObject* const made = PyType_GenericAlloc(of, items);
    if (made != nullptr) return made;
    PyErr_Clear();
    throw std::bad_alloc();
  };
}

// Runs a transition and returns its report. Makes the report before, so that nothing can fail after
// the transition has succeeded.
template <typename Transition>
py::object reported(const Transition& transition) {
  const auto report = std::make_shared<ReportObject>();
  py::object told = py::cast(report);
  cumempool_report* raw = nullptr;
  call([&] { return transition(&raw); });
  report->set(raw);
  return told;
}

// A wake in a thread of its own. Keeps the driver alive while the wake works on its memory, and the
// allocator, which closes itself when it goes. (Not by pybind11's keep_alive, which crashes in 3.1
// if an argument has the wrong type.)
class Waking {
 public:
  Waking(DriverPointer driver, std::shared_ptr<const AllocatorObject> allocator)
      : driver_(std::move(driver)), allocator_(std::move(allocator)) {}
  Waking(const Waking&) = delete;
  Waking& operator=(const Waking&) = delete;
  // cumempool.WakeHandle has usually waited before, at a point where Python may end the thread.
  ~Waking() {
    const Unlocked unlocked;
    cumempool_waking_destroy(waking_);
  }

  void wait(std::uint64_t address, int device, std::uint64_t stream) {
    call([&] {
      return cumempool_waking_wait(waking_, address,
                                   {sizeof(cumempool_device_stream), device, stream});
    });
  }
  bool done() const { return cumempool_waking_done(waking_) != 0; }

  void begin(cumempool_waking* waking) noexcept { waking_ = waking; }

  // Returns the same report at every call.
  py::object finish() {
    call([this] {
      cumempool_report* report = nullptr;
      const cumempool_status status = cumempool_waking_finish(waking_, &report);
      if (status != CUMEMPOOL_OK) return status;
      // One of the threads that get here has the report, and is about to store it for the others.
      if (report != nullptr) {
        report_->set(report);
        ended_ = true;
      }
      while (!ended_) std::this_thread::yield();
      return status;
    });
    return py::cast(report_);
  }

 private:
  DriverPointer driver_;
  std::shared_ptr<const AllocatorObject> allocator_;
  cumempool_waking* waking_ = nullptr;
  const std::shared_ptr<ReportObject> report_ = std::make_shared<ReportObject>();
  std::atomic<bool> ended_{false};
};

class AllocatorObject : public std::enable_shared_from_this<AllocatorObject> {
 public:
  AllocatorObject(DriverPointer driver, std::uint64_t host_backup_limit, bool retain_backups,
                  const std::optional<BackupFields>& overflow)
      : driver_(std::move(driver)) {
    cumempool_allocator_options options{};
    options.size = sizeof options;
    options.retain_backups = retain_backups ? 1 : 0;
    options.host_backup_limit = host_backup_limit;
    options.overflow.size = sizeof options.overflow;
    if (overflow) options.overflow = backup_policy(*overflow);
    call([&] { return cumempool_allocator_create(driver_->table, &options, &allocator_); });
    // The thread that waits for work of a host driver runs it, so waiting always ends.
    if (driver_->memory != kDlCpu) return;
    call([&] { return cumempool_set_free_wait(allocator_, CUMEMPOOL_FREE_WAITS); });
  }
  AllocatorObject(const AllocatorObject&) = delete;
  AllocatorObject& operator=(const AllocatorObject&) = delete;
  // Tensors may outlive this object, and no caller has asked to lose their contents. If memory is
  // in use, the allocator and its driver stay for the rest of the process.
  ~AllocatorObject() {
    const Unlocked unlocked;
    if (cumempool_allocator_close(allocator_, 0) == CUMEMPOOL_IN_USE) {
      driver_->owned = false;  // so that a host driver is not destroyed
      return;
    }
    cumempool_allocator_destroy(allocator_);
  }

  void close(bool force) {
    call([&] { return cumempool_allocator_close(allocator_, force ? 1 : 0); });
  }

  // Call a function of the C interface that takes a number, and one that writes a number.
  template <auto Function>
  void tell(std::uint64_t number) {
    call([&] { return Function(allocator_, number); });
  }
  template <auto Function>
  std::uint64_t ask() {
    std::uint64_t number = 0;
    call([&] { return Function(allocator_, &number); });
    return number;
  }

  cumempool_allocator* get() const noexcept { return allocator_; }
  bool closed() const { return cumempool_allocator_closed(allocator_) != 0; }

  void declare_tag(const std::string& tag, int on_sleep, int on_wake) {
    const char* name = tag_text(tag);
    call([&] {
      return cumempool_declare_tag(allocator_, name, static_cast<cumempool_on_sleep>(on_sleep),
                                   static_cast<cumempool_on_wake>(on_wake));
    });
  }

  void set_backup(const std::string& tag, int tier, const std::string& directory, int peer_device) {
    const char* name = tag_text(tag);
    const BackupFields fields(tier, directory, peer_device);
    const cumempool_backup_policy policy = backup_policy(fields);
    call([&] { return cumempool_set_backup(allocator_, name, &policy); });
  }

  void set_memory(const std::string& tag, int backing, std::uint32_t all_peers,
                  const std::vector<std::int32_t>& peers, bool rdma) {
    const char* name = tag_text(tag);
    cumempool_memory_policy policy{};
    policy.size = sizeof policy;
    policy.backing = static_cast<cumempool_backing>(backing);
    policy.all_peers = all_peers;
    policy.peer_count = static_cast<std::uint32_t>(peers.size());
    policy.peers = peers.data();
    policy.without_rdma = rdma ? 0 : 1;
    call([&] { return cumempool_set_memory(allocator_, name, &policy); });
  }

  py::int_ pin(const std::string& tag, const std::string& holder) {
    const char* name = tag_text(tag);
    if (holder.empty() || holder.find('\0') != std::string::npos) {
      refuse("the holder of a pin needs a name without a zero byte", "name the holder");
    }
    std::uint64_t pin = 0;
    call([&] { return cumempool_pin(allocator_, name, holder.c_str(), &pin); });
    return handed_out(pin, [&] { cumempool_unpin(allocator_, pin); });
  }

  // The descriptor belongs to the caller.
  py::tuple export_fd(std::uint64_t address) {
    int number = -1;
    cumempool_allocation_info info{};
    info.size = sizeof info;
    call([&] {
      return cumempool_export(allocator_, address, CUMEMPOOL_HANDLE_POSIX_FD, &number, &info);
    });
    try {
      return py::make_tuple(number, fields_of(info));
    } catch (const std::exception&) {  // out of memory
      ::close(number);
      throw;
    }
  }

  py::tuple export_fabric(std::uint64_t address) {
    std::array<char, kFabricBytes> handle{};
    cumempool_allocation_info info{};
    info.size = sizeof info;
    call([&] {
      return cumempool_export(allocator_, address, CUMEMPOOL_HANDLE_FABRIC, handle.data(), &info);
    });
    return py::make_tuple(py::bytes(handle.data(), handle.size()), fields_of(info));
  }

  py::int_ malloc(const std::string& tag, int device, std::size_t bytes) {
    const char* name = tag_text(tag);
    cumempool_address address = 0;
    call([&] { return cumempool_malloc(allocator_, name, device, bytes, &address); });
    return handed_out(address, [&] { cumempool_free(address); });
  }

  py::capsule malloc_capsule(const std::string& tag, int device, std::size_t bytes,
                             bool preserved) {
    const char* name = tag_text(tag);
    const auto allocate = preserved ? &cumempool_malloc_preserved : &cumempool_malloc;
    auto lease = std::make_unique<Lease>();
    call([&] { return allocate(allocator_, name, device, bytes, &lease->address); });
    lease->driver = driver_;
    void* data = pointer_to(lease->address);
    return make_capsule(std::move(lease), data, driver_->memory, driver_->device_id(device), bytes);
  }

  py::capsule view_backup(std::uint64_t address, std::size_t bytes, bool writable) {
    auto lease = std::make_unique<Lease>();
    lease->driver = driver_;
    cumempool_backup_view view{};
    view.size = sizeof view;
    call(
        [&] { return cumempool_view_backup(allocator_, address, bytes, writable ? 1 : 0, &view); });
    lease->view = view.lease;
    return make_capsule(std::move(lease), view.data, kDlCpu, 0, bytes);
  }

  py::int_ bind_slot(const std::string& tag, bool lasting) {
    const char* name = tag_text(tag);
    const auto bind = lasting ? &cumempool_bind_lasting_slot : &cumempool_bind_slot;
    std::uint32_t slot = 0;
    call([&] { return bind(allocator_, name, &slot); });
    return handed_out(slot, [&] { cumempool_unbind_slot(slot); });
  }

  std::pair<std::uint64_t, std::uint64_t> progress() {
    std::uint64_t done = 0;
    std::uint64_t total = 0;
    call([&] { return cumempool_progress(allocator_, &done, &total); });
    return {done, total};
  }

  py::object sleep(const std::vector<std::pair<std::string, int>>& tags, bool drop_backups,
                   const std::vector<Pair>& dead, const std::vector<Stream>& streams,
                   std::uint64_t as_of) {
    const SleepArguments request(tags, drop_backups, dead, as_of, device_streams(streams));
    return reported(
        [&](auto** report) { return cumempool_sleep(allocator_, request.get(), report); });
  }

  std::uint64_t prepare(const std::vector<std::pair<std::string, int>>& tags,
                        const std::vector<Pair>& dead, const std::vector<std::string>& yielding,
                        std::uint64_t as_of) {
    const SleepArguments request(tags, false, dead, as_of, {});
    std::vector<const char*> names;
    names.reserve(yielding.size());
    for (const std::string& tag : yielding) names.push_back(tag_text(tag));
    std::uint64_t pinned = 0;
    call([&] {
      return cumempool_prepare(allocator_, request.get(), names.data(), names.size(), &pinned);
    });
    return pinned;
  }

  py::object wake(const std::optional<std::vector<std::string>>& tags,
                  const std::vector<Stream>& streams) {
    const WakeTags names(tags);
    const auto current = device_streams(streams);
    return reported([&](auto** report) {
      return cumempool_wake(allocator_, names.data(), names.count(), current.data(), current.size(),
                            report);
    });
  }

  py::object swap(const std::vector<std::pair<std::string, int>>& sleep,
                  const std::vector<Pair>& dead,
                  const std::optional<std::vector<std::string>>& wake,
                  const std::vector<Stream>& streams, std::uint64_t as_of) {
    const SleepArguments leaving(sleep, false, dead, as_of, device_streams(streams));
    const WakeTags coming(wake);
    cumempool_swap_request request{};
    request.size = sizeof request;
    request.sleep = leaving.get();
    request.wake_tags = coming.data();
    request.wake_tag_count = coming.count();
    return reported([&](auto** report) { return cumempool_swap(allocator_, &request, report); });
  }

  py::object wake_begin(const std::optional<std::vector<std::string>>& tags,
                        const std::vector<std::uint64_t>& first,
                        const std::vector<Stream>& streams) {
    const WakeTags names(tags);
    const auto current = device_streams(streams);
    auto made = std::make_unique<Waking>(driver_, shared_from_this());  // before, as in reported()
    Waking& handle = *made;
    py::object told = py::cast(std::move(made));
    cumempool_waking* waking = nullptr;
    call([&] {
      return cumempool_wake_begin(allocator_, names.data(), names.count(), first.data(),
                                  first.size(), current.data(), current.size(), &waking);
    });
    handle.begin(waking);
    return told;
  }

  py::dict snapshot(bool allocations) {
    cumempool_snapshot* raw = nullptr;
    call([&] { return cumempool_take_snapshot(allocator_, allocations ? 1 : 0, &raw); });
    const std::unique_ptr<cumempool_snapshot, decltype(&cumempool_snapshot_destroy)> snapshot(
        raw, &cumempool_snapshot_destroy);
    return fields_of(*raw);
  }

  py::dict find(std::uint64_t address) {
    cumempool_allocation_info info{};
    info.size = sizeof info;
    call([&] { return cumempool_find(allocator_, address, &info); });
    return fields_of(info);
  }

 private:
  DriverPointer driver_;
  cumempool_allocator* allocator_ = nullptr;
};

template <auto Function, typename Number>
void tell(Number number) {
  call([&] { return Function(number); });
}

std::uint64_t slot_mallocs(std::uint32_t slot) {
  std::uint64_t count = 0;
  call([&] { return cumempool_slot_mallocs(slot, &count); });
  return count;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C interface of libcumempool.";
  module.def("version", &cumempool_version);
  module.def("slot_count", &cumempool_slot_count);
  module.def("open_cuda", &open_cuda);
  module.def("host_room", &host_room);
  module.def("open_host", &open_host, py::arg("devices"), py::arg("bytes_per_device"),
             py::arg("granularity"), py::arg("rdma"), py::arg("fabric"), py::arg("fence") = 0);
  module.def("free", &tell<&cumempool_free, std::uint64_t>, py::arg("address"));
  module.def("slot_mallocs", &slot_mallocs, py::arg("slot"));
  module.def("preserve_slot", &tell<&cumempool_preserve_slot, std::uint32_t>, py::arg("slot"));
  module.def("unbind_slot", &tell<&cumempool_unbind_slot, std::uint32_t>, py::arg("slot"));

  py::class_<DriverObject, DriverPointer>(module, "Driver")
      .def_property_readonly("name", [](const DriverObject& driver) { return driver.table->name; })
      .def_property_readonly("version", &driver_version)
      .def_property_readonly("device_count", &device_count)
      .def("launch", &launch, py::arg("device"), py::arg("function"), py::arg("argument"))
      .def("context_active", &context_active, py::arg("device"))
      .def("probe", &probe_device, py::arg("device"));

  py::class_<Connection, ConnectionPointer>(module, "Connection")
      .def(py::init<int>(), py::arg("fd"));
  module.def("pidfd_open", &pidfd_open, py::arg("process"));
  module.def("open_shared", &open_shared, py::arg("driver"), py::arg("device"), py::arg("exported"),
             py::arg("bytes"), py::arg("writable"), py::arg("connection"));

  py::class_<ReportObject, std::shared_ptr<ReportObject>>(
      module, "Report", py::custom_type_setup(&refuse_without_memory))
      .def_property_readonly("seconds", &ReportObject::seconds)
      .def_property_readonly("rows", &ReportObject::rows)
      .def_property_readonly("problems", &ReportObject::problems);

  py::class_<Waking>(module, "Waking", py::custom_type_setup(&refuse_without_memory))
      .def("wait", &Waking::wait, py::arg("address"), py::arg("device"), py::arg("stream"))
      .def("done", &Waking::done)
      .def("finish", &Waking::finish);

  py::class_<AllocatorObject, std::shared_ptr<AllocatorObject>>(module, "Allocator")
      .def(py::init<DriverPointer, std::uint64_t, bool, const std::optional<BackupFields>&>(),
           py::arg("driver"), py::arg("host_backup_limit"), py::arg("retain_backups"),
           py::arg("overflow"))
      .def("close", &AllocatorObject::close, py::arg("force"))
      .def_property_readonly("closed", &AllocatorObject::closed)
      .def("declare_tag", &AllocatorObject::declare_tag, py::arg("tag"), py::arg("on_sleep"),
           py::arg("on_wake"))
      .def("set_backup", &AllocatorObject::set_backup, py::arg("tag"), py::arg("tier"),
           py::arg("directory"), py::arg("peer_device"))
      .def("set_memory", &AllocatorObject::set_memory, py::arg("tag"), py::arg("backing"),
           py::arg("all_peers"), py::arg("peers"), py::arg("rdma"))
      .def("pin", &AllocatorObject::pin, py::arg("tag"), py::arg("holder"))
      .def("unpin", &AllocatorObject::tell<&cumempool_unpin>, py::arg("pin"))
      .def("export_fd", &AllocatorObject::export_fd, py::arg("address"))
      .def("export_fabric", &AllocatorObject::export_fabric, py::arg("address"))
      .def("malloc", &AllocatorObject::malloc, py::arg("tag"), py::arg("device"), py::arg("bytes"))
      .def("malloc_capsule", &AllocatorObject::malloc_capsule, py::arg("tag"), py::arg("device"),
           py::arg("bytes"), py::arg("preserved") = false)
      .def("bind_slot", &AllocatorObject::bind_slot, py::arg("tag"), py::arg("lasting") = false)
      .def("moment", &AllocatorObject::ask<&cumempool_moment>)
      .def("preserve", &AllocatorObject::tell<&cumempool_preserve>, py::arg("address"))
      .def("set_free_wait", &AllocatorObject::tell<&cumempool_set_free_wait>,
           py::arg("nanoseconds"))
      .def("set_memory_margin", &AllocatorObject::tell<&cumempool_set_memory_margin>,
           py::arg("bytes"))
      .def("reset_peaks",
           [](AllocatorObject& allocator) {
             call([&] { return cumempool_reset_peaks(allocator.get()); });
           })
      .def("progress", &AllocatorObject::progress)
      .def("sleep", &AllocatorObject::sleep, py::arg("tags"), py::arg("drop_backups"),
           py::arg("dead"), py::arg("streams"), py::arg("as_of") = 0)
      .def("prepare", &AllocatorObject::prepare, py::arg("tags"), py::arg("dead"),
           py::arg("yielding"), py::arg("as_of") = 0)
      .def("wake", &AllocatorObject::wake, py::arg("tags"), py::arg("streams"))
      .def("swap", &AllocatorObject::swap, py::arg("sleep"), py::arg("dead"), py::arg("wake"),
           py::arg("streams"), py::arg("as_of") = 0)
      .def("wake_begin", &AllocatorObject::wake_begin, py::arg("tags"), py::arg("first"),
           py::arg("streams"))
      .def("view_backup", &AllocatorObject::view_backup, py::arg("address"), py::arg("bytes"),
           py::arg("writable"))
      .def("release_host_memory", &AllocatorObject::ask<&cumempool_release_host_memory>)
      .def("snapshot", &AllocatorObject::snapshot, py::arg("allocations"))
      .def("find", &AllocatorObject::find, py::arg("address"));
}

}  // namespace cumempool::python
