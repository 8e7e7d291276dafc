// A command in a stream of the host driver, and how it moves bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "cumempool/driver.h"
#include "driver/host_memory.hpp"

namespace cumempool::driver {

// A position in a stream: all commands up to and including `sequence`.
struct HostMark {
  int device = 0;
  cumempool_stream stream = 0;
  std::uint64_t sequence = 0;
};

struct HostCommand {
  enum class Kind { kCopyToHost, kCopyToDevice, kCopyOnDevice, kFill, kDigest, kCall, kWait };
  Kind kind = Kind::kWait;
  cumempool_address address = 0;  // copies, fills: device memory; the destination if both sides are
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
  HostMark wait{};             // waits: the work to wait for
  std::uint64_t epoch = 0;     // of its submission; see HostMemory::resolve
  std::uint64_t sequence = 0;  // set by HostWork::submit
};

// Returns the access to device memory at `address` that the command needs.
cumempool_access access_to_address(const HostCommand& command);

// Whether the command uses any byte of the host range.
bool uses(const HostCommand& command, const void* pointer, std::size_t bytes);

// Lists the device ranges of a command that is about to run. Returns nothing if host memory that
// lists them is gone or lists ranges that digest() does not take.
std::optional<std::vector<cumempool_extent>> device_ranges(const HostCommand& command);

// The physical memory behind each device range of a command.
using HostOperands = std::vector<std::vector<HostSegment>>;

// Finds the memory behind the ranges, and keeps it alive. Returns nothing unless each range has
// been mapped, with the access that the device needs, since the command was submitted.
std::optional<HostOperands> find_operands(const HostMemory& memory, int device,
                                          const HostCommand& command,
                                          const std::vector<cumempool_extent>& ranges);

// Moves the bytes. Returns false if the kernel refuses, as for host memory that is gone.
bool execute(const HostCommand& command, const std::vector<cumempool_extent>& ranges,
             const HostOperands& operands);

}  // namespace cumempool::driver
