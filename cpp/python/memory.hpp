// Memory that Python gets in DLPack capsules: device memory, views of backups, and memory of other
// processes with the connections to its owners.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <variant>

#include "cumempool/cumempool.h"
#include "dlpack.hpp"
#include "drivers.hpp"

namespace cumempool::python {

// The connection to the owner of shared memory. The owner keeps the memory awake until this process
// reports it released. All memory that came over the connection shares this object. The last of it
// sends that report and ends the connection, also for processes forked meanwhile. A forked process
// that drops the object ends nothing. The report is in the owner's socket before the destructor
// returns.
class Connection {
 public:
  // Takes a copy of the descriptor.
  explicit Connection(int number);
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection();

 private:
  int number_;
  pid_t process_;
};
using ConnectionPointer = std::shared_ptr<Connection>;

// Keeps the memory behind a capsule and its driver alive: device memory, a view of a backup, or
// memory of another process.
struct Lease {
  DlManagedTensor tensor{};
  std::int64_t shape = 0;
  std::int64_t stride = 1;
  cumempool_address address = 0;
  void* view = nullptr;
  DriverPointer driver;
  cumempool_shared* shared = nullptr;
  // Ends after the mapping. On the heap, so that it can be leaked without taking memory.
  std::unique_ptr<ConnectionPointer> connection;

  Lease() = default;
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  ~Lease();
};

// Returns a capsule with `bytes` at `data`, which the lease keeps alive.
pybind11::capsule make_capsule(std::unique_ptr<Lease> lease, void* data, std::int32_t device_type,
                               std::int32_t device_id, std::size_t bytes);

// Turns an address of the driver into a pointer.
void* pointer_to(cumempool_address address);

constexpr std::size_t kFabricBytes = CUMEMPOOL_FABRIC_HANDLE_BYTES;

// Maps memory of another process. `exported` is an open descriptor or the bytes of a fabric handle.
// The connection, if any, ends after the mapping.
pybind11::capsule open_shared(const DriverPointer& driver, int device,
                              const std::variant<int, pybind11::bytes>& exported,
                              std::uint64_t bytes, bool writable,
                              const ConnectionPointer& connection);

// Opens a descriptor of a process, which becomes readable when the process ends. It is
// close-on-exec and belongs to the caller.
int pidfd_open(int process);

}  // namespace cumempool::python
