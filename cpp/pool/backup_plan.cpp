// The plan for the backups of a transition.
#include "pool/backup_plan.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "backup/file_storage.hpp"
#include "backup/host_limits.hpp"
#include "backup/host_storage.hpp"
#include "backup/peer_storage.hpp"

namespace cumempool::pool {

// ---- which bytes --------------------------------------------------------------------------------

namespace {

cumempool_address end_of(const cumempool_extent& range) { return range.address + range.bytes; }

}  // namespace

DeadRanges::DeadRanges(std::vector<cumempool_extent> ranges, std::uint64_t as_of) : as_of_(as_of) {
  constexpr cumempool_address kLast = std::numeric_limits<cumempool_address>::max();
  std::sort(ranges.begin(), ranges.end(),
            [](const auto& left, const auto& right) { return left.address < right.address; });
  for (const auto& [begin, bytes] : ranges) {
    const cumempool_address end = begin + std::min(bytes, kLast - begin);
    if (!ranges_.empty() && begin <= end_of(ranges_.back())) {
      ranges_.back().bytes = std::max(end_of(ranges_.back()), end) - ranges_.back().address;
    } else {
      ranges_.push_back({begin, end - begin});
    }
  }
}

void DeadRanges::look_at(const Tag& tag) {
  if (as_of_ == 0 || (tag.scopes == 0 && tag.scopes_changed < as_of_)) return;
  handed_out_.insert(&tag);
}

// torch rounds its blocks to this; digests and direct I/O need less.
constexpr cumempool_address kUnit = 512;

std::vector<backup::Extent> DeadRanges::live_extents(const Record& record) const {
  if (as_of_ != 0 && (record.sequence >= as_of_ || handed_out_.count(record.tag) != 0)) {
    return {{0, record.bytes}};
  }
  std::vector<backup::Extent> live;
  const cumempool_address end = record.address + record.bytes;
  cumempool_address at = record.address;
  auto dead = std::lower_bound(
      ranges_.begin(), ranges_.end(), record.address,
      [](const auto& range, cumempool_address value) { return range.address < value; });
  if (dead != ranges_.begin()) --dead;  // may reach into the record from below
  for (; dead != ranges_.end() && dead->address < end; ++dead) {
    const cumempool_address from = (std::max(dead->address, at) + kUnit - 1) / kUnit * kUnit;
    const cumempool_address to = std::min(end_of(*dead), end) / kUnit * kUnit;
    if (to <= from) continue;
    if (from > at) live.push_back({at - record.address, from - at});
    at = to;
  }
  if (at < end) live.push_back({at - record.address, end - at});
  return live;
}

std::size_t total_bytes(const std::vector<backup::Extent>& extents) {
  std::size_t bytes = 0;
  for (const backup::Extent& extent : extents) bytes += extent.bytes;
  return bytes;
}

// ---- where --------------------------------------------------------------------------------------

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
  const std::shared_ptr<backup::Backup>& backup = record.contents.backup();
  // An open view must not change under its reader.
  if (backup == nullptr || backup.use_count() != 1 || backup->digests().empty()) return false;
  const BackupChoice& choice = record.contents.choice();
  const bool in_place =
      choice == wanted || (allocator.overflow() && choice == *allocator.overflow());
  return in_place && backup->extents() == live;
}

namespace {

bool is_in_host_memory(const BackupChoice& choice) {
  return choice.tier == CUMEMPOOL_BACKUP_PINNED || choice.tier == CUMEMPOOL_BACKUP_PAGEABLE;
}

}  // namespace

backup::HostArena* arena_of(Allocator& allocator, const BackupChoice& choice, int device) {
  const int node = allocator.devices().at(device)->numa_node();
  if (!is_in_host_memory(choice)) return nullptr;
  return &allocator.stores().arena(choice.tier, node);
}

