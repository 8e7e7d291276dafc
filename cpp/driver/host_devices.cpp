// The simulated devices of one host driver: its entries, by family.
#include "driver/host_devices.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <map>
#include <numeric>
#include <string>

#include "driver/digest.hpp"

namespace cumempool::driver {
namespace {

using Stack = std::vector<int>;  // the last device is current

std::uint64_t next_serial() {
  static std::atomic<std::uint64_t> serial{0};
  return ++serial;
}

std::map<std::uint64_t, Stack>& stacks_of_thread() {
  thread_local std::map<std::uint64_t, Stack> stacks;
  return stacks;
}

}  // namespace

HostContexts::HostContexts(int device_count)
    : serial_(next_serial()),
      retains_(static_cast<std::size_t>(device_count), 0),
      others_(static_cast<std::size_t>(device_count), 0) {}

cumempool_result HostContexts::enter(int device, cumempool_context_token& token) {
  if (!held(device)) return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  Stack& stack = stacks_of_thread()[serial_];
  stack.push_back(device);
  ++entered_;
  token = {static_cast<std::uint64_t>(stack.size()), 0, device};
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostContexts::leave(const cumempool_context_token& token) {
  auto& stacks = stacks_of_thread();
  const auto found = stacks.find(serial_);
  if (found == stacks.end() || found->second.empty()) return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  Stack& stack = found->second;
  if (token.context != stack.size() || token.device != stack.back()) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  stack.pop_back();
  if (stack.empty()) stacks.erase(found);
  --entered_;
  return CUMEMPOOL_RESULT_SUCCESS;
}

bool HostContexts::current(int device) const {
  const auto& stacks = stacks_of_thread();
  const auto found = stacks.find(serial_);
  return found != stacks.end() && !found->second.empty() && found->second.back() == device &&
         held(device);
}

std::uint64_t HostContexts::retained() const {
  return std::accumulate(retains_.begin(), retains_.end(), std::uint64_t{0});
}

namespace {

std::uintptr_t number(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

}  // namespace

cumempool_result HostRegistrations::add(const void* pointer, std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = number(pointer);
  if (begin == 0 || begin % page != 0 || bytes == 0 || bytes % page != 0 || begin + bytes < begin) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  const auto next = ranges_.lower_bound(begin);
  if ((next != ranges_.end() && next->first - begin < bytes) ||
      (next != ranges_.begin() && begin - std::prev(next)->first < std::prev(next)->second)) {
    return CUMEMPOOL_RESULT_HOST_MEMORY_ALREADY_REGISTERED;
  }
  // msync changes nothing here, but fails if a page is not mapped.
  if (msync(const_cast<void*>(pointer), bytes, MS_ASYNC) != 0) {  // NOLINT
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  ranges_.emplace(begin, bytes);
  return CUMEMPOOL_RESULT_SUCCESS;
}

std::size_t HostRegistrations::bytes_at(const void* pointer) const {
  const auto found = ranges_.find(number(pointer));
  return found == ranges_.end() ? 0 : found->second;
}

void HostRegistrations::remove(const void* pointer) { ranges_.erase(number(pointer)); }

bool HostRegistrations::holds(const void* pointer, std::size_t bytes) const {
  const std::uintptr_t begin = number(pointer);
  const auto next = ranges_.upper_bound(begin);
  if (next == ranges_.begin()) return false;
  const auto& [range, size] = *std::prev(next);
  return begin - range <= size && bytes <= size - (begin - range);
}

std::uint64_t HostRegistrations::bytes() const {
  std::uint64_t total = 0;
  for (const auto& range : ranges_) total += range.second;
  return total;
}

HostDevices::HostDevices(const cumempool_host_driver_options& options)
    : options_(options), contexts_(options.device_count), memory_(options) {
  for (int device = 0; device < options.device_count; ++device) {
    works_.push_back(std::make_unique<HostWork>(device, mutex_, ran_, memory_, works_));
  }
}

// ---- devices and contexts -------------------------------------------------------------------

cumempool_result HostDevices::check_device(int device) const {
  if (!initialised_) return CUMEMPOOL_RESULT_NOT_INITIALIZED;
  return exists(device) ? CUMEMPOOL_RESULT_SUCCESS : CUMEMPOOL_RESULT_INVALID_DEVICE;
}

// The first check of every [context] entry (C3).
cumempool_result HostDevices::check_context(int device) {
  if (const auto result = check_device(device)) return result;
  return contexts_.current(device) ? work(device).error() : CUMEMPOOL_RESULT_INVALID_CONTEXT;
}

cumempool_result HostDevices::init() {
  const std::lock_guard<std::mutex> lock(mutex_);
  initialised_ = true;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostDevices::driver_version(int* version) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!initialised_) return CUMEMPOOL_RESULT_NOT_INITIALIZED;
  if (version == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  *version = 13000;  // it behaves as CUDA 13.0 does
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostDevices::device_count(int* count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!initialised_) return CUMEMPOOL_RESULT_NOT_INITIALIZED;
  if (count == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  *count = options_.device_count;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostDevices::device_name(int device, char* name, std::size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_device(device)) return result;
  if (name == nullptr || bytes == 0) return CUMEMPOOL_RESULT_INVALID_VALUE;
  const std::string text = "cumempool host device " + std::to_string(device);
  name[text.copy(name, bytes - 1)] = '\0';
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostDevices::device_attribute(int device, cumempool_device_attribute attribute,
                                               int* value) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_device(device)) return result;
  if (value == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  switch (attribute) {
    case CUMEMPOOL_ATTRIBUTE_VIRTUAL_MEMORY:
      *value = 1;
      return CUMEMPOOL_RESULT_SUCCESS;
    case CUMEMPOOL_ATTRIBUTE_POSIX_FD:
      *value = (options_.handle_types & CUMEMPOOL_HANDLE_POSIX_FD) != 0 ? 1 : 0;
      return CUMEMPOOL_RESULT_SUCCESS;
    case CUMEMPOOL_ATTRIBUTE_RDMA:
      *value = options_.rdma != 0 ? 1 : 0;
      return CUMEMPOOL_RESULT_SUCCESS;
    case CUMEMPOOL_ATTRIBUTE_FABRIC:
      *value = (options_.handle_types & CUMEMPOOL_HANDLE_FABRIC) != 0 ? 1 : 0;
      return CUMEMPOOL_RESULT_SUCCESS;
    case CUMEMPOOL_ATTRIBUTE_COMPUTE_MAJOR:
    case CUMEMPOOL_ATTRIBUTE_COMPUTE_MINOR:
      *value = 0;
      return CUMEMPOOL_RESULT_SUCCESS;
    case CUMEMPOOL_ATTRIBUTE_HOST_NUMA:
      *value = -1;
      return CUMEMPOOL_RESULT_SUCCESS;
    case CUMEMPOOL_ATTRIBUTE_FENCE:
      *value = fence_way();
      return CUMEMPOOL_RESULT_SUCCESS;
  }
  return CUMEMPOOL_RESULT_INVALID_VALUE;
}

cumempool_result HostDevices::peer_access(int device, int peer, int* possible) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_device(device)) return result;
  if (const auto result = check_device(peer)) return result;
  if (possible == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  *possible = device == peer || memory_.peers() ? 1 : 0;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostDevices::memory_info(int device, std::uint64_t* free_bytes,
                                          std::uint64_t* total_bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_context(device)) return result;
  if (free_bytes == nullptr || total_bytes == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  *free_bytes = memory_.free_bytes(device);
  *total_bytes = options_.bytes_per_device;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostDevices::context_active(int device, int* active) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_device(device)) return result;
  if (active == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  *active = contexts_.active(device) ? 1 : 0;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostDevices::context_retain(int device) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_device(device)) return result;
  contexts_.retain(device);
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostDevices::context_release(int device) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_device(device)) return result;
  if (!contexts_.held(device)) return CUMEMPOOL_RESULT_INVALID_CONTEXT;
  if (contexts_.release(device)) lose_context(device);
  return CUMEMPOOL_RESULT_SUCCESS;
}

void HostDevices::lose_context(int device) {
  work(device).lose_context();
  memory_.lose_allocations(device);
}

cumempool_result HostDevices::context_enter(int device, cumempool_context_token* token) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_device(device)) return result;
  if (token == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  return contexts_.enter(device, *token);
}

cumempool_result HostDevices::context_leave(const cumempool_context_token* token) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!initialised_) return CUMEMPOOL_RESULT_NOT_INITIALIZED;
  if (token == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  return contexts_.leave(*token);
}

// ---- memory ---------------------------------------------------------------------------------

cumempool_result HostDevices::create(std::size_t bytes,
                                     const cumempool_memory_properties* properties,
                                     cumempool_physical* physical) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (properties == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  if (const auto result = check_device(properties->device)) return result;
  if (const auto result = work(properties->device).error()) return result;
  return memory_.create(bytes, properties, physical);
}

cumempool_result HostDevices::allocate(int device, std::size_t bytes, cumempool_address* address) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_context(device)) return result;
  return memory_.allocate(device, bytes, address);
}

