// Tags, records, the record set of an allocator, the registry.
#include "pool/records.hpp"

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <set>

#include "driver/error.hpp"

namespace cumempool::pool {

// ---- tags ---------------------------------------------------------------------------------------

namespace {

constexpr std::size_t kLongestName = 255;

// Returns the length of the UTF-8 sequence at `at`; 0 if it is malformed: overlong forms,
// surrogates and numbers past U+10FFFF included.
std::size_t sequence_length(const std::string& text, std::size_t at) {
  const auto byte = [&](std::size_t i) {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U;
  };
  const auto follows = [&](std::size_t i) { return (byte(i) & 0xC0U) == 0x80U; };
  const std::uint32_t first = byte(at);
  const std::uint32_t second = byte(at + 1);
  if (first < 0x80U) return 1;
  if (first >= 0xC2U && first <= 0xDFU) return follows(at + 1) ? 2 : 0;
  if ((first & 0xF0U) == 0xE0U) {
    const bool overlong = first == 0xE0U && second < 0xA0U;
    const bool surrogate = first == 0xEDU && second >= 0xA0U;
    return follows(at + 1) && follows(at + 2) && !overlong && !surrogate ? 3 : 0;
  }
  if (first >= 0xF0U && first <= 0xF4U) {
    const bool outside = (first == 0xF0U && second < 0x90U) || (first == 0xF4U && second >= 0x90U);
    return follows(at + 1) && follows(at + 2) && follows(at + 3) && !outside ? 4 : 0;
  }
  return 0;
}

void check_name(const std::string& name) {
  const auto refuse = [](const std::string& why) {
    Error error(CUMEMPOOL_INVALID_ARGUMENT, why);
    error.advice = "use 1 to 255 bytes of UTF-8 without a zero byte";
    throw error;
  };
  if (name.empty()) refuse("a tag cannot be empty");
  if (name.size() > kLongestName) {
    refuse("a tag of " + std::to_string(name.size()) + " bytes is too long");
  }
  for (std::size_t at = 0; at < name.size();) {
    const std::size_t length = sequence_length(name, at);
    if (length == 0) refuse("the tag is not valid UTF-8");
    at += length;
  }
}

void check_policy(cumempool_on_sleep on_sleep, cumempool_on_wake on_wake) {
  const auto sleep = static_cast<int>(on_sleep);
  const auto wake = static_cast<int>(on_wake);
  if (sleep < 0 || sleep > CUMEMPOOL_ON_SLEEP_DISCARD || wake < 0 ||
      wake > CUMEMPOOL_ON_WAKE_ZERO) {
    throw Error(CUMEMPOOL_INVALID_ARGUMENT, "the policy of the tag has a value outside its enum");
  }
}

// Returns the only copy of a name. It is never destroyed: callers of the C interface may keep it
// longer than the allocator that it came from.
const std::string& interned(const std::string& name) {
  static auto& mutex = *new std::mutex;
  static auto& names = *new std::set<std::string>;
  const std::lock_guard lock(mutex);
  return *names.insert(name).first;
}

}  // namespace

BackupChoice backup_choice(const cumempool_backup_policy& policy) {
  const auto tier = static_cast<int>(policy.tier);
  if (tier < CUMEMPOOL_BACKUP_PINNED || tier > CUMEMPOOL_BACKUP_PEER) {
    throw Error(CUMEMPOOL_INVALID_ARGUMENT, "the backup tier has a value outside its enum");
  }
  BackupChoice choice;
  choice.tier = policy.tier;
  if (policy.tier == CUMEMPOOL_BACKUP_FILE) {
    if (policy.directory == nullptr || *policy.directory == '\0') {
      Error error(CUMEMPOOL_INVALID_ARGUMENT, "a backup in a file needs a directory");
      error.advice = "name a directory on a disk with room for the backup";
      throw error;
    }
    choice.directory = policy.directory;
  }
  if (policy.tier == CUMEMPOOL_BACKUP_PEER) choice.peer = policy.peer_device;
  return choice;
}

MemoryChoice memory_choice(const cumempool_memory_policy& policy) {
  if (policy.backing != CUMEMPOOL_BACKING_VMM && policy.backing != CUMEMPOOL_BACKING_CUDA_MALLOC) {
    throw Error(CUMEMPOOL_INVALID_ARGUMENT, "the backing has a value outside its enum");
  }
  MemoryChoice choice;
  choice.backing = policy.backing;
  if (policy.all_peers > CUMEMPOOL_PEERS_NONE ||
      (policy.all_peers == CUMEMPOOL_PEERS_NONE && policy.peer_count != 0)) {
    throw Error(CUMEMPOOL_INVALID_ARGUMENT,
                "all_peers has a value outside its enum, or excludes peers that are listed");
  }
  choice.all_peers = policy.all_peers == CUMEMPOOL_PEERS_ALL;
  choice.no_peers =
      policy.all_peers == CUMEMPOOL_PEERS_NONE && choice.backing == CUMEMPOOL_BACKING_VMM;
  if (policy.peer_count != 0) choice.peers.assign(policy.peers, policy.peers + policy.peer_count);
  if (choice.backing == CUMEMPOOL_BACKING_CUDA_MALLOC &&
      (choice.all_peers || !choice.peers.empty())) {
    Error error(CUMEMPOOL_INVALID_ARGUMENT, "memory of cudaMalloc takes no peers here");
    error.advice = "give peers access with cudaDeviceEnablePeerAccess, as for any such memory";
    throw error;
  }
  choice.rdma = policy.without_rdma == 0;
  if (choice.backing == CUMEMPOOL_BACKING_CUDA_MALLOC && !choice.rdma) {
    Error error(CUMEMPOOL_INVALID_ARGUMENT, "memory of cudaMalloc is always good for RDMA");
    error.advice = "leave the choice of RDMA out, or give the tag backing='vmm'";
    throw error;
  }
  return choice;
}

void TagTable::declare(const std::string& name, cumempool_on_sleep on_sleep,
                       cumempool_on_wake on_wake) {
  check_name(name);
  check_policy(on_sleep, on_wake);
  const std::lock_guard lock(mutex_);
  auto found = tags_.find(name);
  if (found == tags_.end()) {
    found = tags_.emplace(name, std::make_unique<Tag>(Tag{interned(name)})).first;
  }
  Tag& tag = *found->second;
  if (on_sleep != CUMEMPOOL_ON_SLEEP_UNSET) tag.on_sleep = on_sleep;
  if (on_wake != CUMEMPOOL_ON_WAKE_UNSET) tag.on_wake = on_wake;
}

Tag& TagTable::find(const std::string& name) const {
  const std::lock_guard lock(mutex_);
  const auto found = tags_.find(name);
  if (found != tags_.end()) return *found->second;
  std::string known;
  for (const auto& entry : tags_) known += (known.empty() ? "'" : ", '") + entry.first + "'";
  Error error(CUMEMPOOL_UNKNOWN_TAG, "no tag '" + name + "' was ever used");
  error.tag = name;
  error.advice =
      known.empty() ? "no tag is known yet: allocate under one first" : "known tags: " + known;
  throw error;
}

cumempool_on_sleep TagTable::on_sleep(const Tag& tag) const {
  const std::lock_guard lock(mutex_);
  return tag.on_sleep;
}

cumempool_on_wake TagTable::on_wake(const Tag& tag) const {
  const std::lock_guard lock(mutex_);
  return tag.on_wake;
}

BackupChoice TagTable::backup(const Tag& tag) const {
  const std::lock_guard lock(mutex_);
  return tag.backup;
}

void TagTable::set_backup(Tag& tag, const BackupChoice& choice) {
  BackupChoice copy = choice;  // made outside the lock; the move cannot fail
  const std::lock_guard lock(mutex_);
  tag.backup = std::move(copy);
}

MemoryChoice TagTable::memory(const Tag& tag) const {
  const std::lock_guard lock(mutex_);
  return tag.memory;
}

bool TagTable::follows_use(const Tag& tag) const {
  const std::lock_guard lock(mutex_);
  return tag.memory.follows_use();
}

bool TagTable::is_made_of(const Tag& tag, const MemoryChoice& choice) const {
  const std::lock_guard lock(mutex_);
  return tag.memory == choice;
}

void TagTable::set_memory(Tag& tag, const MemoryChoice& choice) {
  const std::lock_guard lock(mutex_);
  tag.memory = choice;
}

std::uint64_t TagTable::pin(Tag& tag, const std::string& holder) {
  const std::lock_guard lock(mutex_);
  tag.pins.emplace(next_pin_, holder);
  return next_pin_++;
}

bool TagTable::unpin(std::uint64_t pin) {
  const std::lock_guard lock(mutex_);
  for (const auto& entry : tags_) {
    if (entry.second->pins.erase(pin) != 0) return true;
  }
  return false;
}

std::string TagTable::holders(const Tag& tag) const {
  const std::lock_guard lock(mutex_);
  std::string names;
  for (const auto& entry : tag.pins) names += (names.empty() ? "'" : ", '") + entry.second + "'";
  return names;
}

std::size_t TagTable::pin_count(const Tag& tag) const {
  const std::lock_guard lock(mutex_);
  return tag.pins.size();
}

std::vector<const Tag*> TagTable::all() const {
  const std::lock_guard lock(mutex_);
  std::vector<const Tag*> tags;
  tags.reserve(tags_.size());
  for (const auto& entry : tags_) tags.push_back(entry.second.get());
  return tags;
}

// ---- the set of an allocator --------------------------------------------------------------------

bool RecordSet::add(const RecordPointer& record, const std::function<bool()>& still) {
  const std::lock_guard lock(mutex_);
  if (sealed_) throw Error(CUMEMPOOL_CLOSED, "the allocator is closed");
  if (!still()) return false;
  record->place = records_.insert(records_.end(), record);
  record->sequence = next_sequence_++;
  return true;
}

bool RecordSet::retire(const RecordPointer& record) {
  const std::lock_guard lock(mutex_);
  record->freed = true;
  if (record->claimed_by != nullptr) return false;
  records_.erase(record->place);
  return true;
}

std::vector<RecordPointer> RecordSet::claim(const char* operation,
                                            const std::function<bool(const Record&)>& wanted,
                                            const std::function<void()>& admit) {
  const std::lock_guard lock(mutex_);
  if (admit) admit();
  std::vector<RecordPointer> claimed;
  for (const RecordPointer& record : records_) {
    if (wanted(*record)) claimed.push_back(record);
  }
  for (const RecordPointer& record : claimed) record->claimed_by = operation;
  return claimed;
}

void RecordSet::begin_scope(Tag& tag) noexcept {
  const std::lock_guard lock(mutex_);
  tag.scopes += 1;
  tag.scopes_changed = next_sequence_++;
}

void RecordSet::end_scope(Tag& tag) noexcept {
  const std::lock_guard lock(mutex_);
  tag.scopes -= 1;
  tag.scopes_changed = next_sequence_++;
}

std::uint64_t RecordSet::moment() const noexcept {
  const std::lock_guard lock(mutex_);
  return next_sequence_;
}

void RecordSet::for_each(const std::function<void(Record&)>& visit,
                         const std::function<void()>& last) {
  const std::lock_guard lock(mutex_);
  for (const RecordPointer& record : records_) visit(*record);
  if (last) last();
}

std::uint64_t RecordSet::update_unless(const std::function<bool(const Record&)>& hinders,
                                       const std::function<void()>& change) {
  const std::lock_guard lock(mutex_);
  std::uint64_t bytes = 0;
  for (const RecordPointer& record : records_) bytes += hinders(*record) ? record->bytes : 0;
  if (bytes == 0) change();
  return bytes;
}

bool RecordSet::seal(bool only_if_empty) {
  const std::lock_guard lock(mutex_);
  if (only_if_empty && !records_.empty()) return false;
  sealed_ = true;
  return true;
}

// ---- the registry of the process ----------------------------------------------------------------

Registry& Registry::instance() {
  // Never destroyed: torch may free through a slot after static destructors have run (R14).
  static auto& registry = *new Registry;
  return registry;
}

void Registry::add(const RecordPointer& record) {
  const std::lock_guard lock(mutex_);
  records_.emplace_hint(records_.end(), record->address, record);  // addresses ascend, mostly
}

RecordPointer Registry::take(cumempool_address address) {
  const std::lock_guard lock(mutex_);
  const auto found = records_.find(address);
  if (found == records_.end()) return nullptr;
  RecordPointer record = found->second;
  records_.erase(found);
  return record;
}

RecordPointer Registry::find(cumempool_address address) const {
  const std::lock_guard lock(mutex_);
  const auto after = records_.upper_bound(address);
  if (after == records_.begin()) return nullptr;
  const RecordPointer& record = std::prev(after)->second;
  return address - record->address < record->bytes ? record : nullptr;
}

}  // namespace cumempool::pool