namespace {

std::unique_ptr<backup::BackupStorage> make_storage(Allocator& allocator, const Record& record,
                                                    const BackupChoice& choice,
                                                    const std::vector<backup::Extent>& live) {
  if (backup::HostArena* arena = arena_of(allocator, choice, record.device)) {
    return std::make_unique<backup::HostStorage>(*arena, record.device);
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

std::shared_ptr<backup::Backup> make_backup(Allocator& allocator, const Record& record,
                                            const BackupChoice& choice,
                                            std::vector<backup::Extent> live) {
  auto storage = make_storage(allocator, record, choice, live);
  return std::make_shared<backup::Backup>(std::move(live), std::move(storage));
}

// ---- whether there is room ----------------------------------------------------------------------

namespace {

using backup::HostArena;
using backup::HostRoom;

// The host memory that a set of new backups needs.
class Demand {
 public:
  explicit Demand(Allocator& allocator) : allocator_(&allocator) {}

  void add(const HostNeed& need, const BackupChoice& choice) {
    HostArena* const arena = arena_of(*allocator_, choice, need.device);
    if (arena != nullptr) bytes_[arena] += need.bytes;
    if (backup::uses_bounce_buffers(choice.tier)) bouncing_.insert(need.device);
  }

  std::uint64_t of(HostArena& arena) const {
    const auto found = bytes_.find(&arena);
    return found == bytes_.end() ? 0 : found->second;
  }
  // Bytes of new blocks: of pinned arenas, and of all with the missing bounce buffers.
  std::uint64_t pinned() const { return missing(true); }
  std::uint64_t all() const {
    std::uint64_t bytes = missing(false);
    for (const int device : bouncing_)
      bytes += allocator_->devices().at(device)->missing_buffer_bytes();
    return bytes;
  }
  bool has_addresses() const {
    return std::all_of(bytes_.begin(), bytes_.end(), [](const auto& entry) {
      const std::size_t missing = entry.first->missing(entry.second);
      return missing == 0 || missing <= entry.first->address_room();
    });
  }

 private:
  std::uint64_t missing(bool pinned_only) const {
    std::uint64_t bytes = 0;
    for (const auto& [arena, wanted] : bytes_) {
      if (!pinned_only || arena->tier() == CUMEMPOOL_BACKUP_PINNED) {
        bytes += arena->missing(wanted);
      }
    }
    return bytes;
  }

  Allocator* allocator_;
  std::map<HostArena*, std::size_t> bytes_;
  std::set<int> bouncing_;  // devices that need bounce buffers
};

// Returns the bytes that the scarcest room lacks for a demand.
std::uint64_t lacking(Allocator& allocator, const Demand& demand) {
  const std::uint64_t budget = allocator.stores().pinned_budget().room();
  const std::uint64_t room = backup::host_room().for_backups();
  const std::uint64_t pinned = demand.pinned();
  const std::uint64_t all = demand.all();
  const std::uint64_t most = std::max(pinned - std::min(pinned, budget), all - std::min(all, room));
  return most == 0 && !demand.has_addresses() ? 1 : most;
}

// Gives back empty blocks that the demand does not use.
void give_back_surplus(Allocator& allocator, const Demand& demand, int device) {
  const driver::ContextScope scope(allocator.driver(), device);
  for (HostArena* const arena : allocator.stores().arenas()) {
    const std::uint64_t free = arena->free_bytes();
    arena->trim(device, free - std::min(free, demand.of(*arena)));
  }
}

// Names the need of all backups, since the one that does not fit tells too little.
[[noreturn]] void refuse(Allocator& allocator, const char* operation,
                         const std::vector<HostNeed>& needs, const HostNeed& culprit,
                         std::uint64_t budget, const HostRoom& room) {
  Demand demand(allocator);
  for (const HostNeed& need : needs) demand.add(need, *need.choice);
  const HostArena* const arena = arena_of(allocator, *culprit.choice, culprit.device);
  const bool addresses_lack = demand.pinned() <= budget && demand.all() <= room.for_backups();
  Error error = demand.pinned() > budget
                    ? allocator.stores().pinned_budget().refusal(demand.pinned())
                : addresses_lack && arena != nullptr ? arena->no_addresses()
                                                     : room.refusal(demand.all());
  error.operation = operation;
  error.tag = culprit.tag->name;
  error.device = culprit.device;
  throw error;
}

// Places the backups in order; those that do not fit go to the overflow tier.
void place_one_by_one(Allocator& allocator, const char* operation,
                      const std::vector<HostNeed>& needs) {
  const std::uint64_t budget = allocator.stores().pinned_budget().room();
  const HostRoom room = backup::host_room();
  Demand placed(allocator);
  for (const HostNeed& need : needs) {
    const auto fits = [&](const BackupChoice& choice) {
      Demand with = placed;
      with.add(need, choice);
      const bool there =
          with.pinned() <= budget && with.all() <= room.for_backups() && with.has_addresses();
      if (there) placed = with;
      return there;
    };
    if (fits(*need.choice)) continue;
    const auto& overflow = allocator.overflow();
    if (!overflow || !is_in_host_memory(*need.choice) || !fits(*overflow)) {
      refuse(allocator, operation, needs, need, budget, room);
    }
    *need.choice = *overflow;
  }
}

}  // namespace

bool sends_to_overflow(Allocator& allocator, const Error& failure) noexcept {
  if (!failure.pin_refused || !failure.secondary.empty() || !allocator.overflow()) return false;
  try {
    for (const auto& device : allocator.devices().used()) {
      const driver::ContextScope scope(allocator.driver(), device->ordinal());
      std::uint64_t buffers = device->missing_buffer_bytes();
      for (HostArena* const arena : allocator.stores().arenas()) {
        if (arena->tier() != CUMEMPOOL_BACKUP_PINNED) continue;
        buffers -= arena->trim(device->ordinal(), buffers);
      }
    }
  } catch (const std::exception&) {
    return false;  // the first failure is reported
  }
  allocator.stores().refuse_pinned();
  return true;
}

void plan_host_memory(Allocator& allocator, const char* operation,
                      const std::vector<HostNeed>& needs, bool may_drop_retained) {
  Demand demand(allocator);
  for (const HostNeed& need : needs) demand.add(need, *need.choice);
  if (demand.all() == 0 || lacking(allocator, demand) == 0) return;
  const int device = needs.front().device;
  give_back_surplus(allocator, demand, device);
  while (may_drop_retained && lacking(allocator, demand) != 0) {
    if (!allocator.drop_retained(lacking(allocator, demand))) break;
    give_back_surplus(allocator, demand, device);
  }
  if (lacking(allocator, demand) != 0) place_one_by_one(allocator, operation, needs);
}

}  // namespace cumempool::pool
