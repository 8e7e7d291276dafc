// An allocator: tags, devices, live records and the stores of backups over one driver, and the lock
// that admits one transition at a time. Transitions (transitions.hpp) work on it from outside.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "backup/backup.hpp"
#include "backup/stores.hpp"
#include "cumempool/cumempool.h"
#include "driver/driver.hpp"
#include "pool/device.hpp"
#include "pool/reaper.hpp"
#include "pool/records.hpp"
#include "vmm/backing.hpp"

namespace cumempool::pool {

// ---- one transition at a time -------------------------------------------------------------------

// Hands out turns. Holds no mutex during a turn.
class TransitionLock {
 public:
  // The right to run a transition, which ends with the object.
  using Turn = std::unique_lock<TransitionLock>;

  // Waits for the transition of another thread. Throws Error (CUMEMPOOL_BUSY) if the calling thread
  // is inside one itself.
  Turn enter(const char* operation);
  // Does not wait: returns a Turn that owns nothing if there is a transition.
  Turn try_enter(const char* operation) noexcept;
  // For Turn.
  void unlock() noexcept;

  // Throws Error (CUMEMPOOL_BUSY) if the calling thread is inside a transition.
  void refuse_inside(const char* operation) const;

 private:
  void refuse_locked(const char* operation) const;
  void begin(const char* operation) noexcept;

  mutable std::mutex mutex_;
  std::condition_variable free_;
  std::thread::id owner_;
  const char* operation_ = nullptr;  // null if there is no transition
};

// ---- the allocator ------------------------------------------------------------------------------

struct Counters {
  std::atomic<std::uint64_t> malloc_calls{0};
  std::atomic<std::uint64_t> malloc_failures{0};
  std::atomic<std::uint64_t> free_calls{0};
  std::atomic<std::uint64_t> sleeps{0};
  std::atomic<std::uint64_t> wakes{0};
  std::atomic<std::uint64_t> swaps{0};
  std::atomic<std::uint64_t> failed_transitions{0};
  std::atomic<std::uint64_t> bound_slots{0};
  std::atomic<std::uint64_t> open_views{0};  // of backups
  // The progress of the transition under way, in bytes of the allocations that it copies.
  std::atomic<std::uint64_t> copied_bytes{0};
  std::atomic<std::uint64_t> bytes_to_copy{0};
};

// Every live record keeps its allocator alive, so that torch may free at any time.
class Allocator : public std::enable_shared_from_this<Allocator> {
 public:
  Allocator(driver::Driver driver, const cumempool_allocator_options& options);
  ~Allocator();
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  // Allocates `bytes`, at most 2^62, of device memory under `tag`; returns the address. If it
  // throws Error, nothing is held.
  cumempool_address malloc(const Tag& tag, int device, std::size_t bytes, bool preserved = false);

  // Makes malloc() leave this much of a device's memory free, or fail; 0 lets it take all.
  void set_memory_margin(std::uint64_t bytes) noexcept { memory_margin_ = bytes; }

  // Keeps the contents of the allocation that contains the address when its tag is discarded.
  // Throws Error (CUMEMPOOL_NOT_OWNED).
  void preserve(cumempool_address address);

  // Sets the backing and the peers of a tag's later memory. Throws Error: CUMEMPOOL_IN_USE while
  // the tag has memory made otherwise, since all memory of a tag is alike (R8);
  // CUMEMPOOL_INVALID_ARGUMENT for a peer that does not exist, CUMEMPOOL_UNSUPPORTED for one that
  // reaches no other device.
  void set_memory(Tag& tag, const MemoryChoice& choice);

  // Gives devices whose context has become active access to awake memory of all tags without a
  // choice of peers. If a transition is under way, leaves that to a later call; the second function
  // is for the transition itself.
  void follow_use() noexcept;
  void follow_use_inside() noexcept;
  // Does the same for one record, which the caller may map.
  void follow_use(Record& record, const std::vector<int>& in_use) noexcept;
  // The devices whose context is active; empty if there is only one device, which needs no list.
  // Access for devices that are not in use would cost milliseconds per mapping.
  std::vector<int> devices_in_use() const noexcept;

  // Frees a record that the registry has found. Never fails, and waits for a busy device for a
  // moment only; see Reaper.
  void free(const RecordPointer& record) noexcept;
  void set_free_wait(Reaper::Duration wait) noexcept { reaper_->set_free_wait(wait); }

