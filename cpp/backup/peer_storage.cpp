// A backup in the memory of another device, which the sleeping memory's own device reaches
// directly.
#include "backup/peer_storage.hpp"

#include <exception>

namespace cumempool::backup {

// ---- memory -------------------------------------------------------------------------------------

PeerMemory::~PeerMemory() { release_leaked(); }

std::unique_ptr<PeerMemory::Piece> PeerMemory::acquire(
    const cumempool_memory_properties& properties, std::size_t granularity, int device,
    std::size_t bytes) {
  const std::size_t whole = (bytes + granularity - 1) / granularity * granularity;
  auto piece = std::make_unique<Piece>(Piece{
      vmm::Allocation(driver_, memory_stats_, properties, whole, {properties.device, device}), {}});
  try {
    piece->memory.map();
  } catch (const std::exception&) {
    release(std::move(piece));
    throw;
  }
  return piece;
}

void PeerMemory::release(std::unique_ptr<Piece> piece) noexcept {
  if (piece->memory.teardown() == CUMEMPOOL_RESULT_SUCCESS) return;
  const std::lock_guard lock(mutex_);
  piece->next = std::move(leaked_);
  leaked_ = std::move(piece);
}

void PeerMemory::release_leaked() noexcept {
  std::unique_ptr<Piece> left;
  {
    const std::lock_guard lock(mutex_);
    left.swap(leaked_);
  }
  while (left != nullptr) {
    std::unique_ptr<Piece> next = std::move(left->next);
    release(std::move(left));
    left = std::move(next);
  }
}

// ---- storage
// -------------------------------------------------------------------------------------

void PeerStorage::save(Transfer& transfer, std::size_t position, cumempool_address source,
                       std::size_t bytes) {
  transfer.queue.on_device(piece_->memory.address() + position, source, bytes);
}

void PeerStorage::load(Transfer& transfer, std::size_t position, cumempool_address destination,
                       std::size_t bytes) {
  transfer.queue.on_device(destination, piece_->memory.address() + position, bytes);
}

BackupStorage::View PeerStorage::view(std::size_t /*position*/, std::size_t /*bytes*/,
                                      bool /*writable*/) {
  return nullptr;
}

}  // namespace cumempool::backup
