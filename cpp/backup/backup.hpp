// The contents of one allocation while it sleeps, in pinned host memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backup/copy_queue.hpp"
#include "backup/pinned_arena.hpp"

namespace cumempool::backup {

// Bytes of an allocation, counted from its start.
struct Extent {
  std::size_t offset;
  std::size_t bytes;
};

class Backup {
 public:
  explicit Backup(PinnedArena& arena) : arena_(&arena) {}
  ~Backup();
  Backup(Backup&& other) noexcept;
  Backup& operator=(Backup&&) = delete;
  Backup(const Backup&) = delete;
  Backup& operator=(const Backup&) = delete;

  // Enqueues the copies of `extents`, in order of their offset, of the allocation at `address`. The
  // backup holds the contents once the queue was waited for; it must not be destroyed before that,
  // whether save() threw Error or not.
  void save(CopyQueue& queue, cumempool_address address, const std::vector<Extent>& extents);

  // Enqueues the copies back. The backup stays as it is.
  void restore(CopyQueue& queue, cumempool_address address) const;

  // Enqueues zeros for what it does not hold of an allocation of `bytes`; returns how many.
  std::size_t zero_rest(CopyQueue& queue, cumempool_address address, std::size_t bytes) const;

  std::uint64_t bytes() const noexcept { return bytes_; }

 private:
  struct Piece {
    std::size_t offset = 0;
    HostSpan span;
  };

  PinnedArena* arena_;
  std::vector<Piece> pieces_;
  std::uint64_t bytes_ = 0;
};

}  // namespace cumempool::backup
