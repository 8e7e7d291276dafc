// What the bytes of an input mean: settings of a world, then operations of four bytes each, so that
// pieces of inputs can be moved, left out and joined.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cumempool::fuzz {

enum class Kind : std::uint8_t {
  kNothing,
  kMalloc,
  kFree,
  kWrite,
  kStreamWrite,
  kSynchronize,
  kSleep,
  kWake,
  kSwap,
  kAgain,
  kWakeBegin,
  kWakingWait,
  kWakingFinish,
  kPrepare,
  kPin,
  kUnpin,
  kSetBackup,
  kSetMemory,
  kDeclare,
  kView,
  kViewWrite,
  kViewEnd,
  kExport,
  kExportEnd,
  kSharedOpen,
  kSharedWrite,
  kSharedClose,
  kReleaseHostMemory,
  kFind,
  kFail,
  kFailNothing,
  kCapture,
  kSlot,
  kClose,
  kPreserve,
  kMargin,
};

const char* name_of(Kind kind);

// What `a`, `b` and `c` mean is said where the operation is carried out.
struct Operation {
  Kind kind = Kind::kNothing;
  std::uint8_t a = 0;
  std::uint8_t b = 0;
  std::uint8_t c = 0;
};

std::string text_of(const Operation& operation);

struct Settings {
  std::uint64_t pages_per_device = 0;
  std::uint64_t host_limit_pages = 0;  // 0 = none
  bool retain_backups = false;
  bool peers_reach_each_other = true;
  enum class Overflow { kNone, kPageable, kFile } overflow = Overflow::kNone;
  bool closes_by_force = false;  // in the end
};

struct Input {
  Settings settings;
  std::vector<Operation> operations;
};

constexpr std::size_t kSettingsBytes = 4;
constexpr std::size_t kOperationBytes = 4;
constexpr std::size_t kMostOperations = 60;

// Every input has a meaning; bytes of half an operation at the end have none.
Input decode(const std::uint8_t* data, std::size_t size);

}  // namespace cumempool::fuzz