cumempool_result HostDevices::deallocate(int device, cumempool_address address) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (const auto result = check_context(device)) return result;
  if (!memory_.allocated(device, address)) return CUMEMPOOL_RESULT_INVALID_VALUE;
  lock.unlock();
  if (const auto result = work(device).run_all()) return result;
  lock.lock();
  return memory_.deallocate(device, address);
}

cumempool_result HostDevices::host_register(int device, void* pointer, std::size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_context(device)) return result;
  return pins_host_memory() ? registrations_.add(pointer, bytes) : CUMEMPOOL_RESULT_NOT_SUPPORTED;
}

std::optional<std::pair<int, HostMark>> HostDevices::last_use(const void* pointer,
                                                              std::size_t bytes) const {
  for (int device = 0; device < options_.device_count; ++device) {
    const auto mark = works_[static_cast<std::size_t>(device)]->last_use(pointer, bytes);
    if (mark) return std::make_pair(device, *mark);
  }
  return std::nullopt;
}

cumempool_result HostDevices::host_unregister(int device, void* pointer) {
  for (;;) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (const auto result = check_context(device)) return result;
    const std::size_t bytes = registrations_.bytes_at(pointer);
    if (bytes == 0) return CUMEMPOOL_RESULT_HOST_MEMORY_NOT_REGISTERED;
    const auto use = last_use(pointer, bytes);
    if (!use) {
      registrations_.remove(pointer);
      return CUMEMPOOL_RESULT_SUCCESS;
    }
    lock.unlock();
    // An error sticks to the device of that work. The next round sees it if that is `device`.
    (void)work(use->first).run(use->second);
  }
}

