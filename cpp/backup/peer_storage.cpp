// Backup storage in the memory of a peer.
#include "backup/peer_storage.hpp"

#include <exception>

namespace cumempool::backup {

// ---- memory -------------------------------------------------------------------------------------

PeerMemory::~PeerMemory() { release_leaked(); }

PeerMemory::Piece PeerMemory::acquire(const cumempool_memory_properties& properties,
                                      std::size_t granularity, int device, std::size_t bytes) {
  const std::size_t whole = (bytes + granularity - 1) / granularity * granularity;
  Piece piece;
  piece.push_back(
      vmm::Allocation(driver_, memory_stats_, properties, whole, {properties.device, device}));
  try {
    piece.front().map();
  } catch (const std::exception&) {
    release(std::move(piece));
    throw;
  }
  return piece;
}

void PeerMemory::release(Piece&& piece) noexcept {
  if (piece.front().teardown() == CUMEMPOOL_RESULT_SUCCESS) return;
  const std::lock_guard lock(mutex_);
  leaked_.splice(leaked_.begin(), piece);
}

void PeerMemory::release_leaked() noexcept {
  std::list<vmm::Allocation> leaked;
  {
    const std::lock_guard lock(mutex_);
    leaked.swap(leaked_);
  }
  while (!leaked.empty()) {
    Piece piece;
    piece.splice(piece.begin(), leaked, leaked.begin());
    release(std::move(piece));
  }
}

// ---- storage ------------------------------------------------------------------------------------

void PeerStorage::save(Transfer& transfer, std::size_t position, cumempool_address source,
                       std::size_t bytes) {
  transfer.queue.on_device(piece_.front().address() + position, source, bytes);
}

void PeerStorage::load(Transfer& transfer, std::size_t position, cumempool_address destination,
                       std::size_t bytes) {
  transfer.queue.on_device(destination, piece_.front().address() + position, bytes);
}

BackupStorage::View PeerStorage::view(std::size_t /*position*/, std::size_t /*bytes*/,
                                      bool /*writable*/) {
  return nullptr;
}

}  // namespace cumempool::backup
