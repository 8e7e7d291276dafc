// Chooses where the contents of an allocation go, and makes the place.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "backup/backup.hpp"
#include "pool/allocator.hpp"

namespace cumempool::pool {

// Throws Error (CUMEMPOOL_UNSUPPORTED) where `device` cannot reach the peer that is chosen.
void check_reach(Allocator& allocator, const BackupChoice& choice, int device);

// Throws Error where the peer that is chosen does not exist (CUMEMPOOL_INVALID_ARGUMENT), or no
// device can reach it (CUMEMPOOL_UNSUPPORTED).
void check_peer(Allocator& allocator, const BackupChoice& choice);

// A new image of `live` of a record. Files and peers give the room at once, host memory as it is
// saved. Throws Error (CUMEMPOOL_BACKUP_FAILED, CUMEMPOOL_OUT_OF_MEMORY, CUMEMPOOL_UNSUPPORTED).
std::shared_ptr<backup::Backup> make_image(Allocator& allocator, const Record& record,
                                           const BackupChoice& choice,
                                           std::vector<backup::Extent> live);

// Whether the image of a record that is awake can take its next backup as well, so that only what
// has changed is copied.
bool reusable(const Allocator& allocator, const Record& record, const BackupChoice& wanted,
              const std::vector<backup::Extent>& live);

// The arena that a choice leads to for a device; null for files and peers.
backup::HostArena* arena_of(Allocator& allocator, const BackupChoice& choice, int device);

}  // namespace cumempool::pool
