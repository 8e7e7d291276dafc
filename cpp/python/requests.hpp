// Converts arguments of transitions and policies to structures of the C interface. Each object owns
// the memory that its structure points to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cumempool/cumempool.h"
#include "errors.hpp"

namespace cumempool::python {

using Pair = std::pair<std::uint64_t, std::uint64_t>;

// A cumempool_sleep_request and its arrays.
class SleepArguments {
 public:
  SleepArguments(const std::vector<std::pair<std::string, int>>& tags, bool drop_backups,
                 const std::vector<Pair>& dead, std::uint64_t as_of,
                 std::vector<cumempool_device_stream> streams)
      : streams_(std::move(streams)) {
    actions_.reserve(tags.size());
    for (const auto& [tag, action] : tags) {
      actions_.push_back({tag_text(tag), static_cast<cumempool_on_sleep>(action)});
    }
    extents_.reserve(dead.size());
    for (const auto& [address, bytes] : dead) extents_.push_back({address, bytes});
    request_.size = sizeof request_;
    request_.drop_backups = drop_backups ? 1 : 0;
    request_.tags = actions_.data();
    request_.tag_count = actions_.size();
    request_.dead = extents_.data();
    request_.dead_count = extents_.size();
    request_.dead_as_of = as_of;
    request_.streams = streams_.data();
    request_.stream_count = streams_.size();
  }
  ~SleepArguments() = default;
  SleepArguments(const SleepArguments&) = delete;
  SleepArguments& operator=(const SleepArguments&) = delete;

  const cumempool_sleep_request* get() const noexcept { return &request_; }

 private:
  std::vector<cumempool_tag_action> actions_;
  std::vector<cumempool_extent> extents_;
  std::vector<cumempool_device_stream> streams_;
  cumempool_sleep_request request_{};
};

using Stream = std::pair<int, std::uint64_t>;

inline std::vector<cumempool_device_stream> device_streams(const std::vector<Stream>& streams) {
  std::vector<cumempool_device_stream> converted;
  converted.reserve(streams.size());
  for (const auto& [device, stream] : streams)
    converted.push_back({sizeof(cumempool_device_stream), device, stream});
  return converted;
}

// The tags of a wake; NULL for all.
class WakeTags {
 public:
  explicit WakeTags(const std::optional<std::vector<std::string>>& tags) {
    if (!tags) return;
    for (const std::string& tag : *tags) names_.push_back(tag_text(tag));
    names_.push_back(nullptr);  // so that an empty list does not mean "all"
  }

  const char* const* data() const noexcept { return names_.empty() ? nullptr : names_.data(); }
  std::size_t count() const noexcept { return names_.empty() ? 0 : names_.size() - 1; }

 private:
  std::vector<const char*> names_;
};

// Tier, directory and peer device.
using BackupFields = std::tuple<int, std::string, int>;

// Returns a policy that points into `fields`. The directory comes from Python's os.fsencode, which
// returns bytes without a zero.
inline cumempool_backup_policy backup_policy(const BackupFields& fields) {
  cumempool_backup_policy policy{};
  policy.size = sizeof policy;
  policy.tier = static_cast<cumempool_backup_tier>(std::get<0>(fields));
  const std::string& directory = std::get<1>(fields);
  policy.directory = directory.empty() ? nullptr : directory.c_str();
  policy.peer_device = std::get<2>(fields);
  return policy;
}

}  // namespace cumempool::python
