// What a program has beside the library: simulated devices whose driver calls can fail, streams of
// its own with work in flight, and a directory for files.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "cumempool/cumempool.h"
#include "driver/host_driver.hpp"
#include "fault_driver.hpp"

namespace cumempool::fuzz {

constexpr std::size_t kPage = 4096;  // the granularity
constexpr int kDevices = 3;

inline std::uint8_t* bytes_at(cumempool_address address) {
  return reinterpret_cast<std::uint8_t*>(static_cast<std::uintptr_t>(address));  // NOLINT
}

class Machine {
 public:
  Machine(std::uint64_t pages_per_device, bool peers_reach_each_other);
  // Gives back what is the program's, and holds the driver to having nothing left.
  ~Machine();
  // Leaked memory of a share may be left.
  void expect_leaks() noexcept { leaks_ = true; }
  Machine(const Machine&) = delete;
  Machine(Machine&&) = delete;
  Machine& operator=(const Machine&) = delete;
  Machine& operator=(Machine&&) = delete;

  // For the library: calls fail as `faults` says.
  const cumempool_driver& table() const noexcept { return faults_.table(); }
  driver::FaultDriver& faults() noexcept { return faults_; }
  driver::HostDriverCounters counters() const { return driver::host_driver_counters(host_); }
  std::uint64_t free_bytes(int device) const;

  // Work of the program, which runs when somebody waits for it. False where the stream is being
  // captured.
  bool fill(int device, cumempool_address address, std::size_t bytes, std::uint8_t value);
  // Waits for all of it. A finding where the device has lost its context: work ran into memory that
  // was gone.
  void synchronize();
  cumempool_device_stream stream(int device) const;
  void set_capturing(int device, bool capturing);
  bool capturing(int device) const { return capturing_.at(static_cast<std::size_t>(device)); }

 private:
  template <typename Call>
  cumempool_result inside(int device, const Call& call) const;

  const cumempool_driver* host_;
  driver::FaultDriver faults_;
  std::array<cumempool_stream, kDevices> streams_{};
  std::array<bool, kDevices> capturing_{};
  bool leaks_ = false;
};

// One for the process, gone at its end.
const std::string& file_directory();
std::size_t open_descriptors();

// No file of the process can reach past `bytes`, as on a full disk, for as long as it lives.
class FullDisk {
 public:
  explicit FullDisk(std::uint64_t bytes);
  ~FullDisk();
  FullDisk(const FullDisk&) = delete;
  FullDisk(FullDisk&&) = delete;
  FullDisk& operator=(const FullDisk&) = delete;
  FullDisk& operator=(FullDisk&&) = delete;

 private:
  std::uint64_t before_;
};

}  // namespace cumempool::fuzz
