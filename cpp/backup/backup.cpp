// The contents of one allocation while it sleeps, in pinned host memory.
#include "backup/backup.hpp"

#include <algorithm>
#include <utility>

namespace cumempool::backup {

Backup::Backup(Backup&& other) noexcept
    : arena_(other.arena_),
      pieces_(std::exchange(other.pieces_, {})),
      bytes_(std::exchange(other.bytes_, 0)) {}

Backup::~Backup() {
  for (const Piece& piece : pieces_) arena_->release(piece.span);
}

void Backup::save(CopyQueue& queue, cumempool_address address, const std::vector<Extent>& extents) {
  for (const Extent& extent : extents) {
    std::size_t done = 0;
    while (done < extent.bytes) {
      // The piece owns its span from the moment it is taken, whatever fails next.
      Piece& piece = pieces_.emplace_back(Piece{extent.offset + done, {}});
      piece.span = arena_->acquire(queue.device(), extent.bytes - done);
      queue.to_host(piece.span.data(), address + piece.offset, piece.span.bytes);
      done += piece.span.bytes;
      bytes_ += piece.span.bytes;
    }
  }
}

void Backup::restore(CopyQueue& queue, cumempool_address address) const {
  for (const Piece& piece : pieces_) {
    queue.to_device(address + piece.offset, piece.span.data(), piece.span.bytes);
  }
}

std::size_t Backup::zero_rest(CopyQueue& queue, cumempool_address address,
                              std::size_t bytes) const {
  std::size_t at = 0;
  for (const Piece& piece : pieces_) {
    if (piece.offset > at) queue.fill_zero(address + at, piece.offset - at);
    at = piece.offset + piece.span.bytes;
  }
  if (bytes > at) queue.fill_zero(address + at, bytes - at);
  return bytes - static_cast<std::size_t>(bytes_);
}

}  // namespace cumempool::backup
