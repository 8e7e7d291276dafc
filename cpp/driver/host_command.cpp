// Runs commands of the host driver. Bytes move through the file behind the memory, not through its
// mapping, and only the kernel touches host memory. So work into memory that is gone ends in an
// error and never in a SIGSEGV.
#include "driver/host_command.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "driver/digest.hpp"

namespace cumempool::driver {
namespace {

constexpr std::size_t kPieceBytes = 256u << 10;
static_assert(kPieceBytes % kDigestTileBytes == 0, "Digester takes whole tiles");

using Segments = std::vector<HostSegment>;

// Calls transfer(done) until it has moved all bytes. Returns false if the kernel refuses.
template <typename Transfer>
bool move_all(std::size_t bytes, const Transfer& transfer) {
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t moved = transfer(done);
    if (moved > 0) {
      done += static_cast<std::size_t>(moved);
    } else if (moved == 0 || errno != EINTR) {
      return false;
    }
  }
  return true;
}

bool read_file(int file, std::size_t offset, unsigned char* to, std::size_t bytes) {
  return move_all(bytes, [&](std::size_t done) {
    return pread(file, to + done, bytes - done, static_cast<off_t>(offset + done));
  });
}

bool write_file(int file, std::size_t offset, const unsigned char* from, std::size_t bytes) {
  return move_all(bytes, [&](std::size_t done) {
    return pwrite(file, from + done, bytes - done, static_cast<off_t>(offset + done));
  });
}

// Calls part(file, offset in it, bytes done before, bytes) for each part of a range of the
// segments.
template <typename Part>
bool for_parts(const Segments& segments, std::size_t offset, std::size_t bytes, const Part& part) {
  std::size_t done = 0;
  for (const HostSegment& segment : segments) {
    if (offset >= segment.bytes) {
      offset -= segment.bytes;
      continue;
    }
    const std::size_t size = std::min(segment.bytes - offset, bytes - done);
    if (size == 0) break;
    if (!part(segment.memory->descriptor.get(), segment.offset + offset, done, size)) return false;
    done += size;
    offset = 0;
  }
  return done == bytes;
}

bool read_device(const Segments& segments, std::size_t offset, void* to, std::size_t bytes) {
  auto* const target = static_cast<unsigned char*>(to);
  return for_parts(segments, offset, bytes,
                   [&](int file, std::size_t at, std::size_t done, std::size_t size) {
                     return read_file(file, at, target + done, size);
                   });
}

bool write_device(const Segments& segments, std::size_t offset, const void* from,
                  std::size_t bytes) {
  const auto* const origin = static_cast<const unsigned char*>(from);
  return for_parts(segments, offset, bytes,
                   [&](int file, std::size_t at, std::size_t done, std::size_t size) {
                     return write_file(file, at, origin + done, size);
                   });
}

// Calls piece(offset, bytes) for each piece of the range in turn.
template <typename Piece>
bool in_pieces(std::uint64_t bytes, const Piece& piece) {
  for (std::uint64_t offset = 0; offset < bytes; offset += kPieceBytes) {
    if (!piece(offset, std::min<std::size_t>(kPieceBytes, bytes - offset))) return false;
  }
  return true;
}

// Copies between host ranges. Either may be gone; then it returns false.
bool copy_on_host(void* to, const void* from, std::size_t bytes) {
  const Descriptor file(memfd_create("cumempool-bounce", MFD_CLOEXEC));
  return file.get() >= 0 &&
         write_file(file.get(), 0, static_cast<const unsigned char*>(from), bytes) &&
         read_file(file.get(), 0, static_cast<unsigned char*>(to), bytes);
}

bool overlap(const void* first, std::size_t first_bytes, const void* second,
             std::size_t second_bytes) {
  const auto a = reinterpret_cast<std::uintptr_t>(first);
  const auto b = reinterpret_cast<std::uintptr_t>(second);
  return a < b + second_bytes && b < a + first_bytes;
}

void* writable(const void* host) { return const_cast<void*>(host); }  // NOLINT: copy_to_host's own

}  // namespace

cumempool_access access_to_address(const HostCommand& command) {
  switch (command.kind) {
    case HostCommand::Kind::kCopyToDevice:
    case HostCommand::Kind::kCopyOnDevice:
    case HostCommand::Kind::kFill:
      return CUMEMPOOL_ACCESS_READ_WRITE;
    case HostCommand::Kind::kCopyToHost:
    case HostCommand::Kind::kDigest:
    case HostCommand::Kind::kCall:
    case HostCommand::Kind::kWait:
      return CUMEMPOOL_ACCESS_READ;
  }
  return CUMEMPOOL_ACCESS_READ_WRITE;
}