// ---- streams and events ---------------------------------------------------------------------

cumempool_result HostDevices::stream_create(int device, cumempool_stream* stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_context(device)) return result;
  if (stream == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  work(device).add_stream(next_object_);
  *stream = next_object_++;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostDevices::stream_destroy(int device, cumempool_stream stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_context(device)) return result;
  return work(device).destroy_stream(stream);
}

cumempool_result HostDevices::stream_synchronize(int device, cumempool_stream stream) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (const auto result = check_context(device)) return result;
  if (const auto result = work(device).check_stream(stream)) return result;
  const HostMark mark = work(device).mark_of_stream(stream);
  lock.unlock();
  return work(device).run(mark);
}

cumempool_result HostDevices::stream_is_capturing(int device, cumempool_stream stream,
                                                  int* capturing) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_context(device)) return result;
  if (capturing == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  if (!work(device).has_stream(stream)) return CUMEMPOOL_RESULT_INVALID_HANDLE;
  *capturing = work(device).capturing(stream) ? 1 : 0;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostDevices::event_create(int device, cumempool_event* event) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_context(device)) return result;
  if (event == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  work(device).add_event(next_object_);
  *event = next_object_++;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostDevices::event_destroy(int device, cumempool_event event) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_context(device)) return result;
  return work(device).destroy_event(event);
}

cumempool_result HostDevices::event_record(int device, cumempool_event event,
                                           cumempool_stream stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_context(device)) return result;
  return work(device).record(event, stream);
}

cumempool_result HostDevices::event_synchronize(int device, cumempool_event event) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (const auto result = check_context(device)) return result;
  const auto mark = work(device).mark_of(event);
  if (!mark) return CUMEMPOOL_RESULT_INVALID_HANDLE;
  lock.unlock();
  return work(device).run(*mark);
}

