// The extension module cumempool._core: the C interface of cumempool.h as Python sees it. Failures
// are raised as the classes of cumempool.errors; the GIL is released around calls that may wait, in
// destructors as well.
#include <cxxabi.h>
#include <fcntl.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <variant>
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

bool interpreter_ends() noexcept {
#if PY_VERSION_HEX >= 0x030d0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

// For what may wait where nothing can be raised: destructors, and deleters that torch calls with
// the GIL or without. While it lives the thread does not hold the GIL, so that work of a device
// that needs it comes to an end.
class Unlocked {
 public:
  Unlocked() noexcept {
    if (!interpreter_ends() && PyGILState_Check() != 0) state_ = PyEval_SaveThread();
  }
  ~Unlocked() {
    if (state_ == nullptr) return;
    try {
      PyEval_RestoreThread(state_);
    } catch (const abi::__forced_unwind&) {
      // The interpreter has ended meanwhile, and Python ends this thread by unwinding it, which
      // must not leave a destructor: the thread stays here, as it does from Python 3.14 on.
      for (;;) pause();
    }
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_ = nullptr;
};

[[noreturn]] void refuse(const char* message, const char* advice) {
  cumempool_error error{};
  error.status = CUMEMPOOL_INVALID_ARGUMENT;
  error.message = message;
  error.operation = error.tag = error.driver_call = error.result_name = "";
  error.advice = advice;
  error.device = -1;
  raise_fields(error_fields(error));
}

// A C string ends at its first zero byte, so such a tag would silently become another one.
const char* tag_text(const std::string& tag) {
  if (tag.find('\0') != std::string::npos) {
    refuse("a tag cannot contain a zero byte", "use 1 to 255 bytes of UTF-8 without a zero byte");
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
    if (!owned) return;
    const Unlocked unlocked;  // memory of other processes waits for the device before it goes
    cumempool_host_driver_destroy(table);
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
                        bool rdma, bool fabric, std::uint32_t fence) {
  cumempool_host_driver_options options{};
  options.size = sizeof options;
  options.device_count = devices;
  options.bytes_per_device = bytes_per_device;
  options.granularity = granularity;
  options.handle_types = CUMEMPOOL_HANDLE_POSIX_FD;
  if (fabric) options.handle_types |= CUMEMPOOL_HANDLE_FABRIC;
  options.rdma = rdma ? 1 : 0;
  options.fence = fence;
  auto driver = std::make_shared<Driver>();
  call([&] { return cumempool_host_driver_create(&options, &driver->table); });
  driver->memory = cumempool::python::kDlCpu;
  driver->owned = true;
  return driver;
}

// Bytes, the limit and its file.
std::tuple<std::uint64_t, std::uint64_t, std::string> host_room() {
  cumempool_host_memory memory{};
  memory.size = sizeof memory;
  call([&] { return cumempool_host_room(&memory); });
  const bool known = memory.free_bytes != std::numeric_limits<std::uint64_t>::max();
  return {known ? memory.free_bytes : 0, memory.limit_bytes, memory.source};
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
  fields["fence"] = probe.fence;
  fields["pins_host_memory"] = probe.pins_host_memory != 0;
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

// `function` is the address of a C function, as ctypes has it.
void launch(const Driver& driver, int device, std::uintptr_t function, std::uintptr_t argument) {
  auto* const called =
      reinterpret_cast<void (*)(void*)>(function);  // NOLINT(performance-no-int-to-ptr)
  call([&] {
    return cumempool_host_driver_launch(
        driver.table, device, called,
        reinterpret_cast<void*>(argument));  // NOLINT(performance-no-int-to-ptr)
  });
}

py::dict report_fields(const cumempool_report* report) {
  std::size_t count = 0;
  py::list rows;
  const cumempool_report_row* row = cumempool_report_rows(report, &count);
  for (std::size_t i = 0; i < count; ++i, ++row) {
    py::dict fields;
    fields["tag"] = row->tag;
    fields["device"] = row->device;
    fields["allocations"] = row->allocations;
    fields["freed_bytes"] = row->freed_bytes;
    fields["mapped_bytes"] = row->mapped_bytes;
    fields["backed_up_bytes"] = row->backed_up_bytes;
    fields["clean_bytes"] = row->clean_bytes;
    fields["restored_bytes"] = row->restored_bytes;
    fields["discarded_bytes"] = row->discarded_bytes;
    fields["zeroed_bytes"] = row->zeroed_bytes;
    fields["copy_seconds"] = row->copy_seconds;
    rows.append(fields);
  }
  py::list problems;
  const char* const* problem = cumempool_report_problems(report, &count);
  for (std::size_t i = 0; i < count; ++i) problems.append(problem[i]);
  py::dict fields;
  fields["seconds"] = cumempool_report_seconds(report);
  fields["rows"] = rows;
  fields["problems"] = problems;
  return fields;
}

// As report_fields, of a report that nobody needs any more.
py::dict take_report(cumempool_report* raw) {
  const std::unique_ptr<cumempool_report, decltype(&cumempool_report_destroy)> report(
      raw, &cumempool_report_destroy);
  return report_fields(report.get());
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

py::object tier_name(cumempool_backup_tier tier) {
  switch (tier) {
    case CUMEMPOOL_BACKUP_UNSET:
      break;
    case CUMEMPOOL_BACKUP_PINNED:
      return py::str("pinned");
    case CUMEMPOOL_BACKUP_PAGEABLE:
      return py::str("pageable");
    case CUMEMPOOL_BACKUP_FILE:
      return py::str("file");
    case CUMEMPOOL_BACKUP_PEER:
      return py::str("peer");
  }
  return py::none();
}

const char* backing_name(cumempool_backing backing) {
  return backing == CUMEMPOOL_BACKING_CUDA_MALLOC ? "cuda_malloc" : "vmm";
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
  fields["backup_tier"] = tier_name(info.backup_tier);
  fields["backing"] = backing_name(info.backing);
  fields["sequence"] = info.sequence;
  fields["preserved"] = info.preserved != 0;
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
  fields["retained_bytes"] = stats.retained_bytes;
  fields["backup_tier"] = tier_name(stats.backup_tier);
  fields["backing"] = backing_name(stats.backing);
  fields["pins"] = stats.pins;
  fields["unreleased_bytes"] = stats.unreleased_bytes;
  fields["preserved_bytes"] = stats.preserved_bytes;
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
  fields["pageable_bytes"] = totals.pageable_bytes;
  fields["file_bytes"] = totals.file_bytes;
  fields["peer_bytes"] = totals.peer_bytes;
  fields["staging_bytes"] = totals.staging_bytes;
  fields["malloc_calls"] = totals.malloc_calls;
  fields["malloc_failures"] = totals.malloc_failures;
  fields["free_calls"] = totals.free_calls;
  fields["sleeps"] = totals.sleeps;
  fields["wakes"] = totals.wakes;
  fields["swaps"] = totals.swaps;
  fields["failed_transitions"] = totals.failed_transitions;
  return fields;
}

// What an importer says when nothing of the memory is mapped any more: RELEASED of wire.py.
constexpr char kReleased = 'r';

// The connection to the owner of shared memory: until it says that the memory was released, the
// owner keeps that awake. The memory that came over it shares this object, and the last of it says
// so, and ends the connection, for processes forked meanwhile as well; what such a process drops
// itself ends nothing. The owner has it in its socket before the destructor returns.
class Connection {
 public:
  // Takes a copy of the descriptor.
  explicit Connection(int number) : number_(fcntl(number, F_DUPFD_CLOEXEC, 0)), process_(getpid()) {
    if (number_ >= 0) return;
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection() {
    if (getpid() == process_) {
      static_cast<void>(send(number_, &kReleased, 1, MSG_DONTWAIT | MSG_NOSIGNAL));
      shutdown(number_, SHUT_RDWR);
    }
    close(number_);
  }

 private:
  int number_;
  pid_t process_;
};
using ConnectionPointer = std::shared_ptr<Connection>;

// A connection whose memory could not be unmapped, so that its owner goes on keeping that awake: it
// ends with the process.
void keep_open(ConnectionPointer connection) {
  static std::mutex mutex;
  static auto* const kept = new std::vector<ConnectionPointer>;
  const std::lock_guard lock(mutex);
  kept->push_back(std::move(connection));
}

// Calls of the kernel that older headers, and Pythons built with those, do not know. Their numbers
// are the same on every architecture. What they return is close-on-exec, and the caller's.
constexpr long kPidfdOpen = 434;
constexpr long kPidfdGetfd = 438;

int descriptor_of(long returned) {
  if (returned >= 0) return static_cast<int>(returned);
  PyErr_SetFromErrno(PyExc_OSError);
  throw py::error_already_set();
}

// A descriptor of a process, which becomes readable when the process ends.
int pidfd_open(int process) { return descriptor_of(syscall(kPidfdOpen, process, 0)); }

// A copy of a descriptor of another process.
int pidfd_getfd(int process, int number) {
  return descriptor_of(syscall(kPidfdGetfd, process, number, 0));
}

// What keeps the memory behind a capsule, and the driver under it, alive: device memory, a view of
// a backup, or memory of another process.
struct Lease {
  DlManagedTensor tensor{};
  std::int64_t shape = 0;
  std::int64_t stride = 1;
  cumempool_address address = 0;
  void* view = nullptr;
  DriverPointer driver;
  cumempool_shared* shared = nullptr;
  ConnectionPointer connection;  // ends after the mapping

  Lease() = default;
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  ~Lease() {
    const Unlocked unlocked;
    if (address != 0) cumempool_free(address);
    if (view != nullptr) cumempool_end_backup_view(view);
    if (shared == nullptr) return;
    const cumempool_status status = cumempool_shared_close(shared);
    if (status != CUMEMPOOL_OK && status != CUMEMPOOL_FORKED && connection != nullptr) {
      keep_open(std::move(connection));
    }
    cumempool_shared_destroy(shared);
  }
};

void end_lease(DlManagedTensor* tensor) { delete static_cast<Lease*>(tensor->manager_ctx); }

// A capsule that torch did not consume still owns its memory.
void drop_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
  auto* tensor = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  tensor->deleter(tensor);
}

// A capsule with `bytes` at `data`, which the lease keeps.
py::capsule make_capsule(std::unique_ptr<Lease> lease, void* data,
                         cumempool::python::DlDevice device, std::size_t bytes) {
  lease->shape = static_cast<std::int64_t>(bytes);
  lease->tensor.dl_tensor = {
      data, device, 1, {cumempool::python::kDlUnsigned, 8, 1}, &lease->shape, &lease->stride, 0};
  lease->tensor.manager_ctx = lease.get();
  lease->tensor.deleter = &end_lease;
  PyObject* capsule = PyCapsule_New(&lease->tensor, "dltensor", &drop_capsule);
  if (capsule == nullptr) throw py::error_already_set();
  static_cast<void>(lease.release());
  return py::reinterpret_steal<py::capsule>(capsule);
}

// Integer to pointer: the address is the driver's.
void* pointer_to(cumempool_address address) {
  return reinterpret_cast<void*>(  // NOLINT(performance-no-int-to-ptr)
      static_cast<std::uintptr_t>(address));
}

// Where memory of a driver is, for DLPack.
cumempool::python::DlDevice place(const Driver& driver, int device) {
  return {driver.memory, driver.memory == cumempool::python::kDlCpu ? 0 : device};
}

constexpr std::size_t kFabricBytes = CUMEMPOOL_FABRIC_HANDLE_BYTES;

// Maps memory of another process. `exported` is an open descriptor, or the bytes of a fabric
// handle. The connection, where there is one, ends after the mapping.
py::capsule open_shared(const DriverPointer& driver, int device,
                        const std::variant<int, py::bytes>& exported, std::uint64_t bytes,
                        bool writable, const ConnectionPointer& connection) {
  auto lease = std::make_unique<Lease>();
  lease->driver = driver;
  lease->connection = connection;
  const auto access = writable ? CUMEMPOOL_ACCESS_READ_WRITE : CUMEMPOOL_ACCESS_READ;
  const auto map = [&](std::uint32_t type, const void* handle) {
    call([&] {
      return cumempool_shared_open(driver->table, device, type, handle, bytes, access,
                                   &lease->shared);
    });
  };
  if (const int* number = std::get_if<int>(&exported)) {
    map(CUMEMPOOL_HANDLE_POSIX_FD, number);
  } else {
    const std::string handle = std::get<py::bytes>(exported);
    if (handle.size() != kFabricBytes) refuse("this is no fabric handle", "share it again");
    map(CUMEMPOOL_HANDLE_FABRIC, handle.data());
  }
  void* data = pointer_to(cumempool_shared_address(lease->shared));
  return make_capsule(std::move(lease), data, place(*driver, device), bytes);
}

using Pair = std::pair<std::uint64_t, std::uint64_t>;

// A cumempool_sleep_request and what it points to.
class SleepRequest {
 public:
  SleepRequest(const std::vector<std::pair<std::string, int>>& tags, bool drop_backups,
               const std::vector<Pair>& dead, std::uint64_t as_of,
               std::vector<cumempool_device_stream> streams)
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
    request_.dead_as_of = as_of;
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

using Stream = std::pair<int, std::uint64_t>;

std::vector<cumempool_device_stream> device_streams(const std::vector<Stream>& streams) {
  std::vector<cumempool_device_stream> converted;
  converted.reserve(streams.size());
  for (const auto& [device, stream] : streams) converted.push_back({device, 0, stream});
  return converted;
}

// The tags of a wake as the C interface takes them: NULL for all.
class WakeTags {
 public:
  explicit WakeTags(const std::optional<std::vector<std::string>>& tags) {
    if (!tags) return;
    for (const std::string& tag : *tags) names_.push_back(tag_text(tag));
    names_.push_back(nullptr);  // so that an empty list is not taken for "all"
  }

  const char* const* data() const noexcept { return names_.empty() ? nullptr : names_.data(); }
  std::size_t count() const noexcept { return names_.empty() ? 0 : names_.size() - 1; }

 private:
  std::vector<const char*> names_;
};

// Tier, directory and device.
using BackupFields = std::tuple<int, std::string, int>;

// Points into `fields`. The directory comes from Python's os.fsencode: bytes without a zero.
cumempool_backup_policy backup_policy(const BackupFields& fields) {
  cumempool_backup_policy policy{};
  policy.size = sizeof policy;
  policy.tier = static_cast<cumempool_backup_tier>(std::get<0>(fields));
  const std::string& directory = std::get<1>(fields);
  policy.directory = directory.empty() ? nullptr : directory.c_str();
  policy.peer_device = std::get<2>(fields);
  return policy;
}

class Allocator;

// A wake in a thread of its own. The driver stays as long as its memory is being worked on, and so
// does the allocator, which closes itself when it goes. (Not by pybind11's keep_alive, whose 3.1
// crashes where an argument is of the wrong type.)
class Waking {
 public:
  Waking(DriverPointer driver, std::shared_ptr<const Allocator> allocator, cumempool_waking* waking)
      : driver_(std::move(driver)), allocator_(std::move(allocator)), waking_(waking) {}
  Waking(const Waking&) = delete;
  Waking& operator=(const Waking&) = delete;
  // cumempool.WakeHandle waits before, where Python may end the thread; this hardly ever does.
  ~Waking() {
    const Unlocked unlocked;
    cumempool_waking_destroy(waking_);
    if (report_ != nullptr) cumempool_report_destroy(report_);
  }

  void wait(std::uint64_t address, int device, std::uint64_t stream) {
    call([&] { return cumempool_waking_wait(waking_, address, {device, 0, stream}); });
  }
  bool done() const { return cumempool_waking_done(waking_) != 0; }

  py::dict finish() {
    call([this] {
      cumempool_report* report = nullptr;
      const cumempool_status status = cumempool_waking_finish(waking_, &report);
      if (status != CUMEMPOOL_OK) return status;
      // One of the threads that come here gets the report, and is about to leave it for the others.
      if (report != nullptr) report_ = report;
      while (report_ == nullptr) std::this_thread::yield();
      return status;
    });
    return report_fields(report_);
  }

 private:
  DriverPointer driver_;
  std::shared_ptr<const Allocator> allocator_;
  cumempool_waking* waking_;
  std::atomic<cumempool_report*> report_ = nullptr;
};

class Allocator : public std::enable_shared_from_this<Allocator> {
 public:
  Allocator(DriverPointer driver, std::uint64_t host_backup_limit, bool retain_backups,
            const std::optional<BackupFields>& overflow)
      : driver_(std::move(driver)) {
    cumempool_allocator_options options{};
    options.size = sizeof options;
    options.retain_backups = retain_backups ? 1 : 0;
    options.host_backup_limit = host_backup_limit;
    options.overflow.size = sizeof options.overflow;
    if (overflow) options.overflow = backup_policy(*overflow);
    call([&] { return cumempool_allocator_create(driver_->table, &options, &allocator_); });
    // Work of a host driver is done by who waits for it, so that waiting is never in vain.
    if (driver_->memory == cumempool::python::kDlCpu) set_free_wait(CUMEMPOOL_FREE_WAITS);
  }
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;
  // Tensors may outlive this object, and nobody has asked for their contents to be lost: while
  // memory is in use the allocator and its driver stay, for the rest of the process.
  ~Allocator() {
    const Unlocked unlocked;
    if (cumempool_allocator_close(allocator_, 0) == CUMEMPOOL_IN_USE) {
      driver_->owned = false;  // a host driver is not destroyed, then
      return;
    }
    cumempool_allocator_destroy(allocator_);
  }

  void close(bool force) {
    call([&] { return cumempool_allocator_close(allocator_, force ? 1 : 0); });
  }

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

  std::uint64_t pin(const std::string& tag, const std::string& holder) {
    const char* name = tag_text(tag);
    if (holder.empty() || holder.find('\0') != std::string::npos) {
      refuse("the holder of a pin needs a name without a zero byte", "say who holds it");
    }
    std::uint64_t pin = 0;
    call([&] { return cumempool_pin(allocator_, name, holder.c_str(), &pin); });
    return pin;
  }

  void unpin(std::uint64_t pin) {
    call([&] { return cumempool_unpin(allocator_, pin); });
  }

  // The descriptor is the caller's.
  std::pair<int, py::dict> export_fd(std::uint64_t address) {
    int number = -1;
    cumempool_allocation_info info{};
    call([&] {
      return cumempool_export(allocator_, address, CUMEMPOOL_HANDLE_POSIX_FD, &number, &info);
    });
    return {number, allocation_fields(info)};
  }

  std::pair<py::bytes, py::dict> export_fabric(std::uint64_t address) {
    std::array<char, kFabricBytes> handle{};
    cumempool_allocation_info info{};
    call([&] {
      return cumempool_export(allocator_, address, CUMEMPOOL_HANDLE_FABRIC, handle.data(), &info);
    });
    return {py::bytes(handle.data(), handle.size()), allocation_fields(info)};
  }

  std::uint64_t malloc(const std::string& tag, int device, std::size_t bytes) {
    const char* name = tag_text(tag);
    cumempool_address address = 0;
    call([&] { return cumempool_malloc(allocator_, name, device, bytes, &address); });
    return address;
  }

  py::capsule malloc_capsule(const std::string& tag, int device, std::size_t bytes,
                             bool preserved) {
    const char* name = tag_text(tag);
    const auto allocate = preserved ? &cumempool_malloc_preserved : &cumempool_malloc;
    auto lease = std::make_unique<Lease>();
    call([&] { return allocate(allocator_, name, device, bytes, &lease->address); });
    lease->driver = driver_;
    void* data = pointer_to(lease->address);
    return make_capsule(std::move(lease), data, place(*driver_, device), bytes);
  }

  py::capsule view_backup(std::uint64_t address, std::size_t bytes, bool writable) {
    auto lease = std::make_unique<Lease>();
    lease->driver = driver_;
    cumempool_backup_view view{};
    call(
        [&] { return cumempool_view_backup(allocator_, address, bytes, writable ? 1 : 0, &view); });
    lease->view = view.lease;
    return make_capsule(std::move(lease), view.data, {cumempool::python::kDlCpu, 0}, bytes);
  }

  std::uint32_t bind_slot(const std::string& tag, bool lasting) {
    const char* name = tag_text(tag);
    const auto bind = lasting ? &cumempool_bind_lasting_slot : &cumempool_bind_slot;
    std::uint32_t slot = 0;
    call([&] { return bind(allocator_, name, &slot); });
    return slot;
  }

  std::uint64_t moment() {
    std::uint64_t moment = 0;
    call([&] { return cumempool_moment(allocator_, &moment); });
    return moment;
  }

  void preserve(std::uint64_t address) {
    call([&] { return cumempool_preserve(allocator_, address); });
  }

  void set_free_wait(std::uint64_t nanoseconds) {
    call([&] { return cumempool_set_free_wait(allocator_, nanoseconds); });
  }

  void set_memory_margin(std::uint64_t bytes) {
    call([&] { return cumempool_set_memory_margin(allocator_, bytes); });
  }

  std::pair<std::uint64_t, std::uint64_t> progress() {
    std::uint64_t done = 0;
    std::uint64_t total = 0;
    call([&] { return cumempool_progress(allocator_, &done, &total); });
    return {done, total};
  }

  py::dict sleep(const std::vector<std::pair<std::string, int>>& tags, bool drop_backups,
                 const std::vector<Pair>& dead, const std::vector<Stream>& streams,
                 std::uint64_t as_of) {
    const SleepRequest request(tags, drop_backups, dead, as_of, device_streams(streams));
    cumempool_report* report = nullptr;
    call([&] { return cumempool_sleep(allocator_, request.get(), &report); });
    return take_report(report);
  }

  std::uint64_t prepare(const std::vector<std::pair<std::string, int>>& tags,
                        const std::vector<Pair>& dead, const std::vector<std::string>& yielding,
                        std::uint64_t as_of) {
    const SleepRequest request(tags, false, dead, as_of, {});
    std::vector<const char*> names;
    names.reserve(yielding.size());
    for (const std::string& tag : yielding) names.push_back(tag_text(tag));
    std::uint64_t pinned = 0;
    call([&] {
      return cumempool_prepare(allocator_, request.get(), names.data(), names.size(), &pinned);
    });
    return pinned;
  }

  py::dict wake(const std::optional<std::vector<std::string>>& tags,
                const std::vector<Stream>& streams) {
    const WakeTags names(tags);
    const auto current = device_streams(streams);
    cumempool_report* report = nullptr;
    call([&] {
      return cumempool_wake(allocator_, names.data(), names.count(), current.data(), current.size(),
                            &report);
    });
    return take_report(report);
  }

  py::dict swap(const std::vector<std::pair<std::string, int>>& sleep,
                const std::vector<Pair>& dead, const std::optional<std::vector<std::string>>& wake,
                const std::vector<Stream>& streams, std::uint64_t as_of) {
    const SleepRequest leaving(sleep, false, dead, as_of, device_streams(streams));
    const WakeTags coming(wake);
    cumempool_swap_request request{};
    request.size = sizeof request;
    request.sleep = leaving.get();
    request.wake_tags = coming.data();
    request.wake_tag_count = coming.count();
    cumempool_report* report = nullptr;
    call([&] { return cumempool_swap(allocator_, &request, &report); });
    return take_report(report);
  }

  std::unique_ptr<Waking> wake_begin(const std::optional<std::vector<std::string>>& tags,
                                     const std::vector<std::uint64_t>& first,
                                     const std::vector<Stream>& streams) {
    const WakeTags names(tags);
    const auto current = device_streams(streams);
    cumempool_waking* waking = nullptr;
    call([&] {
      return cumempool_wake_begin(allocator_, names.data(), names.count(), first.data(),
                                  first.size(), current.data(), current.size(), &waking);
    });
    return std::make_unique<Waking>(driver_, shared_from_this(), waking);
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
  DriverPointer driver_;
  cumempool_allocator* allocator_ = nullptr;
};

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C interface of libcumempool.";
  module.def("version", &cumempool_version);
  module.def("slot_count", &cumempool_slot_count);
  module.def("open_cuda", &open_cuda);
  module.def("host_room", &host_room);
  module.def("open_host", &open_host, py::arg("devices"), py::arg("bytes_per_device"),
             py::arg("granularity"), py::arg("rdma"), py::arg("fabric"), py::arg("fence") = 0);
  module.def(
      "free", [](std::uint64_t address) { call([&] { return cumempool_free(address); }); },
      py::arg("address"));
  module.def(
      "slot_mallocs",
      [](std::uint32_t slot) {
        std::uint64_t count = 0;
        call([&] { return cumempool_slot_mallocs(slot, &count); });
        return count;
      },
      py::arg("slot"));
  module.def(
      "preserve_slot",
      [](std::uint32_t slot) { call([&] { return cumempool_preserve_slot(slot); }); },
      py::arg("slot"));
  module.def(
      "unbind_slot", [](std::uint32_t slot) { call([&] { return cumempool_unbind_slot(slot); }); },
      py::arg("slot"));

  py::class_<Driver, DriverPointer>(module, "Driver")
      .def_property_readonly("name", [](const Driver& driver) { return driver.table->name; })
      .def_property_readonly("version", &driver_version)
      .def_property_readonly("device_count", &Driver::device_count)
      .def("launch", &launch, py::arg("device"), py::arg("function"), py::arg("argument"))
      .def("context_active", &context_active, py::arg("device"))
      .def("probe", &probe_device, py::arg("device"));

  py::class_<Connection, ConnectionPointer>(module, "Connection")
      .def(py::init<int>(), py::arg("fd"));
  module.def("pidfd_open", &pidfd_open, py::arg("process"));
  module.def("pidfd_getfd", &pidfd_getfd, py::arg("process"), py::arg("number"));
  module.def("open_shared", &open_shared, py::arg("driver"), py::arg("device"), py::arg("exported"),
             py::arg("bytes"), py::arg("writable"), py::arg("connection"));

  py::class_<Waking>(module, "Waking")
      .def("wait", &Waking::wait, py::arg("address"), py::arg("device"), py::arg("stream"))
      .def("done", &Waking::done)
      .def("finish", &Waking::finish);

  py::class_<Allocator, std::shared_ptr<Allocator>>(module, "Allocator")
      .def(py::init<DriverPointer, std::uint64_t, bool, const std::optional<BackupFields>&>(),
           py::arg("driver"), py::arg("host_backup_limit"), py::arg("retain_backups"),
           py::arg("overflow"))
      .def("close", &Allocator::close, py::arg("force"))
      .def_property_readonly("closed", &Allocator::closed)
      .def("declare_tag", &Allocator::declare_tag, py::arg("tag"), py::arg("on_sleep"),
           py::arg("on_wake"))
      .def("set_backup", &Allocator::set_backup, py::arg("tag"), py::arg("tier"),
           py::arg("directory"), py::arg("peer_device"))
      .def("set_memory", &Allocator::set_memory, py::arg("tag"), py::arg("backing"),
           py::arg("all_peers"), py::arg("peers"), py::arg("rdma"))
      .def("pin", &Allocator::pin, py::arg("tag"), py::arg("holder"))
      .def("unpin", &Allocator::unpin, py::arg("pin"))
      .def("export_fd", &Allocator::export_fd, py::arg("address"))
      .def("export_fabric", &Allocator::export_fabric, py::arg("address"))
      .def("malloc", &Allocator::malloc, py::arg("tag"), py::arg("device"), py::arg("bytes"))
      .def("malloc_capsule", &Allocator::malloc_capsule, py::arg("tag"), py::arg("device"),
           py::arg("bytes"), py::arg("preserved") = false)
      .def("bind_slot", &Allocator::bind_slot, py::arg("tag"), py::arg("lasting") = false)
      .def("moment", &Allocator::moment)
      .def("preserve", &Allocator::preserve, py::arg("address"))
      .def("set_free_wait", &Allocator::set_free_wait, py::arg("nanoseconds"))
      .def("set_memory_margin", &Allocator::set_memory_margin, py::arg("bytes"))
      .def("progress", &Allocator::progress)
      .def("sleep", &Allocator::sleep, py::arg("tags"), py::arg("drop_backups"), py::arg("dead"),
           py::arg("streams"), py::arg("as_of") = 0)
      .def("prepare", &Allocator::prepare, py::arg("tags"), py::arg("dead"), py::arg("yielding"),
           py::arg("as_of") = 0)
      .def("wake", &Allocator::wake, py::arg("tags"), py::arg("streams"))
      .def("swap", &Allocator::swap, py::arg("sleep"), py::arg("dead"), py::arg("wake"),
           py::arg("streams"), py::arg("as_of") = 0)
      .def("wake_begin", &Allocator::wake_begin, py::arg("tags"), py::arg("first"),
           py::arg("streams"))
      .def("view_backup", &Allocator::view_backup, py::arg("address"), py::arg("bytes"),
           py::arg("writable"))
      .def("release_host_memory", &Allocator::release_host_memory)
      .def("snapshot", &Allocator::snapshot, py::arg("allocations"))
      .def("find", &Allocator::find, py::arg("address"));
}
