// An allocator: tags, devices, live records and the stores of backups over one driver.
#include "pool/allocator.hpp"

#include <algorithm>
#include <exception>
#include <functional>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <utility>

#include "driver/error.hpp"
#include "pool/records.hpp"

namespace cumempool::pool {

// ---- one transition at a time -------------------------------------------------------------------

void TransitionLock::refuse_locked(const char* operation) const {
  if (operation_ == nullptr || owner_ != std::this_thread::get_id()) return;
  Error error(CUMEMPOOL_BUSY,
              std::string("called from inside a ") + operation_ + " of the same allocator");
  error.operation = operation;
  error.advice = "call it after that one has returned";
  throw error;
}

void TransitionLock::refuse_inside(const char* operation) const {
  const std::lock_guard lock(mutex_);
  refuse_locked(operation);
}

void TransitionLock::begin(const char* operation) noexcept {
  operation_ = operation;
  owner_ = std::this_thread::get_id();
}

TransitionLock::Turn TransitionLock::enter(const char* operation) {
  std::unique_lock lock(mutex_);
  refuse_locked(operation);
  free_.wait(lock, [this] { return operation_ == nullptr; });
  begin(operation);
  return {*this, std::adopt_lock};
}

TransitionLock::Turn TransitionLock::try_enter(const char* operation) noexcept {
  const std::lock_guard lock(mutex_);
  if (operation_ != nullptr) return {};
  begin(operation);
  return {*this, std::adopt_lock};
}

void TransitionLock::unlock() noexcept {
  {
    const std::lock_guard lock(mutex_);
    operation_ = nullptr;
  }
  free_.notify_one();
}

// ---- the allocator ------------------------------------------------------------------------------

namespace {

constexpr std::size_t kLargest = std::size_t{1} << 62;
constexpr std::size_t kMostProblems = 64;  // that a close reports one by one

std::optional<BackupChoice> overflow_of(const cumempool_allocator_options& options) {
  if (options.overflow.tier == CUMEMPOOL_BACKUP_UNSET) return std::nullopt;
  BackupChoice choice = backup_choice(options.overflow);
  if (choice.tier == CUMEMPOOL_BACKUP_PINNED || choice.tier == CUMEMPOOL_BACKUP_PEER) {
    throw Error(CUMEMPOOL_INVALID_ARGUMENT,
                "backups beyond the limit can only go to pageable memory or a file");
  }
  return choice;
}

std::uint64_t random_seed() {
  std::random_device source;
  return (std::uint64_t{source()} << 32) | source();
}

}  // namespace

void annotate(Error& error, const char* operation, const Record* record) {
  if (error.operation.empty()) error.operation = operation;
  if (record == nullptr) return;
  if (error.tag.empty()) error.tag = record->tag->name;
  if (error.device < 0) error.device = record->device;
}

std::string failure_text(const std::exception& caught, const char* operation,
                         const Record* record) noexcept {
  try {
    const auto* known = dynamic_cast<const Error*>(&caught);
    Error error = known != nullptr ? *known : Error(CUMEMPOOL_OUT_OF_HOST_MEMORY, caught.what());
    annotate(error, operation, record);
    return error.message();
  } catch (const std::exception&) {
    return "out of memory";  // short enough to need none
  }
}

void add_secondary(Error& failure, std::string&& text, const char* before) noexcept {
  try {
    failure.secondary.push_back(before + text);
  } catch (const std::exception&) {
    return;  // no memory for it: the states of the allocations show it
  }
}

Allocator::Allocator(driver::Driver driver, const cumempool_allocator_options& options)
    : driver_(driver),
      reaper_(std::make_shared<Reaper>(driver)),
      retains_backups_(options.retain_backups != 0),
      overflow_(overflow_of(options)),
      digest_seed_(random_seed()),
      devices_(driver),
      stores_(driver, options.host_backup_limit) {
  driver_.init();
  one_device_ = driver_.device_count() <= 1;
}

Allocator::~Allocator() {
  // Runs only when no record is left. Unpinning host memory needs the contexts.
  try {
    trim_stores();
  } catch (const Error&) {
    // The contexts are gone. HostArena leaves memory mapped that may still be pinned.
    return;
  }
}

void Allocator::check_open(const char* operation) const {
  if (!closed_) return;
  Error error(CUMEMPOOL_CLOSED, "the allocator is closed");
  error.operation = operation;
  error.advice = "make a new allocator";
  throw error;
}

std::size_t Allocator::round_up(const Device& device, std::size_t bytes) const {
  if (bytes == 0 || bytes > kLargest) {
    throw Error(CUMEMPOOL_INVALID_ARGUMENT,
                "a size of " + std::to_string(bytes) + " bytes cannot be allocated");
  }
  const std::size_t granularity = device.kind().granularity;
  return (bytes + granularity - 1) / granularity * granularity;
}

// Throws Error if the allocation would leave less than the margin for other programs and libraries.
void Allocator::refuse_below_margin(const Device& device, std::size_t bytes) const {
  const std::uint64_t margin = memory_margin_;
  if (margin == 0) return;
  std::uint64_t free = 0;
  std::uint64_t total = 0;
  const driver::ContextScope scope(driver_, device.ordinal());
  driver_.memory_info(device.ordinal(), &free, &total);
  if (free >= bytes && free - bytes >= margin) return;
  Error error(CUMEMPOOL_OUT_OF_MEMORY, "the memory margin of " + format_bytes(margin) +
                                           " would not stay free on the device");
  error.bytes = bytes;
  error.free_bytes = free;
  error.total_bytes = total;
  error.advice = "free device memory, or set a smaller margin";
  throw error;
}

cumempool_address Allocator::malloc(const Tag& tag, int device, std::size_t bytes, bool preserved) {
  counters_.malloc_calls += 1;
  try {
    check_open("malloc");
    const std::shared_ptr<Device> on = devices_.at(device);
    const std::size_t rounded = round_up(*on, bytes);
    return with_freed_memory([&] {
      refuse_below_margin(*on, rounded);
      for (;;) {
        const MemoryChoice choice = tags_.memory(tag);
        const auto record = std::make_shared<Record>(shared_from_this(), tag, device, bytes,
                                                     make_memory(choice, *on, rounded), preserved);
        const std::vector<int> in_use = devices_in_use();
        if (!publish(record, choice, in_use)) continue;
        if (!one_device_) follow_use_since(in_use);
        return record->address;
      }
    });
  } catch (Error& error) {
    annotate(error, "malloc", nullptr);
    error.tag = tag.name;
    error.device = device;
    if (error.bytes == 0) error.bytes = bytes;
    note_malloc_failure(error.message());
    throw;
  }
}

void Allocator::set_memory(Tag& tag, const MemoryChoice& choice) {
  check_peers(choice);
  const TransitionLock::Turn turn = transition_lock_.enter("set_memory");
  if (tags_.is_made_of(tag, choice)) return;
  // In one step: allocations under way look at the choice again when they are published.
  const std::uint64_t bytes =
      records_.update_unless([&](const Record& record) { return record.tag == &tag; },
                             [&] { tags_.set_memory(tag, choice); });
  if (bytes != 0) {
    Error error(CUMEMPOOL_IN_USE,
                format_bytes(bytes) + " of the tag are live and were made otherwise");
    error.advice = "choose backing, peers and rdma before the first allocation of the tag";
    throw error;
  }
}

void Allocator::preserve(cumempool_address address) {
  // In a turn: transitions read `preserved` without the lock.
  const TransitionLock::Turn turn = transition_lock_.enter("preserve");
  const RecordPointer record = Registry::instance().find(address);
  bool lives = false;
  if (record != nullptr && record->owner.get() == this) {
    records_.update([&] {
      lives = !record->freed;
      record->preserved = true;
    });
  }
  if (lives) return;
  Error error(CUMEMPOOL_NOT_OWNED, "the address lies in no allocation of the allocator");
  error.operation = "preserve";
  error.advice = "pass a tensor of the allocator's pools";
  throw error;
}

// Refuses peers that can reach no device at all. malloc() checks whether they reach the device of
// an allocation.
void Allocator::check_peers(const MemoryChoice& choice) const {
  if (choice.peers.empty()) return;
  const int count = driver_.device_count();
  const auto reaches_another = [&](int peer) {
    for (int other = 0; other < count; ++other) {
      if (other != peer && driver_.peer_access(peer, other)) return true;
    }
    return count == 1;  // there is no other
  };
  for (const int peer : choice.peers) {
    const std::string name = "device " + std::to_string(peer);
    if (peer < 0 || peer >= count) {
      Error error(CUMEMPOOL_INVALID_ARGUMENT, "there is no " + name + " to give access to");
      error.advice = "the driver has " + std::to_string(count) + " device(s), counted from 0";
      throw error;
    }
    if (reaches_another(peer)) continue;
    Error error(CUMEMPOOL_UNSUPPORTED, name + " cannot reach memory of any other device");
    error.advice = "leave it out of peers; nvidia-smi topo -p2p rw says which reach each other";
    throw error;
  }
}

vmm::Allocation Allocator::make_memory(const MemoryChoice& choice, const Device& on,
                                       std::size_t bytes) {
  if (choice.backing == CUMEMPOOL_BACKING_CUDA_MALLOC) {
    return {driver_, memory_stats_, on.ordinal(), bytes};
  }
  cumempool_memory_properties properties = on.kind().properties;
  if (!choice.rdma) properties.rdma = 0;  // less than the kind that was tried, so it works (R8)
  return {driver_, memory_stats_, properties, bytes, users_of(choice, on.ordinal())};
}

// Returns the device of the memory and its peers.
std::vector<int> Allocator::users_of(const MemoryChoice& choice, int device) const {
  std::vector<int> users{device};
  const int count = choice.all_peers ? driver_.device_count() : 0;
  for (int other = 0; other < count; ++other) {
    if (other != device && driver_.peer_access(other, device)) users.push_back(other);
  }
  for (const int peer : choice.peers) {
    if (std::find(users.begin(), users.end(), peer) != users.end()) continue;
    if (!driver_.peer_access(peer, device)) {
      Error error(CUMEMPOOL_UNSUPPORTED,
                  "device " + std::to_string(peer) + " cannot reach memory of the device");
      error.advice = "leave it out of peers; nvidia-smi topo -p2p rw says which reach each other";
      throw error;
    }
    users.push_back(peer);
  }
  return users;
}

std::vector<int> Allocator::devices_in_use() const noexcept {
  std::vector<int> devices;
  if (one_device_) return devices;
  try {
    const int count = driver_.device_count();
    for (int device = 0; device < count; ++device) {
      if (driver_.context_active(device)) devices.push_back(device);
    }
  } catch (const std::exception&) {
    devices.clear();
  }
  return devices;
}

void Allocator::follow_use(Record& record, const std::vector<int>& in_use) noexcept {
  if (one_device_ || !record.memory.can_extend()) return;
  try {
    if (!tags_.follows_use(*record.tag)) return;
    std::vector<int> peers;
    for (const int peer : in_use) {
      if (peer != record.device && driver_.peer_access(peer, record.device)) peers.push_back(peer);
    }
    record.memory.extend(peers);
  } catch (const std::exception&) {
    return;  // as if no peer could reach it
  }
}

void Allocator::follow_use() noexcept {
  if (one_device_) return;
  const std::vector<int> in_use = devices_in_use();
  {
    const std::lock_guard lock(aside_mutex_);
    if (in_use == followed_) return;
  }
  const TransitionLock::Turn turn = transition_lock_.try_enter("giving access to peers");
  if (turn.owns_lock()) follow_use_inside();
}

void Allocator::follow_use_inside() noexcept {
  if (one_device_) return;
  std::vector<int> in_use = devices_in_use();
  {
    const std::lock_guard lock(aside_mutex_);
    if (in_use == followed_) return;
  }
  std::vector<RecordPointer> claimed;
  try {
    claimed = records_.claim("giving access to peers", [](const Record& record) {
      return !record.contents.asleep() && !record.freed;
    });
  } catch (const std::exception&) {
    return;  // the next call tries again
  }
  for (const RecordPointer& record : claimed) follow_use(*record, in_use);
  {
    const std::lock_guard lock(aside_mutex_);
    followed_.swap(in_use);
  }
  unclaim(claimed);
}

// Gives access for a record that was not yet published when a device came into use.
void Allocator::follow_use_since(const std::vector<int>& seen) noexcept {
  if (devices_in_use() != seen) {
    const std::lock_guard lock(aside_mutex_);
    followed_.clear();
  }
  follow_use();
}

// Returns false, with nothing held, if the tag's memory must be made otherwise by now.
bool Allocator::publish(const RecordPointer& record, const MemoryChoice& made_of,
                        const std::vector<int>& in_use) {
  const auto still = [&] { return tags_.is_made_of(*record->tag, made_of); };
  try {
    record->memory.map();
    follow_use(*record, in_use);
    if (!records_.add(record, std::cref(still))) {
      reaper_->take(record);
      return false;
    }
  } catch (const std::exception&) {
    reaper_->take(record);  // leaks it if the driver refuses to take it back
    throw;
  }
  try {
    Registry::instance().add(record);
  } catch (const std::exception&) {  // out of host memory: it could never be freed
    if (records_.retire(record)) reaper_->take(record);
    throw;
  }
  return true;
}

void Allocator::note_malloc_failure(const std::string& why) noexcept {
  counters_.malloc_failures += 1;
  try {
    const std::lock_guard lock(aside_mutex_);
    last_malloc_failure_ = why;
  } catch (const std::exception&) {
    // No host memory for the text: the count still shows the failure.
  }
}

std::string Allocator::last_malloc_failure() const {
  const std::lock_guard lock(aside_mutex_);
  return last_malloc_failure_;
}

void Allocator::free(const RecordPointer& record) noexcept {
  counters_.free_calls += 1;
  // Keeps the context, which the teardown needs, while another thread may be closing.
  const std::shared_ptr<Device> device = devices_.find(record->device);
  if (records_.retire(record)) reaper_->take(record);
}

void Allocator::unclaim(const std::vector<RecordPointer>& claimed) noexcept {
  RecordList freed;
  records_.unclaim(claimed, [&](const RecordPointer& record) { freed.push(record); });
  while (const RecordPointer record = freed.pop()) reaper_->take(record);
}

std::uint64_t Allocator::trim_stores() {
  release_leaked();
  std::uint64_t released = 0;
  std::optional<Error> failure;  // of the first device; the others still release what they can
  for (const auto& device : devices_.used()) {
    try {
      const driver::ContextScope scope(driver_, device->ordinal());
      released += device->release_buffers();
      released += stores_.trim(device->ordinal());
    } catch (const Error& error) {
      if (!failure) failure = error;
    }
  }
  if (failure) throw Error(*failure);
  return released;
}

bool Allocator::drop_retained(std::uint64_t bytes) {
  std::vector<std::shared_ptr<backup::Backup>> dropped;  // outside of the records' lock
  std::uint64_t freed = 0;
  records_.for_each([&](Record& record) {
    const auto& backup = record.contents.backup();
    if (record.claimed_by != nullptr || backup == nullptr || freed >= bytes) return;
    if (record.contents.asleep()) return;
    const cumempool_backup_tier tier = backup->tier();
    if (tier != CUMEMPOOL_BACKUP_PINNED && tier != CUMEMPOOL_BACKUP_PAGEABLE) return;
    freed += backup->bytes();
    dropped.emplace_back();  // takes memory before anything changes
    dropped.back() = record.contents.drop_retained();
  });
  return !dropped.empty();
}

void Allocator::leak(const std::shared_ptr<backup::Backup>& backup, int device) noexcept {
  const std::lock_guard lock(aside_mutex_);
  for (const backup::Backup* one = leaked_.get(); one != nullptr; one = one->next.get()) {
    if (one == backup.get()) return;  // leaked by an earlier failure
  }
  backup->leaked_by = device;
  backup->next = std::move(leaked_);
  leaked_ = backup;
}

void Allocator::release_leaked() noexcept {
  stores_.peers().release_leaked();
  {
    const std::lock_guard lock(aside_mutex_);
    if (leaked_ == nullptr) return;
  }
  for (const auto& device : devices_.used()) {
    try {
      const driver::ContextScope scope(driver_, device->ordinal());
      device->settle();
      driver_.fence({device->ordinal()});
    } catch (const std::exception&) {
      continue;  // the backups of this device stay
    }
    release_backups_of(device->ordinal());
  }
}

void Allocator::release_backups_of(int device) noexcept {
  std::shared_ptr<backup::Backup> released;  // outside of the lock
  {
    const std::lock_guard lock(aside_mutex_);
    for (std::shared_ptr<backup::Backup>* at = &leaked_; *at != nullptr;) {
      if ((*at)->leaked_by != device) {
        at = &(*at)->next;
        continue;
      }
      std::shared_ptr<backup::Backup> one = std::exchange(*at, std::move((*at)->next));
      one->next = std::exchange(released, nullptr);
      released = std::move(one);
    }
  }
  while (released != nullptr) released = std::exchange(released->next, nullptr);
}

std::uint64_t Allocator::release_host_memory() {
  const TransitionLock::Turn turn = transition_lock_.enter("release_host_memory");
  check_open("release_host_memory");
  {
    std::vector<std::shared_ptr<backup::Backup>> dropped;  // outside of the records' lock
    records_.for_each([&](Record& record) { dropped.push_back(record.contents.drop_retained()); });
  }
  return trim_stores();
}

void Allocator::close(bool force) {
  const TransitionLock::Turn turn = transition_lock_.enter("close");
  if (!closed_) {
    if (!force) refuse_close_in_use();
    records_.seal(false);
    closed_ = true;
  }
  reaper_->seal();
  // A repeated close continues where this one fails.
  const std::vector<std::string> problems = give_everything_back();
  if (problems.empty() && !reaper_->holds_leaked() && holds_nothing()) {
    if (!context_needed()) devices_.close();
    return;
  }
  Error error(CUMEMPOOL_DRIVER_ERROR,
              "the allocator is closed, but some memory was not given back");
  error.operation = "close";
  error.bytes = memory_stats_.physical_bytes + stores_.pinned_bytes();
  error.advice = "close it again; if the driver keeps refusing, end the process";
  error.secondary = problems;
  throw error;
}

std::vector<std::string> Allocator::give_everything_back() {
  std::vector<std::string> problems;
  const auto attempt = [&](const Record* record, const auto& step) {
    try {
      step();
    } catch (const std::exception& caught) {
      // If there is no room for the message, the next close meets the problem again.
      if (problems.size() < problems.capacity())
        problems.push_back(failure_text(caught, "close", record));
    }
  };
  problems.reserve(kMostProblems);
  const auto all = records_.claim("close", [](const Record&) { return true; });
  for (const RecordPointer& record : all) attempt(record.get(), [&] { vacate(*record); });
  unclaim(all);
  attempt(nullptr, [&] { trim_stores(); });
  attempt(nullptr, [&] {
    for (const auto& device : devices_.used()) attempt(nullptr, [&] { device->drop_streams(); });
  });
  return problems;
}

bool Allocator::holds_nothing() const {
  return stores_.pinned_bytes() == 0 && stores_.peers().empty();
}

// Whether memory is left that cannot sleep: it needs its context until it is freed.
bool Allocator::context_needed() {
  bool lives = false;
  records_.for_each([&](const Record& record) { lives = lives || !record.memory.can_sleep(); });
  return lives;
}

void Allocator::refuse_close_in_use() {
  const auto bound = counters_.bound_slots.load();
  const auto views = counters_.open_views.load();
  std::map<std::string, std::uint64_t> bytes_by_tag;
  // Seals only an empty set, so that no allocation can come after the check.
  if (bound == 0 && views == 0 && records_.seal(true)) return;
  records_.for_each([&](const Record& record) { bytes_by_tag[record.tag->name] += record.bytes; });
  std::string what;
  for (const auto& [tag, bytes] : bytes_by_tag) {
    what += (what.empty() ? "" : ", ") + format_bytes(bytes) + " under '" + tag + "'";
  }
  if (bound != 0) {
    what += (what.empty() ? "" : ", ") + std::to_string(bound) + " open scope(s) or graph pool(s)";
  }
  if (views != 0) what += (what.empty() ? "" : ", ") + std::to_string(views) + " open view(s)";
  Error error(CUMEMPOOL_IN_USE, "still in use: " + what);
  error.operation = "close";
  error.advice = "leave the scopes and delete the tensors, or close with force";
  throw error;
}

// Releases physical memory and backup; the address stays reserved until the program frees it.
// Memory that cannot sleep stays until then, since the driver would give its address to others.
void Allocator::vacate(Record& record) {
  if (!record.memory.can_sleep()) return;
  if (record.memory.mapped()) driver_.fence(record.memory.access());
  Contents::BackupPointer dropped;
  records_.update([&] { dropped = record.contents.discard(); });
  record.memory.vacate();
}

}  // namespace cumempool::pool
