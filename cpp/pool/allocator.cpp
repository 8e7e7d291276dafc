// An allocator: tags, devices, live records and pinned host memory over one driver.
#include "pool/allocator.hpp"

#include <map>
#include <utility>

#include "pool/registry.hpp"

namespace cumempool::pool {
namespace {

constexpr std::size_t kLargest = std::size_t{1} << 62;

}  // namespace

void annotate(Error& error, const char* operation, const Record* record) {
  if (error.operation.empty()) error.operation = operation;
  if (record == nullptr) return;
  if (error.tag.empty()) error.tag = record->tag->name;
  if (error.device < 0) error.device = record->device;
}

Allocator::Allocator(driver::Driver driver, const cumempool_allocator_options& options)
    : driver_(driver), devices_(driver), arena_(driver, options.host_backup_limit) {
  driver_.init();
}

Allocator::~Allocator() {
  // Only reached once no record is left. Contexts must still be there to unpin host memory.
  try {
    trim_arena();
  } catch (const Error&) {
    // The contexts are gone; PinnedBlock leaves memory mapped that may still be pinned.
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

cumempool_address Allocator::malloc(const Tag& tag, int device, std::size_t bytes) {
  counters_.malloc_calls += 1;
  try {
    check_open("malloc");
    bury({});  // what the driver did not take back may be what is missing now
    const std::shared_ptr<Device> on = devices_.at(device);
    const std::size_t rounded = round_up(*on, bytes);
    const auto record =
        std::make_shared<Record>(shared_from_this(), tag, device, bytes,
                                 vmm::Allocation(driver_, ledger_, on->kind().properties, rounded));
    publish(record);
    return record->address;
  } catch (Error& error) {
    annotate(error, "malloc", nullptr);
    error.tag = tag.name;
    error.device = device;
    if (error.bytes == 0) error.bytes = bytes;
    note_malloc_failure(error.message());
    throw;
  }
}

void Allocator::publish(const RecordPointer& record) {
  try {
    record->memory.map();
    records_.add(record);
  } catch (const std::exception&) {
    bury({record});  // kept, should the driver not take back what it gave
    throw;
  }
  Registry::instance().add(record);
}

void Allocator::note_malloc_failure(const std::string& why) noexcept {
  counters_.malloc_failures += 1;
  const std::lock_guard lock(aside_mutex_);
  last_malloc_failure_ = why;
}

std::string Allocator::last_malloc_failure() const {
  const std::lock_guard lock(aside_mutex_);
  return last_malloc_failure_;
}

void Allocator::free(const RecordPointer& record) noexcept {
  counters_.free_calls += 1;
  // Held across the teardown, which needs the context: another thread may be closing.
  const std::shared_ptr<Device> device = devices_.find(record->device);
  if (records_.retire(record)) bury({record});
}

void Allocator::bury(std::vector<RecordPointer> records) noexcept {
  {
    const std::lock_guard lock(aside_mutex_);
    records.insert(records.end(), graveyard_.begin(), graveyard_.end());
    graveyard_.clear();
  }
  std::vector<RecordPointer> left;
  for (RecordPointer& record : records) {
    if (!tear_down(*record)) left.push_back(std::move(record));
  }
  if (left.empty()) return;
  const std::lock_guard lock(aside_mutex_);
  graveyard_.insert(graveyard_.end(), left.begin(), left.end());
}

bool Allocator::tear_down(Record& record) noexcept {
  if (record.memory.mapped()) {
    try {
      const driver::ContextScope scope(driver_, record.device);
      driver_.fence(record.device);
    } catch (const Error&) {
      return false;  // work may still be in flight (R5): tried again later
    }
  }
  record.backup.reset();
  return record.memory.teardown() == CUMEMPOOL_RESULT_SUCCESS;
}

std::uint64_t Allocator::pending_free_bytes() const {
  const std::lock_guard lock(aside_mutex_);
  std::uint64_t bytes = 0;
  for (const RecordPointer& record : graveyard_) bytes += record->bytes;
  return bytes;
}

std::uint64_t Allocator::trim_arena() {
  std::uint64_t released = 0;
  for (const auto& device : devices_.used()) {
    const driver::ContextScope scope(driver_, device->ordinal());
    released += arena_.trim(device->ordinal());
    if (arena_.held_bytes() == 0) break;
  }
  return released;
}

std::uint64_t Allocator::release_host_memory() {
  const Turnstile::Turn turn(turnstile_, "release_host_memory");
  check_open("release_host_memory");
  return trim_arena();
}

void Allocator::close(bool force) {
  const Turnstile::Turn turn(turnstile_, "close");
  bury({});
  if (!closed_) {
    if (!force) refuse_close_in_use();
    records_.seal(false);
    closed_ = true;
  }
  // From here on a repeated close goes on where this one fails.
  const std::vector<std::string> problems = give_everything_back();
  if (problems.empty() && pending_free_bytes() == 0 && arena_.held_bytes() == 0) {
    devices_.close();
    return;
  }
  Error error(CUMEMPOOL_DRIVER_ERROR,
              "the allocator is closed, but some memory was not given back");
  error.operation = "close";
  error.bytes = ledger_.physical_bytes + arena_.held_bytes();
  error.advice = "close it again; where the driver refuses for good, end the process";
  error.secondary = problems;
  throw error;
}

std::vector<std::string> Allocator::give_everything_back() {
  std::vector<std::string> problems;
  const auto attempt = [&](const Record* record, const auto& step) {
    try {
      step();
    } catch (Error& error) {
      annotate(error, "close", record);
      problems.push_back(error.account());
    }
  };
  const auto all = records_.claim([](const Record&) { return true; });
  for (const RecordPointer& record : all) attempt(record.get(), [&] { vacate(*record); });
  bury(records_.unclaim(all));
  attempt(nullptr, [&] { trim_arena(); });
  for (const auto& device : devices_.used()) attempt(nullptr, [&] { device->drop_queue(); });
  return problems;
}

void Allocator::refuse_close_in_use() {
  const auto bound = counters_.bound_slots.load();
  std::map<std::string, std::uint64_t> bytes_by_tag;
  // Sealed only when nothing lives, so that no allocation can slip in after the check.
  if (bound == 0 && records_.seal(true)) return;
  records_.for_each([&](const Record& record) { bytes_by_tag[record.tag->name] += record.bytes; });
  std::string what;
  for (const auto& [tag, bytes] : bytes_by_tag) {
    what += (what.empty() ? "" : ", ") + format_bytes(bytes) + " under '" + tag + "'";
  }
  if (bound != 0) what += (what.empty() ? "" : ", ") + std::to_string(bound) + " open scope(s)";
  Error error(CUMEMPOOL_IN_USE, "still in use: " + what);
  error.operation = "close";
  error.advice = "leave the scopes and delete the tensors, or close with force";
  throw error;
}

// Physical memory and backup go; the address stays reserved until the program frees it.
void Allocator::vacate(Record& record) {
  if (record.memory.mapped()) {
    const driver::ContextScope scope(driver_, record.device);
    driver_.fence(record.device);
  }
  record.memory.unmap();
  records_.update([&] {
    record.asleep = true;
    record.unreleased = record.memory.holds_physical();
    record.intact = false;
    record.backup.reset();
  });
  driver::check(driver_.table(), "release", record.memory.release_physical(), record.device,
                record.bytes);
  records_.update([&] { record.unreleased = false; });
}

}  // namespace cumempool::pool
