// Limits on host memory for backups.
#include "backup/host_limits.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>
#include <limits>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

namespace cumempool::backup {
namespace {

// ---- files --------------------------------------------------------------------------------------

std::string read_file(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return {};
  std::array<char, 4096> buffer{};
  std::string text;
  try {
    for (ssize_t got = 0; (got = read(file, buffer.data(), buffer.size())) > 0;) {
      text.append(buffer.data(), static_cast<std::size_t>(got));
    }
  } catch (const std::exception&) {
    close(file);
    throw;
  }
  close(file);
  return text;
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find(separator), text.size());
    if (end != 0) parts.push_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return parts;
}

// Returns the number at the start of the text; none for "max" and for an empty text.
std::optional<std::uint64_t> number_in(const std::string& text) {
  if (text.empty() || text.front() < '0' || text.front() > '9') return std::nullopt;
  return std::strtoull(text.c_str(), nullptr, 10);
}

// Returns the value of a line "name value" or "name: value kB"; none if there is no such line.
std::optional<std::uint64_t> value_of(const std::string& text, std::string_view name) {
  for (const std::string_view line : split(text, '\n')) {
    if (line.substr(0, name.size()) != name) continue;
    const std::string_view rest = line.substr(name.size());
    const std::size_t begin = rest.find_first_not_of(": ");
    if (begin == 0 || begin == std::string_view::npos) continue;  // a longer name
    return number_in(std::string(rest.substr(begin)));
  }
  return std::nullopt;
}

// ---- control groups -----------------------------------------------------------------------------

// Reclaimable memory by the names of memory.stat, in the two versions of control groups. The first
// version needs the names that include the groups below.
constexpr std::array<const char*, 2> kReclaimableV1{"total_active_file", "total_inactive_file"};
constexpr std::array<const char*, 3> kReclaimableV2{"active_file", "inactive_file",
                                                    "slab_reclaimable"};

// The first version writes "no limit" as the largest number of pages.
constexpr std::uint64_t kNoLimit = std::uint64_t{1} << 62;

// A mounted hierarchy of control groups.
struct Mount {
  bool second = false;  // of the second version
  std::string root;     // the group at its top
  std::string point;    // the path where it is mounted
};

// Decodes a path of mountinfo: a space is \040.
std::string unescape(std::string_view text) {
  std::string plain;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && i + 3 < text.size()) {
      plain += static_cast<char>(std::stoi(std::string(text.substr(i + 1, 3)), nullptr, 8));
      i += 3;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

bool lists(std::string_view commas, std::string_view word) {
  const auto words = split(commas, ',');
  return std::find(words.begin(), words.end(), word) != words.end();
}

// Returns the mounts that have the memory controller, or may have it.
std::vector<Mount> mounts_in(const std::string& mountinfo) {
  std::vector<Mount> mounts;
  for (const std::string_view line : split(mountinfo, '\n')) {
    const std::size_t dash = line.find(" - ");
    if (dash == std::string_view::npos) continue;
    const auto before = split(line.substr(0, dash), ' ');
    const auto after = split(line.substr(dash + 3), ' ');
    if (before.size() < 5 || after.empty()) continue;
    const bool second = after[0] == "cgroup2";
    const bool first = after[0] == "cgroup" && lists(after.back(), "memory");
    if (first || second) mounts.push_back({second, unescape(before[3]), unescape(before[4])});
  }
  return mounts;
}

// Returns the group of the process in the hierarchy of one version; none if it is in none.
std::optional<std::string> group_in(const std::string& groups, bool second) {
  for (const std::string_view line : split(groups, '\n')) {
    const std::size_t first_colon = line.find(':');
    const std::size_t last_colon = line.find(':', first_colon + 1);
    if (first_colon == std::string_view::npos || last_colon == std::string_view::npos) continue;
    const std::string_view controllers = line.substr(first_colon + 1, last_colon - first_colon - 1);
    if (second ? controllers.empty() : lists(controllers, "memory")) {
      return std::string(line.substr(last_colon + 1));
    }
  }
  return std::nullopt;
}

// Returns the path of the group below a mount; groups above its top cannot be seen from here. A
// process in a group outside the mount is measured against the top.
std::string below(const Mount& mount, const std::string& group) {
  const std::string top = mount.root == "/" ? "" : mount.root;
  const bool inside = group.compare(0, top.size(), top) == 0 &&
                      (group.size() == top.size() || group[top.size()] == '/' || top.empty()) &&
                      group.find("/..") == std::string::npos;
  std::string path = inside ? group.substr(top.size()) : "";
  while (!path.empty() && path.back() == '/') path.pop_back();
  return path;
}

void keep_least(HostRoom& least, HostRoom&& one) {
  if (one.bytes < least.bytes) least = std::move(one);
}

// Reads the room under the limit of one group, if it has one.
void read_group(const std::string& root, const std::string& folder, bool second, HostRoom& least) {
  const std::string source = folder + (second ? "/memory.max" : "/memory.limit_in_bytes");
  const auto limit = number_in(read_file(root + source));
  if (!limit || *limit >= kNoLimit) return;
  const auto usage =
      number_in(read_file(root + folder + (second ? "/memory.current" : "/memory.usage_in_bytes")));
  if (!usage) return;
  std::uint64_t used = *usage;
  const std::string statistics = read_file(root + folder + "/memory.stat");
  const auto reclaim = [&](const char* name) {
    used -= std::min(used, value_of(statistics, name).value_or(0));
  };
  if (second) {
    std::for_each(kReclaimableV2.begin(), kReclaimableV2.end(), reclaim);
  } else {
    std::for_each(kReclaimableV1.begin(), kReclaimableV1.end(), reclaim);
  }
  keep_least(least, {*limit - std::min(*limit, used), *limit, source});
}

void read_groups(const std::string& root, HostRoom& least) {
  const std::string groups = read_file(root + "/proc/self/cgroup");
  for (const Mount& mount : mounts_in(read_file(root + "/proc/self/mountinfo"))) {
    const auto group = group_in(groups, mount.second);
    if (!group) continue;
    std::string path = below(mount, *group);
    while (true) {
      read_group(root, mount.point + path, mount.second, least);
      if (path.empty()) break;
      path.resize(path.rfind('/'));
    }
  }
}

void read_machine(const std::string& root, HostRoom& least) {
  const std::string text = read_file(root + "/proc/meminfo");
  const auto available = value_of(text, "MemAvailable");
  if (!available) return;
  keep_least(least,
             {*available * 1024, value_of(text, "MemTotal").value_or(0) * 1024, "/proc/meminfo"});
}

std::mutex root_mutex;

std::string& chosen_root() {
  static auto& root = *new std::string;  // never destroyed: callers may outlive static objects
  return root;
}

}  // namespace

std::uint64_t HostRoom::for_backups() const noexcept {
  if (bytes == kUnknown) return bytes;
  const std::uint64_t kept = limit / 64;
  return (bytes - std::min(bytes, kept)) / 64 * 63;
}

Error HostRoom::refusal(std::uint64_t needed) const {
  Error error(CUMEMPOOL_OUT_OF_HOST_MEMORY, "the backup needs " + format_bytes(needed) +
                                                " more of host memory; " + format_bytes(bytes) +
                                                " are left of the " + format_bytes(limit) + " of " +
                                                source + ", and some of them must stay free");
  error.bytes = needed;
  error.advice =
      "raise that limit or free host memory, set host_backup_overflow to a file, or discard tags "
      "instead of backing them up";
  return error;
}

HostRoom host_room(const std::string& root) {
  HostRoom least;
  read_machine(root, least);
  read_groups(root, least);
  return least;
}

HostRoom host_room() {
  std::string root;
  {
    const std::lock_guard lock(root_mutex);
    root = chosen_root();
  }
  return host_room(root);
}

void set_host_root(const std::string& root) {
  const std::lock_guard lock(root_mutex);
  chosen_root() = root;
}

std::uint64_t HostBudget::room_locked() const {
  if (refused_) return 0;
  if (limit_ == 0) return std::numeric_limits<std::uint64_t>::max();
  return limit_ - std::min(limit_, claimed_);
}

std::uint64_t HostBudget::claimed() const {
  const std::lock_guard lock(mutex_);
  return claimed_;
}

std::uint64_t HostBudget::room() const {
  const std::lock_guard lock(mutex_);
  return room_locked();
}

bool HostBudget::claim(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  if (bytes > room_locked()) return false;
  claimed_ += bytes;
  return true;
}

void HostBudget::unclaim(std::size_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  claimed_ -= bytes;
}

void HostBudget::refuse() noexcept {
  const std::lock_guard lock(mutex_);
  refused_ = true;
}

void HostBudget::allow() noexcept {
  const std::lock_guard lock(mutex_);
  refused_ = false;
}

Error HostBudget::refusal(std::uint64_t bytes) const {
  const bool by_driver = [this] {
    const std::lock_guard lock(mutex_);
    return refused_;
  }();
  if (by_driver) {
    Error error(
        CUMEMPOOL_OUT_OF_HOST_MEMORY,
        "the backup needs " + format_bytes(bytes) +
            " more of pinned host memory, but the driver has refused to pin more than the " +
            format_bytes(claimed()) + " that are held");
    error.bytes = bytes;
    error.advice =
        "raise the limit on locked memory (ulimit -l) and call release_host_memory(), or give "
        "host_backup_overflow more room";
    return error;
  }
  Error error(CUMEMPOOL_OUT_OF_HOST_MEMORY,
              "the backup needs " + format_bytes(bytes) + " more of pinned host memory; " +
                  format_bytes(claimed()) + " are held and the limit is " + format_bytes(limit()));
  error.bytes = bytes;
  error.advice =
      "raise host_backup_limit, set host_backup_overflow, or discard tags instead of backing them "
      "up";
  return error;
}

}  // namespace cumempool::backup
