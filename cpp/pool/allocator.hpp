// An allocator: tags, devices, live records and pinned host memory over one driver. Transitions
// (sleep.hpp, wake.hpp) work on it from outside.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backup/pinned_arena.hpp"
#include "cumempool/cumempool.h"
#include "driver/driver.hpp"
#include "pool/device.hpp"
#include "pool/record_set.hpp"
#include "pool/tag.hpp"
#include "pool/turnstile.hpp"
#include "vmm/ledger.hpp"

namespace cumempool::pool {

struct Counters {
  std::atomic<std::uint64_t> malloc_calls{0};
  std::atomic<std::uint64_t> malloc_failures{0};
  std::atomic<std::uint64_t> free_calls{0};
  std::atomic<std::uint64_t> sleeps{0};
  std::atomic<std::uint64_t> wakes{0};
  std::atomic<std::uint64_t> failed_transitions{0};
  std::atomic<std::uint64_t> bound_slots{0};
};

// Shared: every live record keeps its allocator alive, so that torch may free whenever it likes.
class Allocator : public std::enable_shared_from_this<Allocator> {
 public:
  Allocator(driver::Driver driver, const cumempool_allocator_options& options);
  ~Allocator();
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  // The address of `bytes` of device memory under `tag`, which may be at most 2^62. Throws Error;
  // then nothing is held.
  cumempool_address malloc(const Tag& tag, int device, std::size_t bytes);

  // What the registry found at an address that the program frees. Never fails: what the driver does
  // not take back now is kept and tried again.
  void free(const RecordPointer& record) noexcept;

  // See cumempool_allocator_close.
  void close(bool force);
  bool closed() const noexcept { return closed_; }
  // Throws Error (CUMEMPOOL_CLOSED).
  void check_open(const char* operation) const;

  // Unregisters and unmaps pinned memory that holds no backup; returns its bytes.
  std::uint64_t release_host_memory();

  // Tears down what transitions hand back and what earlier attempts left over.
  void bury(std::vector<RecordPointer> records) noexcept;
  std::uint64_t pending_free_bytes() const;

  void note_malloc_failure(const std::string& why) noexcept;
  std::string last_malloc_failure() const;

  driver::Driver driver() const noexcept { return driver_; }
  TagTable& tags() noexcept { return tags_; }
  DeviceTable& devices() noexcept { return devices_; }
  RecordSet& records() noexcept { return records_; }
  Turnstile& turnstile() noexcept { return turnstile_; }
  backup::PinnedArena& arena() noexcept { return arena_; }
  const vmm::Ledger& ledger() const noexcept { return ledger_; }
  Counters& counters() noexcept { return counters_; }

 private:
  std::size_t round_up(const Device& device, std::size_t bytes) const;
  bool tear_down(Record& record) noexcept;
  void refuse_close_in_use();
  void publish(const RecordPointer& record);
  std::vector<std::string> give_everything_back();
  void vacate(Record& record);
  std::uint64_t trim_arena();

  driver::Driver driver_;
  vmm::Ledger ledger_;
  Counters counters_;
  TagTable tags_;
  DeviceTable devices_;
  backup::PinnedArena arena_;
  RecordSet records_;
  Turnstile turnstile_;
  std::atomic<bool> closed_{false};

  mutable std::mutex aside_mutex_;  // guards the two below
  std::vector<RecordPointer> graveyard_;
  std::string last_malloc_failure_;
};

// Adds what an error from below does not know: the operation, and the tag and device of a record.
void annotate(Error& error, const char* operation, const Record* record);

}  // namespace cumempool::pool
