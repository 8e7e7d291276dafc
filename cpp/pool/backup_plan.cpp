// Plans the backups of a transition: which bytes need one, where each goes, and whether there is
// room.
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

DeadRanges::DeadRanges(std::vector<cumempool_extent> ranges, std::uint64_t as_of) : as_of_(as_of) {
  constexpr cumempool_address kLast = std::numeric_limits<cumempool_address>::max();
  std::sort(ranges.begin(), ranges.end(),
            [](const auto& left, const auto& right) { return left.address < right.address; });
  for (const auto& [begin, bytes] : ranges) {
    const cumempool_address end = begin + std::min(bytes, kLast - begin);
    if (!ranges_.empty() && begin <= ranges_.back().end) {
      ranges_.back().end = std::max(ranges_.back().end, end);
    } else {
      ranges_.push_back({begin, end});
    }
  }
}

void DeadRanges::look_at(const Tag& tag) {
  if (as_of_ == 0 || (tag.scopes == 0 && tag.scopes_changed < as_of_)) return;
  handed_out_.insert(&tag);
}

// As torch rounds its blocks; digests and direct I/O need less.
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
      [](const Range& range, cumempool_address value) { return range.begin < value; });
  if (dead != ranges_.begin()) --dead;  // may reach into the record from below
  for (; dead != ranges_.end() && dead->begin < end; ++dead) {
    const cumempool_address from = (std::max(dead->begin, at) + kUnit - 1) / kUnit * kUnit;
    const cumempool_address to = std::min(dead->end, end) / kUnit * kUnit;
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
  const std::shared_ptr<backup::Backup>& image = record.contents.image();
  // A view of it may be open: what it shows must not change under its reader.
  if (image == nullptr || image.use_count() != 1 || image->digests().empty()) return false;
  const BackupChoice& choice = record.contents.choice();
  const bool in_place =
      choice == wanted || (allocator.overflow() && choice == *allocator.overflow());
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

// ---- whether there is room ----------------------------------------------------------------------

namespace {

using backup::HostArena;
using backup::HostRoom;

bool is_staged(const BackupChoice& choice) {
  return choice.tier == CUMEMPOOL_BACKUP_PAGEABLE || choice.tier == CUMEMPOOL_BACKUP_FILE;
}

bool is_in_host_memory(const BackupChoice& choice) {
  return choice.tier == CUMEMPOOL_BACKUP_PINNED || choice.tier == CUMEMPOOL_BACKUP_PAGEABLE;
}

// What a set of backups takes, and of what.
class Demand {
 public:
  explicit Demand(Allocator& allocator) : allocator_(&allocator) {}

  void add(const HostNeed& need, const BackupChoice& choice) {
    HostArena* const arena = arena_of(*allocator_, choice, need.device);
    if (arena != nullptr) bytes_[arena] += need.bytes;
    if (is_staged(choice)) staged_.insert(need.device);
  }

  std::uint64_t of(HostArena& arena) const {
    const auto found = bytes_.find(&arena);
    return found == bytes_.end() ? 0 : found->second;
  }
  // Beyond what is free.
  std::uint64_t pinned() const { return missing(true); }
  std::uint64_t all() const {
    std::uint64_t bytes = missing(false);
    for (const int device : staged_) bytes += allocator_->devices().at(device)->staging_missing();
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
      if (!pinned_only || arena->residence() == backup::Residence::kPinned) {
        bytes += arena->missing(wanted);
      }
    }
    return bytes;
  }

  Allocator* allocator_;
  std::map<HostArena*, std::size_t> bytes_;
  std::set<int> staged_;  // devices that copy through buffers
};

class HostPlan {
 public:
  HostPlan(Allocator& allocator, const char* operation, const std::vector<HostNeed>& needs)
      : allocator_(allocator), operation_(operation), needs_(needs) {}

  void run(Retained retained) {
    Demand demand(allocator_);
    for (const HostNeed& need : needs_) demand.add(need, *need.choice);
    if (demand.all() == 0 || lacking(demand) == 0) return;
    give_back_surplus(demand);
    while (retained == Retained::kMayGo && lacking(demand) != 0) {
      if (!allocator_.drop_retained(lacking(demand))) break;
      give_back_surplus(demand);
    }
    if (lacking(demand) != 0) place_one_by_one();
  }

 private:
  // Bytes that a demand is over what there is, of whatever is scarcest.
  std::uint64_t lacking(const Demand& demand) const {
    const std::uint64_t budget = allocator_.stores().pinned_budget().room();
    const std::uint64_t room = backup::host_room().for_backups();
    const std::uint64_t pinned = demand.pinned();
    const std::uint64_t all = demand.all();
    const std::uint64_t most =
        std::max(pinned - std::min(pinned, budget), all - std::min(all, room));
    return most == 0 && !demand.has_addresses() ? 1 : most;
  }

  // Blocks that hold nothing and that this demand does not use.
  void give_back_surplus(const Demand& demand) {
    const int device = needs_.front().device;
    const driver::ContextScope scope(allocator_.driver(), device);
    for (HostArena* const arena : allocator_.stores().arenas()) {
      const std::uint64_t free = arena->free_bytes();
      arena->trim(device, free - std::min(free, demand.of(*arena)));
    }
  }

  void place_one_by_one() {
    const std::uint64_t budget = allocator_.stores().pinned_budget().room();
    const HostRoom room = backup::host_room();
    Demand placed(allocator_);
    for (const HostNeed& need : needs_) {
      const auto fits = [&](const BackupChoice& choice) {
        Demand with = placed;
        with.add(need, choice);
        const bool there =
            with.pinned() <= budget && with.all() <= room.for_backups() && with.has_addresses();
        if (there) placed = with;
        return there;
      };
      if (fits(*need.choice)) continue;
      const auto& overflow = allocator_.overflow();
      if (!overflow || !is_in_host_memory(*need.choice) || !fits(*overflow)) {
        refuse(need, budget, room);
      }
      *need.choice = *overflow;
    }
  }

  // Says what all of the backups need, which the one that does not fit alone does not tell.
  [[noreturn]] void refuse(const HostNeed& culprit, std::uint64_t budget, const HostRoom& room) {
    Demand demand(allocator_);
    for (const HostNeed& need : needs_) demand.add(need, *need.choice);
    const HostArena* const arena = arena_of(allocator_, *culprit.choice, culprit.device);
    const bool addresses_lack = demand.pinned() <= budget && demand.all() <= room.for_backups();
    Error error = demand.pinned() > budget
                      ? allocator_.stores().pinned_budget().refusal(demand.pinned())
                  : addresses_lack && arena != nullptr ? arena->no_addresses()
                                                       : room.refusal(demand.all());
    error.operation = operation_;
    error.tag = culprit.tag->name;
    error.device = culprit.device;
    throw error;
  }

  Allocator& allocator_;
  const char* operation_;
  const std::vector<HostNeed>& needs_;
};

}  // namespace

bool sends_to_overflow(Allocator& allocator, const Error& failure) noexcept {
  if (!failure.pin_refused || !failure.secondary.empty() || !allocator.overflow()) return false;
  try {
    for (const auto& device : allocator.devices().used()) {
      const driver::ContextScope scope(allocator.driver(), device->ordinal());
      std::uint64_t buffers = device->staging_missing();
      for (HostArena* const arena : allocator.stores().arenas()) {
        if (arena->residence() != backup::Residence::kPinned) continue;
        buffers -= arena->trim(device->ordinal(), buffers);
      }
    }
  } catch (const std::exception&) {
    return false;  // the failure stands
  }
  allocator.stores().refuse_pinned();
  return true;
}

void plan_host_memory(Allocator& allocator, const char* operation,
                      const std::vector<HostNeed>& needs, Retained retained) {
  HostPlan(allocator, operation, needs).run(retained);
}

}  // namespace cumempool::pool
