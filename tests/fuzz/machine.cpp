// Simulated devices whose driver calls can fail, and the program's own streams on them.
#include "machine.hpp"

#include <stdlib.h>  // NOLINT(modernize-deprecated-headers): mkdtemp
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <iterator>

#include "finding.hpp"

namespace cumempool::fuzz {
namespace {

const cumempool_driver* make_host(std::uint64_t pages_per_device, bool peers) {
  cumempool_host_driver_options options{};
  options.size = sizeof options;
  options.device_count = kDevices;
  options.bytes_per_device = pages_per_device * kPage;
  options.granularity = kPage;
  options.handle_types = CUMEMPOOL_HANDLE_POSIX_FD;
  const cumempool_driver* made = nullptr;
  MUST_HOLD(cumempool_host_driver_create(&options, &made) == CUMEMPOOL_OK, "no host driver");
  driver::host_driver_set_peer_access(made, peers);
  return made;
}

void must(cumempool_result result, const char* what) {
  MUST_HOLD(result == CUMEMPOOL_RESULT_SUCCESS,
            std::string("the program's own ") + what + " failed: " + cumempool_result_name(result));
}

}  // namespace

template <typename Call>
cumempool_result Machine::inside(int device, const Call& call) const {
  cumempool_context_token token{};
  must(host_->context_enter(host_->self, device, &token), "context_enter");
  const cumempool_result result = call();
  must(host_->context_leave(host_->self, &token), "context_leave");
  return result;
}

Machine::Machine(std::uint64_t pages_per_device, bool peers_reach_each_other)
    : host_(make_host(pages_per_device, peers_reach_each_other)), faults_(*host_) {
  // Calls that end the life of something, and whose failure has no remedy: the library has nothing
  // left to try, and libcuda fails them only where the context is lost already.
  for (const char* entry :
       {"context_leave", "context_release", "stream_destroy", "event_destroy"}) {
    faults_.exclude(entry);
  }
  for (int device = 0; device < kDevices; ++device) {
    must(host_->context_retain(host_->self, device), "context_retain");
    auto& made = streams_.at(static_cast<std::size_t>(device));
    must(inside(device, [&] { return host_->stream_create(host_->self, device, &made); }),
         "stream_create");
  }
}

Machine::~Machine() {
  synchronize();
  for (int device = 0; device < kDevices; ++device) {
    const cumempool_stream ended = streams_.at(static_cast<std::size_t>(device));
    must(inside(device, [&] { return host_->stream_destroy(host_->self, device, ended); }),
         "stream_destroy");
    must(host_->context_release(host_->self, device), "context_release");
  }
  const driver::HostDriverCounters left = counters();
  const auto none = [](std::uint64_t count, const char* what) {
    MUST_HOLD(count == 0, std::to_string(count) + " " + what + " are left in the end");
  };
  if (!leaks_) {
    none(left.reserved_bytes, "reserved bytes");
    none(left.handles, "handles");
    none(left.mapped_bytes, "mapped bytes");
    none(left.charged_bytes, "bytes of device memory");
  }
  none(left.allocations, "allocations");
  none(left.registered_bytes, "pinned bytes");
  none(left.streams, "streams");
  none(left.events, "events");
  none(left.queued_commands, "queued commands");
  none(left.retained_contexts, "retained contexts");
  none(left.entered_contexts, "entered contexts");
  cumempool_host_driver_destroy(host_);
}

std::uint64_t Machine::free_bytes(int device) const {
  std::uint64_t free = 0;
  std::uint64_t total = 0;
  must(inside(device, [&] { return host_->memory_info(host_->self, device, &free, &total); }),
       "memory_info");
  return free;
}

bool Machine::fill(int device, cumempool_address address, std::size_t bytes, std::uint8_t value) {
  if (capturing(device)) return false;
  must(inside(device,
              [&] {
                return host_->fill(host_->self, device, address, value, bytes,
                                   stream(device).stream);
              }),
       "fill");
  return true;
}

void Machine::synchronize() {
  for (int device = 0; device < kDevices; ++device) {
    must(host_->fence(host_->self, &device, 1), "fence");
  }
}

cumempool_device_stream Machine::stream(int device) const {
  return {sizeof(cumempool_device_stream), device, streams_.at(static_cast<std::size_t>(device))};
}

void Machine::set_capturing(int device, bool capturing) {
  MUST_HOLD(driver::host_driver_set_capturing(host_, device, stream(device).stream, capturing),
            "the program's stream is gone");
  capturing_.at(static_cast<std::size_t>(device)) = capturing;
}

const std::string& file_directory() {
  struct Directory {
    Directory() : path(std::filesystem::temp_directory_path() / "cumempool-fuzz-XXXXXX") {
      MUST_HOLD(mkdtemp(path.data()) != nullptr, "no temporary directory can be made");
    }
    ~Directory() {
      std::error_code ignored;
      std::filesystem::remove_all(path, ignored);
    }
    Directory(const Directory&) = delete;
    Directory(Directory&&) = delete;
    Directory& operator=(const Directory&) = delete;
    Directory& operator=(Directory&&) = delete;
    std::string path;
  };
  static const Directory directory;
  return directory.path;
}

std::size_t open_descriptors() {
  const std::filesystem::directory_iterator descriptors("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(descriptors), end(descriptors)));
}

FullDisk::FullDisk(std::uint64_t bytes) : before_(0) {
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit limit{};
  MUST_HOLD(getrlimit(RLIMIT_FSIZE, &limit) == 0, "getrlimit failed");
  before_ = limit.rlim_cur;
  limit.rlim_cur = bytes;
  MUST_HOLD(setrlimit(RLIMIT_FSIZE, &limit) == 0, "setrlimit failed");
}

FullDisk::~FullDisk() {
  rlimit limit{};
  getrlimit(RLIMIT_FSIZE, &limit);
  limit.rlim_cur = before_;
  setrlimit(RLIMIT_FSIZE, &limit);
}

}  // namespace cumempool::fuzz
