// Memory that Python gets in DLPack capsules.
#include "memory.hpp"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>
#include <utility>

#include "errors.hpp"

namespace py = pybind11;

namespace cumempool::python {
namespace {

// An importer's report that it has unmapped all of the memory: RELEASED of wire.py.
constexpr char kReleased = 'r';

// A system call that older headers, and Pythons built with them, lack. Its number is the same on
// every architecture.
constexpr long kPidfdOpen = 434;

void end_lease(DlManagedTensor* tensor) { delete static_cast<Lease*>(tensor->manager_ctx); }

// Frees the memory of a capsule that torch did not consume.
void drop_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
  auto* tensor = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  tensor->deleter(tensor);
}

}  // namespace

// ---- connections --------------------------------------------------------------------------------

Connection::Connection(int number)
    : number_(fcntl(number, F_DUPFD_CLOEXEC, 0)), process_(getpid()) {
  if (number_ >= 0) return;
  PyErr_SetFromErrno(PyExc_OSError);
  throw py::error_already_set();
}

Connection::~Connection() {
  if (getpid() == process_) {
    static_cast<void>(send(number_, &kReleased, 1, MSG_DONTWAIT | MSG_NOSIGNAL));
    shutdown(number_, SHUT_RDWR);
  }
  close(number_);
}

int pidfd_open(int process) {
  const long fd = syscall(kPidfdOpen, process, 0);
  if (fd >= 0) return static_cast<int>(fd);
  PyErr_SetFromErrno(PyExc_OSError);
  throw py::error_already_set();
}

// ---- capsules -----------------------------------------------------------------------------------

Lease::~Lease() {
  const Unlocked unlocked;
  if (address != 0) cumempool_free(address);
  if (view != nullptr) cumempool_end_backup_view(view);
  if (shared == nullptr) return;
  const cumempool_status status = cumempool_shared_close(shared);
  if (status != CUMEMPOOL_OK && status != CUMEMPOOL_FORKED) {
    // The memory stays mapped, so its owner must keep it awake until this process ends.
    static_cast<void>(connection.release());
  }
  cumempool_shared_destroy(shared);
}

py::capsule make_capsule(std::unique_ptr<Lease> lease, void* data, std::int32_t device_type,
                         std::int32_t device_id, std::size_t bytes) {
  lease->shape = static_cast<std::int64_t>(bytes);
  lease->tensor = {data, device_type,   device_id,      1, kDlUnsigned, 8,
                   1,    &lease->shape, &lease->stride, 0, lease.get(), &end_lease};
  PyObject* capsule = PyCapsule_New(&lease->tensor, "dltensor", &drop_capsule);
  if (capsule == nullptr) throw py::error_already_set();
  static_cast<void>(lease.release());
  return py::reinterpret_steal<py::capsule>(capsule);
}

void* pointer_to(cumempool_address address) {
  return reinterpret_cast<void*>(  // NOLINT(performance-no-int-to-ptr)
      static_cast<std::uintptr_t>(address));
}

py::capsule open_shared(const DriverPointer& driver, int device,
                        const std::variant<int, py::bytes>& exported, std::uint64_t bytes,
                        bool writable, const ConnectionPointer& connection) {
  auto lease = std::make_unique<Lease>();
  lease->driver = driver;
  if (connection != nullptr) {
    lease->connection = std::make_unique<ConnectionPointer>(connection);
  }
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
  return make_capsule(std::move(lease), data, driver->memory, driver->device_id(device), bytes);
}

}  // namespace cumempool::python
