// A command queued on a stream of the host driver, and how it moves bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cumempool/driver.h"
#include "driver/host_memory.hpp"

namespace cumempool::driver {

// A place in a stream: its commands up to and including `sequence`.
struct HostMark {
  int device = 0;
  cumempool_stream stream = 0;
  std::uint64_t sequence = 0;
};

struct HostCommand {
  enum class Kind { kCopyToHost, kCopyToDevice, kCopyOnDevice, kFill, kDigest, kCall, kWait };
  Kind kind = Kind::kWait;
  cumempool_address address = 0;  // copies, fills: device memory; the destination where both are
  std::size_t bytes = 0;
  const void* host = nullptr;                 // copies from and to the host
  cumempool_address source = 0;               // copies on the device
  std::uint8_t byte = 0;                      // fills
  const cumempool_extent* extents = nullptr;  // digests
  std::size_t count = 0;
  cumempool_digest* digests = nullptr;
  std::uint64_t seed = 0;
  void (*function)(void*) = nullptr;  // calls
  void* argument = nullptr;
  HostMark wait{};             // waits: what goes first
  std::uint64_t epoch = 0;     // the mappings that it was submitted for; HostMemory::resolve
  std::uint64_t sequence = 0;  // set by HostWork::submit
};

// What the command does with device memory at `address`.
cumempool_access access_to_address(const HostCommand& command);

// Whether the command uses any byte of the host range.
bool uses(const HostCommand& command, const void* pointer, std::size_t bytes);

// The device memory of one command, looked up when it runs.
class HostOperands {
 public:
  // Says false where host memory that says what is meant is gone, or makes no sense.
  bool read(const HostCommand& command);
  // Whether all of it is mapped with the access that the device needs since the command was
  // submitted. Keeps the memory behind it.
  bool resolve(const HostMemory& memory, int device, const HostCommand& command);
  // Moves the bytes; false where the kernel refuses, as for host memory that is gone.
  bool execute(const HostCommand& command) const;

 private:
  using Segments = std::vector<HostSegment>;

  bool execute_digests(const HostCommand& command) const;

  std::vector<cumempool_extent> extents_;
  std::vector<Segments> segments_;  // per extent
};

}  // namespace cumempool::driver
