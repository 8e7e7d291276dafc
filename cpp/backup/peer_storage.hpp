// Backup storage in the memory of a peer: another device, which the device of the allocation
// reaches directly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <mutex>
#include <utility>

#include "backup/backup_storage.hpp"
#include "vmm/allocation.hpp"

namespace cumempool::backup {

// The memory of peers that holds backups, leaked memory included. Thread-safe.
class PeerMemory {
 public:
  // The memory of one backup. A list of one, so that leaking it takes no memory.
  using Piece = std::list<vmm::Allocation>;

  explicit PeerMemory(driver::Driver driver) : driver_(driver) {}
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  // Takes `bytes`, rounded up to `granularity`, of the peer that `properties` name, and gives
  // `device` access as well. Throws Error (CUMEMPOOL_OUT_OF_MEMORY).
  Piece acquire(const cumempool_memory_properties& properties, std::size_t granularity, int device,
                std::size_t bytes);
  // Gives a piece back. It is leaked if the driver refuses.
  void release(Piece&& piece) noexcept;
  // Tries once more to give back the leaked pieces.
  void release_leaked() noexcept;

  std::uint64_t held_bytes() const noexcept { return memory_stats_.physical_bytes; }
  std::uint64_t leaked_bytes() const noexcept { return memory_stats_.leaked_bytes; }
  // Whether nothing is held, not even addresses.
  bool empty() const noexcept { return memory_stats_.reserved_bytes == 0; }

 private:
  driver::Driver driver_;
  vmm::MemoryStats memory_stats_;
  std::mutex mutex_;
  std::list<vmm::Allocation> leaked_;  // guarded by mutex_
};

class PeerStorage : public BackupStorage {
 public:
  // Takes all its memory at once; throws as PeerMemory::acquire() does.
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
  PeerMemory::Piece piece_;
};

}  // namespace cumempool::backup
