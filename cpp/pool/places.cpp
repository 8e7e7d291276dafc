// Chooses where the contents of an allocation go, and makes the place.
#include "pool/places.hpp"

#include <string>
#include <utility>

#include "backup/file_storage.hpp"
#include "backup/host_storage.hpp"
#include "backup/peer_storage.hpp"
#include "pool/dead_ranges.hpp"

namespace cumempool::pool {

void check_reach(Allocator& allocator, const BackupChoice& choice, int device) {
  if (choice.tier != CUMEMPOOL_BACKUP_PEER) return;
  if (choice.peer != device && allocator.driver().peer_access(device, choice.peer)) return;
  const std::string peer = "device " + std::to_string(choice.peer);
  Error error(CUMEMPOOL_UNSUPPORTED, choice.peer == device
                                         ? "a device cannot back itself up"
                                         : "the device has no peer access to " + peer);
  error.device = device;
  error.advice =
      "choose another peer (nvidia-smi topo -p2p rw says which reach each other), or "
      "another tier";
  throw error;
}

void check_peer(Allocator& allocator, const BackupChoice& choice) {
  if (choice.tier != CUMEMPOOL_BACKUP_PEER) return;
  const driver::Driver driver = allocator.driver();
  const int count = driver.device_count();
  if (choice.peer < 0 || choice.peer >= count) {
    Error error(CUMEMPOOL_INVALID_ARGUMENT, "there is no device " + std::to_string(choice.peer));
    error.advice = "the driver has " + std::to_string(count) + " device(s), counted from 0";
    throw error;
  }
  for (int device = 0; device < count; ++device) {
    if (device != choice.peer && driver.peer_access(device, choice.peer)) return;
  }
  Error error(CUMEMPOOL_UNSUPPORTED,
              "no other device has peer access to device " + std::to_string(choice.peer));
  error.advice = "choose another tier";
  throw error;
}

bool reusable(const Allocator& allocator, const Record& record, const BackupChoice& wanted,
              const std::vector<backup::Extent>& live) {
  const std::shared_ptr<backup::Backup>& image = record.image;
  // A view of it may be open: what it shows must not change under its reader.
  if (image == nullptr || image.use_count() != 1 || image->digests().empty()) return false;
  const bool in_place = record.image_choice == wanted ||
                        (allocator.overflow() && record.image_choice == *allocator.overflow());
  return in_place && image->extents() == live;
}

backup::HostArena* arena_of(Allocator& allocator, const BackupChoice& choice, int device) {
  const int node = allocator.devices().at(device)->numa_node();
  if (choice.tier == CUMEMPOOL_BACKUP_PINNED) {
    return &allocator.stores().arena(backup::Residence::kPinned, node);
  }
  if (choice.tier == CUMEMPOOL_BACKUP_PAGEABLE) {
    return &allocator.stores().arena(backup::Residence::kPageable, node);
  }
  return nullptr;
}

namespace {

std::unique_ptr<backup::BackupStorage> make_storage(Allocator& allocator, const Record& record,
                                                    const BackupChoice& choice,
                                                    const std::vector<backup::Extent>& live) {
  if (backup::HostArena* arena = arena_of(allocator, choice, record.device)) {
    return std::make_unique<backup::HostStorage>(*arena, choice.tier, record.device);
  }
  if (choice.tier == CUMEMPOOL_BACKUP_FILE) {
    return std::make_unique<backup::FileStorage>(allocator.stores().file(choice.directory),
                                                 total_bytes(live), live.size(),
                                                 allocator.digest_seed());
  }
  check_reach(allocator, choice, record.device);
  const vmm::MemoryKind& kind = allocator.devices().at(choice.peer)->kind();
  return std::make_unique<backup::PeerStorage>(allocator.stores().peers(), kind.properties,
                                               kind.granularity, record.device, total_bytes(live));
}

}  // namespace

std::shared_ptr<backup::Backup> make_image(Allocator& allocator, const Record& record,
                                           const BackupChoice& choice,
                                           std::vector<backup::Extent> live) {
  auto place = make_storage(allocator, record, choice, live);
  return std::make_shared<backup::Backup>(std::move(live), std::move(place));
}

}  // namespace cumempool::pool