bool uses(const HostCommand& command, const void* pointer, std::size_t bytes) {
  switch (command.kind) {
    case HostCommand::Kind::kCopyToHost:
    case HostCommand::Kind::kCopyToDevice:
      return overlap(command.host, command.bytes, pointer, bytes);
    case HostCommand::Kind::kDigest:
      return overlap(command.extents, command.count * sizeof(*command.extents), pointer, bytes) ||
             overlap(command.digests, command.count * sizeof(*command.digests), pointer, bytes);
    case HostCommand::Kind::kCopyOnDevice:
    case HostCommand::Kind::kFill:
    case HostCommand::Kind::kCall:
    case HostCommand::Kind::kWait:
      return false;
  }
  return false;
}

std::optional<std::vector<cumempool_extent>> device_ranges(const HostCommand& command) {
  std::vector<cumempool_extent> ranges;
  if (command.kind == HostCommand::Kind::kCall) return ranges;
  if (command.kind == HostCommand::Kind::kDigest) {
    ranges.resize(command.count);
    const bool good =
        copy_on_host(ranges.data(), command.extents, command.count * sizeof(*command.extents)) &&
        std::all_of(ranges.begin(), ranges.end(), [](const cumempool_extent& extent) {
          return digest_takes(extent.address, extent.bytes);
        });
    if (!good) return std::nullopt;
    return ranges;
  }
  ranges.push_back({command.address, command.bytes});
  if (command.kind == HostCommand::Kind::kCopyOnDevice) {
    ranges.push_back({command.source, command.bytes});
  }
  return ranges;
}

std::optional<HostOperands> find_operands(const HostMemory& memory, int device,
                                          const HostCommand& command,
                                          const std::vector<cumempool_extent>& ranges) {
  HostOperands found;
  cumempool_access access = access_to_address(command);
  for (const cumempool_extent& range : ranges) {
    found.emplace_back();
    if (!memory.resolve(range, device, access, command.epoch, &found.back())) return std::nullopt;
    access = CUMEMPOOL_ACCESS_READ;  // a command writes its first range only
  }
  return found;
}

namespace {

bool execute_digests(const HostCommand& command, const std::vector<cumempool_extent>& ranges,
                     const HostOperands& operands) {
  std::vector<std::byte> piece;
  std::vector<cumempool_digest> digests;
  digests.reserve(ranges.size());
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    Digester digester(command.seed);
    const bool all = in_pieces(ranges[i].bytes, [&](std::size_t offset, std::size_t bytes) {
      piece.resize(std::max(piece.size(), bytes));
      if (!read_device(operands[i], offset, piece.data(), bytes)) return false;
      digester.add(piece.data(), bytes);
      return true;
    });
    if (!all) return false;
    digests.push_back(digester.finish());
  }
  return copy_on_host(command.digests, digests.data(), digests.size() * sizeof(cumempool_digest));
}

}  // namespace

bool execute(const HostCommand& command, const std::vector<cumempool_extent>& ranges,
             const HostOperands& operands) {
  if (command.kind == HostCommand::Kind::kCall) {
    command.function(command.argument);
    return true;
  }
  const Segments& first = operands.front();
  switch (command.kind) {
    case HostCommand::Kind::kCopyToHost:
      return read_device(first, 0, writable(command.host), command.bytes);
    case HostCommand::Kind::kCopyToDevice:
      return write_device(first, 0, command.host, command.bytes);
    case HostCommand::Kind::kCopyOnDevice: {
      std::vector<unsigned char> piece(std::min(kPieceBytes, command.bytes));
      return in_pieces(command.bytes, [&](std::size_t offset, std::size_t bytes) {
        return read_device(operands.back(), offset, piece.data(), bytes) &&
               write_device(first, offset, piece.data(), bytes);
      });
    }
    case HostCommand::Kind::kFill: {
      const std::vector<unsigned char> piece(std::min(kPieceBytes, command.bytes), command.byte);
      return in_pieces(command.bytes, [&](std::size_t offset, std::size_t bytes) {
        return write_device(first, offset, piece.data(), bytes);
      });
    }
    case HostCommand::Kind::kDigest:
      return execute_digests(command, ranges, operands);
    case HostCommand::Kind::kCall:
    case HostCommand::Kind::kWait:
      break;
  }
  return true;
}

}  // namespace cumempool::driver
