// Finds room in host memory for the backups of one transition, before any of it is touched.
#include "pool/host_plan.hpp"

#include <algorithm>
#include <cstdint>
#include <exception>
#include <map>
#include <set>

#include "backup/host_limits.hpp"
#include "pool/places.hpp"

namespace cumempool::pool {
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