// Runs one command per call, so that work stays deferred and polling comes to an end.
cumempool_result HostDevices::event_query(int device, cumempool_event event) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (const auto result = check_context(device)) return result;
  const auto mark = work(device).mark_of(event);
  if (!mark) return CUMEMPOOL_RESULT_INVALID_HANDLE;
  if (!work(device).pending(*mark)) return CUMEMPOOL_RESULT_SUCCESS;
  const auto result = work(device).run_one(*mark, lock);
  return result != CUMEMPOOL_RESULT_SUCCESS ? result : CUMEMPOOL_RESULT_NOT_READY;
}

std::optional<HostMark> HostDevices::mark_of(cumempool_event event) const {
  for (const auto& work : works_) {
    if (const auto mark = work->mark_of(event)) return mark;
  }
  return std::nullopt;
}

cumempool_result HostDevices::stream_wait_event(int device, cumempool_stream stream,
                                                cumempool_event event) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_context(device)) return result;
  if (const auto result = work(device).check_stream(stream)) return result;
  const auto mark = mark_of(event);
  if (!mark) return CUMEMPOOL_RESULT_INVALID_HANDLE;
  if (const auto result = work(mark->device).error()) return result;
  if (!work(mark->device).pending(*mark)) return CUMEMPOOL_RESULT_SUCCESS;
  HostCommand wait{HostCommand::Kind::kWait};
  wait.wait = *mark;
  return work(device).submit(stream, wait);
}

// ---- work -----------------------------------------------------------------------------------

bool HostDevices::registered(const void* pointer, std::size_t bytes) const {
  return pointer != nullptr && (!pins_host_memory() || registrations_.holds(pointer, bytes));
}

bool HostDevices::good_digests(int device, const HostCommand& command) const {
  const auto places = reinterpret_cast<std::uintptr_t>(command.extents) |
                      reinterpret_cast<std::uintptr_t>(command.digests);
  constexpr std::size_t most = ~std::size_t{0} / sizeof(cumempool_extent);
  if (places % alignof(cumempool_extent) != 0 || command.count > most ||
      !registered(command.extents, command.count * sizeof(cumempool_extent)) ||
      !registered(command.digests, command.count * sizeof(cumempool_digest))) {
    return false;
  }
  return std::all_of(
      command.extents, command.extents + command.count, [&](const cumempool_extent& extent) {
        return digest_takes(extent.address, extent.bytes) &&
               memory_.resolve(extent, device, CUMEMPOOL_ACCESS_READ, command.epoch, nullptr);
      });
}

bool HostDevices::good_operands(int device, const HostCommand& command) const {
  const auto mapped = [&](cumempool_address address, cumempool_access access) {
    return memory_.resolve({address, command.bytes}, device, access, command.epoch, nullptr);
  };
  const cumempool_access access = access_to_address(command);
  switch (command.kind) {
    case HostCommand::Kind::kCopyToHost:
    case HostCommand::Kind::kCopyToDevice:
      return registered(command.host, command.bytes) && mapped(command.address, access);
    case HostCommand::Kind::kCopyOnDevice: {
      const auto distance = command.address > command.source ? command.address - command.source
                                                             : command.source - command.address;
      return distance >= command.bytes && mapped(command.address, access) &&
             mapped(command.source, CUMEMPOOL_ACCESS_READ);
    }
    case HostCommand::Kind::kFill:
      return mapped(command.address, access);
    case HostCommand::Kind::kDigest:
      return good_digests(device, command);
    case HostCommand::Kind::kCall:
    case HostCommand::Kind::kWait:
      break;
  }
  return true;
}

// Refuses operands that are wrong now. Running the command finds the ones that go wrong later.
cumempool_result HostDevices::submit(int device, HostCommand command, cumempool_stream stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_context(device)) return result;
  if (const auto result = work(device).check_stream(stream)) return result;
  if (command.bytes == 0 && command.count == 0) return CUMEMPOOL_RESULT_SUCCESS;
  command.epoch = memory_.epoch();
  if (!good_operands(device, command)) return CUMEMPOOL_RESULT_INVALID_VALUE;
  return work(device).submit(stream, command);
}