  // Runs `take`. If the device has no room for it, waits for freed memory to come back and runs it
  // once more.
  template <typename Take>
  auto with_freed_memory(const Take& take) {
    if (pending_free_bytes() != 0) {
      try {
        return take();
      } catch (const Error& error) {
        if (error.status != CUMEMPOOL_OUT_OF_MEMORY) throw;
      }
      reaper_->drain();
    }
    return take();
  }

  // See cumempool_allocator_close.
  void close(bool force);
  bool closed() const noexcept { return closed_; }
  // Throws Error (CUMEMPOOL_CLOSED).
  void check_open(const char* operation) const;

  // Gives back host memory that sleeping memory does not need; returns its bytes.
  std::uint64_t release_host_memory();

  // Drops retained backups of awake memory until `bytes` of host memory are free, or none is left;
  // returns whether any went. For the transition under way, whose claimed records keep theirs.
  bool drop_retained(std::uint64_t bytes);

  // Leaks a backup that copies of `device` may still use: it stays until the device could be waited
  // for (R5), which release_host_memory() and close() try.
  void leak(const std::shared_ptr<backup::Backup>& backup, int device) noexcept;

  // Ends the claims of a transition, and tears down the records that were freed meanwhile.
  void unclaim(const std::vector<RecordPointer>& claimed) noexcept;
  std::uint64_t pending_free_bytes() const noexcept { return reaper_->bytes(); }

  void note_malloc_failure(const std::string& why) noexcept;
  std::string last_malloc_failure() const;

  driver::Driver driver() const noexcept { return driver_; }
  TagTable& tags() noexcept { return tags_; }
  DeviceTable& devices() noexcept { return devices_; }
  RecordSet& records() noexcept { return records_; }
  TransitionLock& transition_lock() noexcept { return transition_lock_; }
  backup::Stores& stores() noexcept { return stores_; }
  // Whether backups are retained while awake, so that the next sleep copies only changes.
  bool retains_backups() const noexcept { return retains_backups_; }
  // The tier for backups that do not fit under the limit on pinned memory, if there is one.
  const std::optional<BackupChoice>& overflow() const noexcept { return overflow_; }
  // The seed of digests, which only this process knows.
  std::uint64_t digest_seed() const noexcept { return digest_seed_; }
  void reset_peaks() noexcept { memory_stats_.reset_peaks(); }
  const vmm::MemoryStats& memory_stats() const noexcept { return memory_stats_; }
  Counters& counters() noexcept { return counters_; }

 private:
  std::size_t round_up(const Device& device, std::size_t bytes) const;
  void refuse_below_margin(const Device& device, std::size_t bytes) const;
  vmm::Allocation make_memory(const MemoryChoice& choice, const Device& on, std::size_t bytes);
  void check_peers(const MemoryChoice& choice) const;
  std::vector<int> users_of(const MemoryChoice& choice, int device) const;
  void follow_use_since(const std::vector<int>& seen) noexcept;
  void refuse_close_in_use();
  bool publish(const RecordPointer& record, const MemoryChoice& made_of,
               const std::vector<int>& in_use);
  std::vector<std::string> give_everything_back();
  void vacate(Record& record);
  std::uint64_t trim_stores();
  void release_leaked() noexcept;
  void release_backups_of(int device) noexcept;
  bool holds_nothing() const;
  bool context_needed();

  driver::Driver driver_;
  const std::shared_ptr<Reaper> reaper_;
  const bool retains_backups_;
  const std::optional<BackupChoice> overflow_;
  const std::uint64_t digest_seed_;
  vmm::MemoryStats memory_stats_;
  Counters counters_;
  TagTable tags_;
  DeviceTable devices_;
  backup::Stores stores_;
  RecordSet records_;
  TransitionLock transition_lock_;
  std::atomic<bool> closed_{false};
  std::atomic<std::uint64_t> memory_margin_{0};
  bool one_device_ = true;

  mutable std::mutex aside_mutex_;          // guards the three below
  std::vector<int> followed_;               // the devices in use that have got access
  std::shared_ptr<backup::Backup> leaked_;  // the first of a list
  std::string last_malloc_failure_;
};

// Adds to an error what lower layers do not know: the operation, and the tag and device of a
// record.
void annotate(Error& error, const char* operation, const Record* record);

// Returns the annotated message of a caught exception, for calls that must not fail. If there is no
// memory for it, the message is "out of memory".
std::string failure_text(const std::exception& caught, const char* operation,
                         const Record* record) noexcept;
// Adds a message to the later failures of an error, if there is memory for it.
void add_secondary(Error& failure, std::string&& text, const char* before = "") noexcept;

}  // namespace cumempool::pool
