// A driver that fails on request, over any other driver.
#include "fault_driver.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace cumempool::driver {
namespace {

thread_local int calls_under_way = 0;

struct Inside {
  Inside() { ++calls_under_way; }
  ~Inside() { --calls_under_way; }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;
};

// Stands in the table for the entry `Member`, which has the number `Entry` in entries.inc.
template <std::size_t Entry, auto Member, typename... Args>
cumempool_result decorated(void* self, Args... args) {
  auto& faults = *static_cast<FaultDriver*>(self);
  const Inside inside;
  if (const auto result = faults.before(Entry)) return result;
  return (faults.inner().*Member)(faults.inner().self, args...);
}

template <std::size_t Entry, auto Member, typename... Args>
void decorate(cumempool_driver& table, cumempool_result (*cumempool_driver::*)(void*, Args...)) {
  table.*Member = decorated<Entry, Member, Args...>;
}

std::size_t index_of(std::string_view entry) {
  const auto& names = FaultDriver::entries();
  const auto found = std::find(names.begin(), names.end(), entry);
  if (found == names.end()) {
    throw std::invalid_argument("no driver entry is called " + std::string(entry));
  }
  return static_cast<std::size_t>(found - names.begin());
}

}  // namespace

bool FaultDriver::inside_call() noexcept { return calls_under_way != 0; }

const std::vector<const char*>& FaultDriver::entries() {
  static const std::vector<const char*> names{
#define CUMEMPOOL_ENTRY(name, function, size) #name,
#include "driver/entries.inc"
  };
  return names;
}

FaultDriver::FaultDriver(const cumempool_driver& inner)
    : inner_(inner), calls_(entries().size(), 0), excluded_(entries().size(), false) {
  table_.version = inner.version;
  table_.size = inner.size;
  table_.name = inner.name;
  table_.self = this;
  constexpr std::size_t first = offsetof(cumempool_driver, init);
#define CUMEMPOOL_ENTRY(entry, function, size)                                 \
  decorate<(offsetof(cumempool_driver, entry) - first) / sizeof(table_.entry), \
           &cumempool_driver::entry>(table_, &cumempool_driver::entry);
#include "driver/entries.inc"
}

void FaultDriver::fail_nth(std::string_view entry, std::uint64_t n, cumempool_result result,
                           Repeat repeat) {
  if (n == 0) throw std::invalid_argument("calls are counted from 1");
  const std::lock_guard<std::mutex> lock(mutex_);
  plans_.push_back({index_of(entry), n, result, repeat});
}

void FaultDriver::fail_nth_of_any(std::uint64_t n, cumempool_result result, Repeat repeat) {
  if (n == 0) throw std::invalid_argument("calls are counted from 1");
  const std::lock_guard<std::mutex> lock(mutex_);
  plans_.push_back({std::nullopt, n, result, repeat});
}

void FaultDriver::exclude(std::string_view entry) {
  const std::lock_guard<std::mutex> lock(mutex_);
  excluded_[index_of(entry)] = true;
}

void FaultDriver::fail_nothing() {
  const std::lock_guard<std::mutex> lock(mutex_);
  plans_.clear();
}

void FaultDriver::observe(Observer observer) {
  auto shared = observer ? std::make_shared<const Observer>(std::move(observer)) : nullptr;
  const std::lock_guard<std::mutex> lock(mutex_);
  observer_ = std::move(shared);
}

std::uint64_t FaultDriver::calls(std::string_view entry) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return calls_[index_of(entry)];
}

std::uint64_t FaultDriver::calls() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::uint64_t total = 0;
  for (std::size_t entry = 0; entry < calls_.size(); ++entry) {
    if (!excluded_[entry]) total += calls_[entry];
  }
  return total;
}

std::uint64_t FaultDriver::failures() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return failures_;
}

void FaultDriver::reset_counts() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::fill(calls_.begin(), calls_.end(), 0);
  failures_ = 0;
}

cumempool_result FaultDriver::before(std::size_t entry) {
  std::shared_ptr<const Observer> observer;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    observer = observer_;
  }
  if (observer) (*observer)(entries()[entry]);
  const std::lock_guard<std::mutex> lock(mutex_);
  return decide(entry);
}

cumempool_result FaultDriver::decide(std::size_t entry) {
  ++calls_[entry];
  cumempool_result decision = CUMEMPOOL_RESULT_SUCCESS;
  for (Plan& plan : plans_) {
    if (plan.spent || (plan.entry ? *plan.entry != entry : excluded_[entry])) continue;
    if (plan.calls_left > 1) {
      --plan.calls_left;
      continue;
    }
    plan.spent = plan.repeat == Repeat::kOnce;
    if (decision == CUMEMPOOL_RESULT_SUCCESS) decision = plan.result;
  }
  if (decision != CUMEMPOOL_RESULT_SUCCESS) ++failures_;
  return decision;
}

}  // namespace cumempool::driver