cumempool_result HostDevices::copy_to_host(int device, void* destination, cumempool_address source,
                                           std::size_t bytes, cumempool_stream stream) {
  return submit(device, {HostCommand::Kind::kCopyToHost, source, bytes, destination}, stream);
}

cumempool_result HostDevices::copy_to_device(int device, cumempool_address destination,
                                             const void* source, std::size_t bytes,
                                             cumempool_stream stream) {
  return submit(device, {HostCommand::Kind::kCopyToDevice, destination, bytes, source}, stream);
}

cumempool_result HostDevices::copy_on_device(int device, cumempool_address destination,
                                             cumempool_address source, std::size_t bytes,
                                             cumempool_stream stream) {
  HostCommand command{HostCommand::Kind::kCopyOnDevice, destination, bytes};
  command.source = source;
  return submit(device, command, stream);
}

cumempool_result HostDevices::fill(int device, cumempool_address destination, std::uint8_t byte,
                                   std::size_t bytes, cumempool_stream stream) {
  HostCommand command{HostCommand::Kind::kFill, destination, bytes};
  command.byte = byte;
  return submit(device, command, stream);
}

cumempool_result HostDevices::digest(int device, std::uint64_t seed,
                                     const cumempool_extent* extents, std::size_t count,
                                     cumempool_digest* digests, cumempool_stream stream) {
  HostCommand command{HostCommand::Kind::kDigest};
  command.extents = extents;
  command.count = count;
  command.digests = digests;
  command.seed = seed;
  return submit(device, command, stream);
}

cumempool_result HostDevices::fence(const int* devices, std::size_t count) {
  std::vector<int> active;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!initialised_) return CUMEMPOOL_RESULT_NOT_INITIALIZED;
    if (devices == nullptr && count != 0) return CUMEMPOOL_RESULT_INVALID_VALUE;
    for (std::size_t i = 0; i < count; ++i) {
      if (const auto result = check_device(devices[i])) return result;
      if (!contexts_.active(devices[i])) continue;
      if (fence_way() == CUMEMPOOL_FENCE_NONE) return CUMEMPOOL_RESULT_NOT_SUPPORTED;
      if (fence_way() == CUMEMPOOL_FENCE_CONTEXT && work(devices[i]).any_capturing()) {
        return CUMEMPOOL_RESULT_STREAM_CAPTURE_UNSUPPORTED;
      }
      active.push_back(devices[i]);
    }
  }
  cumempool_result first = CUMEMPOOL_RESULT_SUCCESS;
  for (const int device : active) {
    const auto result = work(device).run_all();
    if (first == CUMEMPOOL_RESULT_SUCCESS) first = result;
  }
  return first;
}

// ---- for tests ------------------------------------------------------------------------------

bool HostDevices::hold_context(int device, bool held) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (check_device(device) != CUMEMPOOL_RESULT_SUCCESS) return false;
  if (held) {
    contexts_.retain_for_others(device);
  } else if (contexts_.release_for_others(device)) {
    lose_context(device);
  }
  return true;
}

HostDriverCounters HostDevices::counters() {
  const std::lock_guard<std::mutex> lock(mutex_);
  HostDriverCounters counters;
  memory_.count(counters);
  counters.registrations = registrations_.count();
  counters.registered_bytes = registrations_.bytes();
  for (const auto& work : works_) work->count(counters);
  counters.retained_contexts = contexts_.retained();
  counters.entered_contexts = contexts_.entered();
  return counters;
}

cumempool_result HostDevices::launch(int device, void (*function)(void*), void* argument) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto result = check_device(device)) return result;
  if (const auto result = work(device).error()) return result;
  HostCommand command{HostCommand::Kind::kCall};
  command.function = function;
  command.argument = argument;
  return work(device).submit(0, command);
}

bool HostDevices::set_capturing(int device, cumempool_stream stream, bool capturing) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return exists(device) && work(device).set_capturing(stream, capturing);
}

void HostDevices::set_peer_access(bool possible) {
  const std::lock_guard<std::mutex> lock(mutex_);
  memory_.set_peers(possible);
}

}  // namespace cumempool::driver
