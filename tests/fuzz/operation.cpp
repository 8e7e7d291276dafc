// Decodes the bytes of an input.
#include "operation.hpp"

#include <algorithm>
#include <array>

namespace cumempool::fuzz {
namespace {

// By the first byte modulo the length. What brings a world forward is there more than once. New
// kinds take the places of kNothing, so that kept inputs keep their meaning.
constexpr std::array<Kind, 64> kKinds = {
    Kind::kMalloc,       Kind::kMalloc,      Kind::kMalloc,
    Kind::kMalloc,       Kind::kFree,        Kind::kFree,
    Kind::kWrite,        Kind::kWrite,       Kind::kStreamWrite,
    Kind::kSynchronize,  Kind::kSleep,       Kind::kSleep,
    Kind::kSleep,        Kind::kSleep,       Kind::kWake,
    Kind::kWake,         Kind::kWake,        Kind::kSwap,
    Kind::kSwap,         Kind::kAgain,       Kind::kWakeBegin,
    Kind::kWakeBegin,    Kind::kWakingWait,  Kind::kWakingWait,
    Kind::kWakingFinish, Kind::kPrepare,     Kind::kPin,
    Kind::kUnpin,        Kind::kSetBackup,   Kind::kSetBackup,
    Kind::kSetMemory,    Kind::kDeclare,     Kind::kView,
    Kind::kView,         Kind::kViewWrite,   Kind::kViewEnd,
    Kind::kExport,       Kind::kExportEnd,   Kind::kSharedOpen,
    Kind::kSharedWrite,  Kind::kSharedClose, Kind::kFind,
    Kind::kFail,         Kind::kFail,        Kind::kFail,
    Kind::kFail,         Kind::kFailNothing, Kind::kCapture,
    Kind::kSlot,         Kind::kClose,       Kind::kReleaseHostMemory,
    Kind::kPreserve,     Kind::kMargin,
};

constexpr std::array<const char*, 36> kNames = {
    "nothing",       "malloc",       "free",         "write",
    "stream write",  "synchronize",  "sleep",        "wake",
    "swap",          "again",        "wake begin",   "waking wait",
    "waking finish", "prepare",      "pin",          "unpin",
    "set backup",    "set memory",   "declare",      "view",
    "view write",    "view end",     "export",       "export end",
    "shared open",   "shared write", "shared close", "release host memory",
    "find",          "fail",         "fail nothing", "capture",
    "slot",          "close",        "preserve",     "margin",
};
static_assert(kNames.size() == static_cast<std::size_t>(Kind::kMargin) + 1, "one name per kind");

Settings settings_of(const std::uint8_t* bytes) {
  constexpr std::array<std::uint64_t, 4> kPages = {48, 24, 12, 64};
  constexpr std::array<std::uint64_t, 4> kLimits = {0, 0, 24, 6};
  Settings settings;
  settings.pages_per_device = kPages.at(bytes[0] & 3U);
  settings.host_limit_pages = kLimits.at(bytes[1] & 3U);
  settings.overflow = static_cast<Settings::Overflow>((bytes[1] >> 2U) % 3);
  settings.retain_backups = (bytes[2] & 1U) != 0;
  settings.peers_reach_each_other = (bytes[2] & 0x0EU) != 0x0EU;
  settings.closes_by_force = (bytes[3] & 1U) != 0;
  return settings;
}

}  // namespace

const char* name_of(Kind kind) { return kNames.at(static_cast<std::size_t>(kind)); }

std::string text_of(const Operation& operation) {
  return std::string(name_of(operation.kind)) + " " + std::to_string(operation.a) + " " +
         std::to_string(operation.b) + " " + std::to_string(operation.c);
}

Input decode(const std::uint8_t* data, std::size_t size) {
  Input input;
  std::array<std::uint8_t, kSettingsBytes> first{};
  std::copy_n(data, std::min(size, first.size()), first.begin());
  input.settings = settings_of(first.data());
  for (std::size_t at = kSettingsBytes; at + kOperationBytes <= size; at += kOperationBytes) {
    if (input.operations.size() == kMostOperations) break;
    input.operations.push_back(
        {kKinds.at(data[at] % kKinds.size()), data[at + 1], data[at + 2], data[at + 3]});
  }
  return input;
}

}  // namespace cumempool::fuzz
