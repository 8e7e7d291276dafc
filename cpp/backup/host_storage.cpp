// Backup storage in host memory of an arena.
#include "backup/host_storage.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace cumempool::backup {

HostStorage::HostStorage(HostArena& arena, int device) : arena_(arena), device_(device) {}

HostStorage::~HostStorage() {
  for (const Part& part : parts_) arena_.release(part.span);
  for (const HostSpan& span : replaced_) arena_.release(span);
}

// Returns the part that holds a saved position.
std::vector<HostStorage::Part>::const_iterator HostStorage::part_at(std::size_t position) const {
  const auto after =
      std::upper_bound(parts_.begin(), parts_.end(), position,
                       [](std::size_t wanted, const Part& part) { return wanted < part.position; });
  return std::prev(after);
}

// Calls visit(data, done, count) for each range that one copy call, or one bounce buffer, can take.
template <typename Visit>
void HostStorage::for_each_run(std::size_t position, std::size_t bytes, Visit visit) const {
  const std::size_t most = uses_bounce_buffers(tier()) ? BounceBuffers::kBufferBytes : bytes;
  auto part = part_at(position);
  for (std::size_t done = 0; done < bytes;) {
    const std::size_t inside = position + done - part->position;
    const std::size_t left = std::min(bytes - done, part->span.bytes - inside);
    std::byte* data = part->span.data + inside;
    const std::size_t count = std::min(arena_.run(data, left), most);
    visit(data, done, count);
    done += count;
    if (inside + count == part->span.bytes) ++part;
  }
}

// Takes one more span of at most `most` bytes.
void HostStorage::grow(std::size_t most) {
  // Makes the space first, so that a new span always has an owner.
  if (parts_.size() == parts_.capacity()) parts_.reserve(2 * parts_.size() + 1);
  const HostSpan span = arena_.acquire(device_, most);
  const bool continues =
      !parts_.empty() && parts_.back().span.data + parts_.back().span.bytes == span.data;
  if (continues) {
    parts_.back().span.bytes += span.bytes;
  } else {
    parts_.push_back({bytes_, span});
  }
  bytes_ += span.bytes;
}

void HostStorage::save(Transfer& transfer, std::size_t position, cumempool_address source,
                       std::size_t bytes) {
  arena_.pin_lost(device_);
  // Span by span, so that the copy into one runs while the next is still being pinned.
  for (std::size_t done = 0; done < bytes;) {
    const std::size_t at = position + done;
    if (at == bytes_) grow(bytes - done);
    const std::size_t here = std::min(bytes - done, bytes_ - at);
    for_each_run(at, here, [&](std::byte* data, std::size_t offset, std::size_t count) {
      const cumempool_address from = source + done + offset;
      if (tier() == CUMEMPOOL_BACKUP_PINNED) {
        transfer.queue.to_host(data, from, count);
        return;
      }
      transfer.bounce_buffers.out(from, count, [data](const std::byte* buffer, std::size_t filled) {
        std::memcpy(data, buffer, filled);
      });
    });
    done += here;
  }
}

void HostStorage::load(Transfer& transfer, std::size_t position, cumempool_address destination,
                       std::size_t bytes) {
  arena_.pin_lost(device_);
  for_each_run(position, bytes, [&](std::byte* data, std::size_t offset, std::size_t count) {
    const cumempool_address to = destination + offset;
    if (tier() == CUMEMPOOL_BACKUP_PINNED) {
      transfer.queue.to_device(to, data, count);
      return;
    }
    transfer.bounce_buffers.in(to, count, [data](std::byte* buffer, std::size_t wanted) {
      std::memcpy(buffer, data, wanted);
    });
  });
}

void HostStorage::gather() {
  replaced_.reserve(replaced_.size() + parts_.size());
  const HostSpan whole = arena_.acquire_whole(device_, bytes_);
  for (const Part& part : parts_) {
    std::memcpy(whole.data + part.position, part.span.data, part.span.bytes);
    replaced_.push_back(part.span);
  }
  parts_.resize(1);
  parts_.front() = {0, whole};
}

void HostStorage::settle_views() noexcept {
  for (const HostSpan& span : replaced_) arena_.release(span);
  replaced_.clear();
}

BackupStorage::View HostStorage::view(std::size_t position, std::size_t bytes, bool writable) {
  if (position + bytes > bytes_) return nullptr;
  const auto part = part_at(position);
  const std::size_t inside = position - part->position;
  // Bytes written through the view must stay part of the backup if a later view gathers it.
  const bool stays = !writable || parts_.size() == 1;
  std::byte* data = part->span.data + inside;
  if (!stays || inside + bytes > part->span.bytes) {
    gather();
    data = parts_.front().span.data + position;
  }
  arena_.join(device_, data, bytes);
  return {View(), data};  // owns nothing: the storage holds the memory
}

}  // namespace cumempool::backup
