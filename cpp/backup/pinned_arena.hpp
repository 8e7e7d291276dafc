// Pinned host memory for backups: blocks of mmap memory registered with the driver, handed out in
// spans and kept for the next sleep.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "driver/driver.hpp"

namespace cumempool::backup {

class PinnedBlock;

// Part of one block; never crosses a registration border, so one copy call may use all of it.
struct HostSpan {
  PinnedBlock* block = nullptr;
  std::size_t offset = 0;
  std::size_t bytes = 0;
  std::byte* data() const noexcept;
};

// Thread-safe. Registration and unregistration happen outside its lock.
class PinnedArena {
 public:
  // `limit` bytes are held at the most; 0 = no limit.
  PinnedArena(driver::Driver driver, std::uint64_t limit);
  ~PinnedArena();
  PinnedArena(const PinnedArena&) = delete;
  PinnedArena& operator=(const PinnedArena&) = delete;

  // One span of 1 to `bytes` bytes. `expected` is what the caller will still ask for in all, this
  // call included: a new block is not made larger than that. Called inside a ContextScope of
  // `device`. Throws Error (CUMEMPOOL_OUT_OF_HOST_MEMORY).
  HostSpan acquire(int device, std::size_t bytes, std::size_t expected);
  void release(const HostSpan& span) noexcept;

  // Unregisters and unmaps the blocks that hold nothing; returns their bytes. Inside a
  // ContextScope.
  std::uint64_t trim(int device) noexcept;

  std::uint64_t held_bytes() const;
  std::uint64_t used_bytes() const;

 private:
  HostSpan take_free(std::size_t bytes);
  void add_block(int device, std::size_t needed);
  std::size_t claim_room(std::size_t needed);

  driver::Driver driver_;
  const std::uint64_t limit_;
  mutable std::mutex mutex_;
  std::map<const PinnedBlock*, std::unique_ptr<PinnedBlock>> blocks_;
  std::map<std::uint64_t, PinnedBlock*> with_room_;  // by order of creation
  std::uint64_t created_ = 0;
  std::uint64_t held_bytes_ = 0;
  std::uint64_t used_bytes_ = 0;
};

}  // namespace cumempool::backup
