// What must hold after every operation: states, generations, contents, and numbers that add up.
#include <algorithm>
#include <memory>

#include "program.hpp"

namespace cumempool::fuzz {
namespace {

using Snapshot = std::unique_ptr<cumempool_snapshot, decltype(&cumempool_snapshot_destroy)>;

Snapshot take_snapshot(cumempool_allocator* allocator) {
  cumempool_snapshot* taken = nullptr;
  MUST_HOLD(cumempool_take_snapshot(allocator, 1, &taken) == CUMEMPOOL_OK, "no snapshot");
  return {taken, &cumempool_snapshot_destroy};
}

std::string name_of(const Block& block) {
  return "block " + std::to_string(block.id) + " at " + text_of(block.address);
}

}  // namespace

std::vector<cumempool_allocation_info> Program::infos() const {
  const Snapshot snapshot = take_snapshot(allocator_);
  std::size_t count = 0;
  const cumempool_allocation_info* first = cumempool_snapshot_allocations(snapshot.get(), &count);
  std::vector<cumempool_allocation_info> all(first, first + count);
  for (cumempool_allocation_info& info : all) info.tag = nullptr;  // goes with the snapshot
  return all;
}

void Program::check() {
  model_.disturbed = model_.disturbed || machine_.faults().failures() != 0;
  if (under_way()) return;  // nobody knows how far it is
  const Snapshot snapshot = take_snapshot(allocator_);
  std::size_t count = 0;
  const cumempool_allocation_info* infos = cumempool_snapshot_allocations(snapshot.get(), &count);
  std::size_t next = 0;
  for (Block& block : model_.blocks) {
    if (!model_.current(block)) continue;
    MUST_HOLD(next < count, name_of(block) + " is missing in the snapshot");
    check_block(infos[next++], block);
  }
  MUST_HOLD(next == count, "the snapshot has allocations that nobody made");
  check_tags(snapshot.get());
  std::uint64_t done = 0;
  std::uint64_t total = 0;
  MUST_HOLD(cumempool_progress(allocator_, &done, &total) == CUMEMPOOL_OK && done <= total,
            "a transition has done more than all of it");
  check_numbers(snapshot.get());
  check_contents();
}

// R2, R3, R4: blocks and infos are both in the order of allocation.
void Program::check_block(const cumempool_allocation_info& info, Block& block) const {
  MUST_HOLD(info.address == block.address, name_of(block) + " has another address");
  MUST_HOLD(info.state == block.state, name_of(block) + " is in state " +
                                           std::to_string(info.state) + ", not " +
                                           std::to_string(block.state));
  MUST_HOLD(info.generation == block.generation, name_of(block) + " is of generation " +
                                                     std::to_string(info.generation) + ", not " +
                                                     std::to_string(block.generation));
  MUST_HOLD(info.bytes == block.bytes && info.requested_bytes == block.requested &&
                info.device == block.device && (info.preserved == 1) == block.preserved &&
                info.backing == block.backing && info.tag == model_.tags.at(block.tag).name,
            name_of(block) + " is described wrongly");
  MUST_HOLD(info.state != CUMEMPOOL_ASLEEP_BACKED_UP || info.backup_bytes != 0,
            name_of(block) + " has a backup of nothing");
  block.backup_bytes = info.backup_bytes;
  block.backup_tier = info.backup_tier;
}

void Program::check_tags(const cumempool_snapshot* snapshot) const {
  std::size_t count = 0;
  const cumempool_tag_stats* rows = cumempool_snapshot_tags(snapshot, &count);
  std::array<cumempool_tag_stats, kTags> sums{};
  for (std::size_t i = 0; i < count; ++i) {
    const auto tag = std::find_if(model_.tags.begin(), model_.tags.end(),
                                  [&](const Tag& known) { return known.name == rows[i].tag; });
    MUST_HOLD(tag != model_.tags.end() && tag->declared, "the statistics have an unknown tag");
    MUST_HOLD(rows[i].pins == tag->pins.size(), "pins are miscounted");
    MUST_HOLD(rows[i].backup_tier == tag->tier && rows[i].backing == tag->backing,
              "a tag has another policy");
    cumempool_tag_stats& sum = sums.at(static_cast<std::size_t>(tag - model_.tags.begin()));
    sum.awake_bytes += rows[i].awake_bytes;
    sum.backed_up_bytes += rows[i].backed_up_bytes;
    sum.discarded_bytes += rows[i].discarded_bytes;
    sum.unreleased_bytes += rows[i].unreleased_bytes;
    sum.preserved_bytes += rows[i].preserved_bytes;
  }
  for (const Block& block : model_.blocks) {
    if (!model_.current(block)) continue;
    cumempool_tag_stats& sum = sums.at(block.tag);
    if (block.preserved) sum.preserved_bytes -= block.bytes;
    (block.awake()                               ? sum.awake_bytes
     : block.state == CUMEMPOOL_ASLEEP_BACKED_UP ? sum.backed_up_bytes
                                                 : sum.discarded_bytes) -= block.bytes;
  }
  for (const cumempool_tag_stats& sum : sums) {
    MUST_HOLD(sum.awake_bytes == 0 && sum.backed_up_bytes == 0 && sum.discarded_bytes == 0 &&
                  sum.preserved_bytes == 0,
              "the statistics of a tag do not add up");
    MUST_HOLD(sum.unreleased_bytes == 0 || model_.disturbed,
              "memory is unreleased, and nothing has failed");
  }
}

// R13: the totals are what the driver gave. What others hold, and closed allocators, is beside it.
void Program::check_numbers(const cumempool_snapshot* snapshot) const {
  const cumempool_totals& totals = *cumempool_snapshot_totals(snapshot);
  const driver::HostDriverCounters counters = machine_.counters();
  const bool alone = old_.empty() && !shared_elsewhere();
  const std::uint64_t device = totals.physical_bytes + totals.peer_bytes;
  MUST_HOLD(alone ? device == counters.charged_bytes : device <= counters.charged_bytes,
            "device memory: " + std::to_string(device) + " bytes are told, the driver gave " +
                std::to_string(counters.charged_bytes));
  const std::uint64_t pinned = totals.host_bytes + totals.staging_bytes;
  MUST_HOLD(
      old_.empty() ? pinned == counters.registered_bytes : pinned <= counters.registered_bytes,
      "pinned memory: " + std::to_string(pinned) + " bytes are told, the driver has " +
          std::to_string(counters.registered_bytes));
  MUST_HOLD(totals.host_used_bytes <= totals.host_bytes, "more host memory is used than held");
  MUST_HOLD(
      settings_.host_limit_pages == 0 || totals.host_bytes <= settings_.host_limit_pages * kPage,
      "more host memory is pinned than the limit allows");
  std::uint64_t awake = 0;
  std::uint64_t reserved = 0;
  for (const Block& block : model_.blocks) {
    if (!model_.current(block)) continue;
    if (block.awake()) awake += block.bytes;
    if (!block.ordinary()) reserved += block.bytes;
  }
  MUST_HOLD(totals.mapped_bytes >= awake && totals.physical_bytes >= awake,
            "less memory is told than is awake");
  MUST_HOLD(totals.reserved_address_bytes >= reserved, "less address space is told than lives");
  if (model_.disturbed) return;
  MUST_HOLD(totals.pending_free_bytes == 0, "a free is put off, and nothing has failed");
  MUST_HOLD(totals.mapped_bytes == awake && totals.physical_bytes == awake,
            "more memory is told than is awake");
  MUST_HOLD(totals.reserved_address_bytes == reserved, "more address space is told than lives");
  if (alone && !peers_used_) {
    MUST_HOLD(totals.reserved_address_bytes == counters.reserved_bytes,
              "the driver has given another amount of address space");
  }
}

void Program::check_contents() {
  machine_.synchronize();
  for (Block& block : model_.blocks) {
    block.busy = false;
    if (!block.awake()) continue;
    const auto wrong = block.contents.difference(bytes_at(block.address));
    MUST_HOLD(!wrong, "the contents of " + name_of(block) + " are wrong from byte " +
                          std::to_string(*wrong) + " on");
  }
  for (const View& view : views_) check_view(view);
  for (const Share& share : model_.shares) check_share(share);
}

}  // namespace cumempool::fuzz
