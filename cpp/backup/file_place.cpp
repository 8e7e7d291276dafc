// A backup in a file: slices in the order of their positions, each at the start of a block.
#include "backup/file_place.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "driver/digest.hpp"

namespace cumempool::backup {

static_assert(kSliceBytes % BackupFile::kBlockBytes == 0, "whole slices leave no gaps");
static_assert(StagedCopies::kBufferBytes % kSliceBytes == 0, "a slice fits, gap included");

FilePlace::FilePlace(BackupFile& file, std::size_t bytes, std::size_t extents, std::uint64_t seed)
    : file_(file),
      seed_(seed),
      room_(BackupFile::whole_blocks(bytes) + extents * BackupFile::kBlockBytes),
      offset_(file.acquire(room_)) {
  try {
    slices_.reserve(bytes / kSliceBytes + extents + 1);
  } catch (const std::exception&) {
    file_.release(offset_, room_);
    throw;
  }
}

FilePlace::~FilePlace() { file_.release(offset_, room_); }

// ---- layout -------------------------------------------------------------------------------------

std::size_t FilePlace::saved_bytes() const noexcept {
  return slices_.empty() ? 0 : slices_.back().position + slices_.back().bytes;
}

void FilePlace::grow(std::size_t bytes) {
  while (bytes != 0) {
    Slice slice;
    slice.position = saved_bytes();
    slice.bytes = std::min(bytes, kSliceBytes);
    slice.offset = slices_.empty() ? offset_ : BackupFile::whole_blocks(slices_.back().end());
    if (BackupFile::whole_blocks(slice.end()) > offset_ + room_ ||
        slices_.size() == slices_.capacity()) {
      throw Error(CUMEMPOOL_INTERNAL, "a backup file has less room than its backup was to have");
    }
    slices_.push_back(slice);
    bytes -= slice.bytes;
  }
}

// The slice that begins at `position`.
FilePlace::Slice* FilePlace::find(std::size_t position) {
  const auto found = std::lower_bound(
      slices_.begin(), slices_.end(), position,
      [](const Slice& slice, std::size_t wanted) { return slice.position < wanted; });
  if (found == slices_.end() || found->position != position) {
    throw Error(CUMEMPOOL_INTERNAL, "no slice of the backup begins at this position");
  }
  return &*found;
}

// As many of `bytes` bytes from `position` on as one buffer and one transfer take.
FilePlace::Run FilePlace::next_run(std::size_t position, std::size_t bytes) {
  Run run;
  run.first = find(position);
  const Slice* const end = slices_.data() + slices_.size();
  for (const Slice* slice = run.first; slice != end && run.bytes < bytes; ++slice) {
    const bool adjoins = slice->offset == run.first->offset + run.bytes;
    if (!adjoins || run.bytes + slice->bytes > StagedCopies::kBufferBytes) break;
    run.bytes += slice->bytes;
    ++run.count;
  }
  if (run.bytes > bytes)
    throw Error(CUMEMPOOL_INTERNAL, "part of a slice of a backup was asked for");
  return run;
}

// ---- copies -------------------------------------------------------------------------------------

void FilePlace::save(Transfer& transfer, std::size_t position, cumempool_address source,
                     std::size_t bytes) {
  const std::size_t saved = saved_bytes();
  if (position + bytes > saved) grow(position + bytes - saved);
  for (std::size_t done = 0; done < bytes;) {
    const Run run = next_run(position + done, bytes - done);
    for (std::size_t i = 0; i < run.count; ++i) run.first[i].written = false;
    transfer.staged.out(source + done, run.bytes,
                        [this, run](std::byte* data, std::size_t) { write(run, data); });
    done += run.bytes;
  }
}

void FilePlace::load(Transfer& transfer, std::size_t position, cumempool_address destination,
                     std::size_t bytes) {
  for (std::size_t done = 0; done < bytes;) {
    const Run run = next_run(position + done, bytes - done);
    transfer.staged.in(destination + done, run.bytes,
                       [this, run](std::byte* data, std::size_t) { read(run, data); });
    done += run.bytes;
  }
}

// The last block goes with whatever the buffer holds behind the bytes.
void FilePlace::write(const Run& run, const std::byte* data) {
  file_.write(run.first->offset, data, BackupFile::whole_blocks(run.bytes));
  for (std::size_t i = 0; i < run.count; ++i) {
    Slice& slice = run.first[i];
    slice.digest = driver::digest_on_cpu(seed_, data, slice.bytes);
    slice.written = true;
    data += slice.bytes;
  }
}

void FilePlace::read(const Run& run, std::byte* data) {
  file_.read(run.first->offset, data, BackupFile::whole_blocks(run.bytes));
  for (std::size_t i = 0; i < run.count; ++i) {
    const Slice& slice = run.first[i];
    if (!slice.written) refuse(slice, "was never written to the end");
    if (checked_ && driver::digest_on_cpu(seed_, data, slice.bytes) != slice.digest) {
      refuse(slice, "does not hold what was written to it");
    }
    data += slice.bytes;
  }
}

void FilePlace::refuse(const Slice& slice, const char* problem) const {
  Error error(CUMEMPOOL_BACKUP_DAMAGED, "the backup file in '" + file_.directory() + "' " +
                                            problem + " at offset " + std::to_string(slice.offset));
  error.bytes = slice.bytes;
  error.advice =
      "the memory stays asleep with its backup; discard it if the contents can be had "
      "from elsewhere";
  throw error;
}

// ---- view ---------------------------------------------------------------------------------------

Place::View FilePlace::view(std::size_t position, std::size_t bytes, bool writable) {
  const auto after = std::upper_bound(
      slices_.begin(), slices_.end(), position,
      [](std::size_t wanted, const Slice& slice) { return wanted < slice.position; });
  if (after == slices_.begin() || position + bytes > saved_bytes()) return nullptr;
  const auto first = std::prev(after);
  const auto adjoins = [&](const Slice& slice) {
    return slice.offset - first->offset == slice.position - first->position;
  };
  const auto end = std::find_if(after, slices_.end(), [&](const Slice& slice) {
    return slice.position >= position + bytes || !adjoins(slice);
  });
  if (end != slices_.end() && end->position < position + bytes) return nullptr;
  std::shared_ptr<FileMapping> mapping = mapping_.lock();
  if (mapping == nullptr) {
    mapping = std::make_shared<FileMapping>(file_.fd(), offset_, room_);
    mapping_ = mapping;
  }
  if (writable) checked_ = false;
  std::byte* const data =
      mapping->data() + (first->offset - offset_) + (position - first->position);
  return {std::move(mapping), data};
}

}  // namespace cumempool::backup
