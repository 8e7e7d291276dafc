// A backup in the memory of another device, which the sleeping memory's own device reaches
// directly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#include "backup/backup_storage.hpp"
#include "vmm/allocation.hpp"

namespace cumempool::backup {

// Memory of other devices that holds backups, and what is leaked of it. Thread-safe.
class PeerMemory {
 public:
  struct Piece {
    vmm::Allocation memory;
    std::unique_ptr<Piece> next;  // of what is leaked
  };

  explicit PeerMemory(driver::Driver driver) : driver_(driver) {}
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  // `bytes`, rounded up to `granularity`, with `properties` of the peer, and access for `device` as
  // well. Throws Error (CUMEMPOOL_OUT_OF_MEMORY).
  std::unique_ptr<Piece> acquire(const cumempool_memory_properties& properties,
                                 std::size_t granularity, int device, std::size_t bytes);
  // Never fails: what the driver refuses to take back is leaked.
  void release(std::unique_ptr<Piece> piece) noexcept;
  // Tries once more to give back what is leaked.
  void release_leaked() noexcept;

  std::uint64_t held_bytes() const noexcept { return memory_stats_.physical_bytes; }
  std::uint64_t leaked_bytes() const noexcept { return memory_stats_.leaked_bytes; }
  // Nothing is held, addresses included.
  bool empty() const noexcept { return memory_stats_.reserved_bytes == 0; }

 private:
  driver::Driver driver_;
  vmm::MemoryStats memory_stats_;
  std::mutex mutex_;
  std::unique_ptr<Piece> leaked_;  // guarded by mutex_
};

class PeerStorage : public BackupStorage {
 public:
  // As PeerMemory::acquire().
  PeerStorage(PeerMemory& memory, const cumempool_memory_properties& properties,
              std::size_t granularity, int device, std::size_t bytes)
      : memory_(memory), piece_(memory.acquire(properties, granularity, device, bytes)) {}
  ~PeerStorage() override { memory_.release(std::move(piece_)); }
  PeerStorage(const PeerStorage&) = delete;
  PeerStorage& operator=(const PeerStorage&) = delete;

  cumempool_backup_tier tier() const noexcept override { return CUMEMPOOL_BACKUP_PEER; }
  void save(Transfer& transfer, std::size_t position, cumempool_address source,
            std::size_t bytes) override;
  void load(Transfer& transfer, std::size_t position, cumempool_address destination,
            std::size_t bytes) override;
  View view(std::size_t position, std::size_t bytes, bool writable) override;

 private:
  PeerMemory& memory_;
  std::unique_ptr<PeerMemory::Piece> piece_;
};

}  // namespace cumempool::backup
