// Memory that Python gets in DLPack capsules, and what it keeps alive: device memory, views of
// backups, and memory of other processes with the connections to its owners.
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

// The connection to the owner of shared memory: until it says that the memory was released, the
// owner keeps that awake. The memory that came over it shares this object, and the last of it says
// so, and ends the connection, for processes forked meanwhile as well; what such a process drops
// itself ends nothing. The owner has it in its socket before the destructor returns.
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

// One user of a connection. In memory of its own, so that it can be kept without taking any.
struct HeldConnection {
  ConnectionPointer connection;
  HeldConnection* next = nullptr;  // of those that are kept
};

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
  std::unique_ptr<HeldConnection> connection;  // ends after the mapping

  Lease() = default;
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  ~Lease();
};

// A capsule with `bytes` at `data`, which the lease keeps.
pybind11::capsule make_capsule(std::unique_ptr<Lease> lease, void* data, DlDevice device,
                               std::size_t bytes);

// Integer to pointer: the address is the driver's.
void* pointer_to(cumempool_address address);

constexpr std::size_t kFabricBytes = CUMEMPOOL_FABRIC_HANDLE_BYTES;

// Maps memory of another process. `exported` is an open descriptor, or the bytes of a fabric
// handle. The connection, where there is one, ends after the mapping.
pybind11::capsule open_shared(const DriverPointer& driver, int device,
                              const std::variant<int, pybind11::bytes>& exported,
                              std::uint64_t bytes, bool writable,
                              const ConnectionPointer& connection);

// A descriptor of a process, which becomes readable when the process ends. Close-on-exec, and the
// caller's.
int pidfd_open(int process);

}  // namespace cumempool::python
