// Files of /proc and /sys as host_room() reads them, below a directory of their own.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

#include "backup/host_limits.hpp"
#include "temporary_directory.hpp"

namespace cumempool::tests {

class HostRoot {
 public:
  const std::string& path() const { return directory_.path(); }

  void write(const std::string& file, const std::string& text) const {
    const std::filesystem::path target = path() + file;
    std::filesystem::create_directories(target.parent_path());
    std::ofstream(target) << text;
  }
  void machine(std::uint64_t total, std::uint64_t available) const {
    write("/proc/meminfo", "MemTotal:       " + std::to_string(total / 1024) +
                               " kB\nMemFree:               1 kB\nMemAvailable:   " +
                               std::to_string(available / 1024) + " kB\n");
  }
  void process(const std::string& groups, const std::string& mounts) const {
    write("/proc/self/cgroup", groups);
    write("/proc/self/mountinfo", mounts);
  }
  void first_version(const std::string& folder, std::uint64_t limit, std::uint64_t usage) const {
    write(folder + "/memory.limit_in_bytes", std::to_string(limit) + "\n");
    write(folder + "/memory.usage_in_bytes", std::to_string(usage) + "\n");
  }

 private:
  TemporaryDirectory directory_;
};

// The library believes in it, and `room` is what backups may take.
class SmallHost {
 public:
  explicit SmallHost(std::uint64_t room) {
    leave(room);
    backup::set_host_root(root_.path());
  }
  ~SmallHost() { backup::set_host_root(""); }
  SmallHost(const SmallHost&) = delete;
  SmallHost(SmallHost&&) = delete;
  SmallHost& operator=(const SmallHost&) = delete;
  SmallHost& operator=(SmallHost&&) = delete;

  void leave(std::uint64_t room) const {
    // A total of nothing keeps nothing back, but for a part of the room.
    root_.machine(0, room / 63 * 64 + (std::uint64_t{8} << 10));
  }

 private:
  HostRoot root_;
};

}  // namespace cumempool::tests
