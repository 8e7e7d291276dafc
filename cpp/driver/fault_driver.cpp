// A driver that fails on request, over any other driver.
#include "driver/fault_driver.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

// Every entry of the table, in its order.
#define CUMEMPOOL_DRIVER_ENTRIES(X) \
  X(init)                           \
  X(driver_version)                 \
  X(device_count)                   \
  X(device_name)                    \
  X(device_attribute)               \
  X(peer_access)                    \
  X(memory_info)                    \
  X(context_active)                 \
  X(context_retain)                 \
  X(context_release)                \
  X(context_enter)                  \
  X(context_leave)                  \
  X(granularity)                    \
  X(reserve)                        \
  X(unreserve)                      \
  X(create)                         \
  X(release)                        \
  X(map)                            \
  X(unmap)                          \
  X(set_access)                     \
  X(export_handle)                  \
  X(import_handle)                  \
  X(allocate)                       \
  X(deallocate)                     \
  X(host_register)                  \
  X(host_unregister)                \
  X(stream_create)                  \
  X(stream_destroy)                 \
  X(stream_synchronize)             \
  X(stream_is_capturing)            \
  X(event_create)                   \
  X(event_destroy)                  \
  X(event_record)                   \
  X(event_synchronize)              \
  X(event_query)                    \
  X(stream_wait_event)              \
  X(copy_to_host)                   \
  X(copy_to_device)                 \
  X(copy_on_device)                 \
  X(fill)                           \
  X(digest)                         \
  X(fence)

namespace cumempool::driver {
namespace {

enum Index : std::size_t {
#define CUMEMPOOL_INDEX(name) index_of_##name,
  CUMEMPOOL_DRIVER_ENTRIES(CUMEMPOOL_INDEX)
#undef CUMEMPOOL_INDEX
      entry_count
};

// The entries are the last and only functions of the table: a new one must be added above.
static_assert(offsetof(cumempool_driver, init) + entry_count * sizeof(&FaultDriver::entries) ==
                  sizeof(cumempool_driver),
              "CUMEMPOOL_DRIVER_ENTRIES does not list every entry of cumempool_driver");

thread_local int calls_under_way = 0;

struct Inside {
  Inside() { ++calls_under_way; }
  ~Inside() { --calls_under_way; }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;
};

template <std::size_t Entry, auto Member>
struct Decorated;

template <std::size_t Entry, typename... Args,
          cumempool_result (*cumempool_driver::*Member)(void*, Args...)>
struct Decorated<Entry, Member> {
  static cumempool_result call(void* self, Args... args) {
    auto& faults = *static_cast<FaultDriver*>(self);
    const Inside inside;
    if (const auto result = faults.before(Entry)) return result;
    return (faults.inner().*Member)(faults.inner().self, args...);
  }
};

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
#define CUMEMPOOL_NAME(name) #name,
      CUMEMPOOL_DRIVER_ENTRIES(CUMEMPOOL_NAME)
#undef CUMEMPOOL_NAME
  };
  return names;
}

FaultDriver::FaultDriver(const cumempool_driver& inner)
    : inner_(inner), calls_(entry_count, 0), excluded_(entry_count, false) {
  table_.version = inner.version;
  table_.size = inner.size;
  table_.name = inner.name;
  table_.self = this;
#define CUMEMPOOL_DECORATE(name) \
  table_.name = Decorated<index_of_##name, &cumempool_driver::name>::call;
  CUMEMPOOL_DRIVER_ENTRIES(CUMEMPOOL_DECORATE)
#undef CUMEMPOOL_DECORATE
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
  for (std::size_t entry = 0; entry < entry_count; ++entry) {
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
