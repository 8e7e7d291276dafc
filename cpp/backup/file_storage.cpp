// Backup storage in a file: slices in the order of their positions, each at the start of a block.
#include "backup/file_storage.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "driver/digest.hpp"
#include "driver/error.hpp"

namespace cumempool::backup {
namespace {

using FileStatus = struct stat;
using FileSystemStatus = struct statvfs;

Error backup_failed(const std::string& problem, std::uint64_t bytes, const char* advice) {
  Error error(CUMEMPOOL_BACKUP_FAILED, problem);
  error.bytes = bytes;
  error.advice = advice;
  return error;
}

// Whether an errno says that the kernel or file system cannot make a file without a name. ENOENT
// may also mean that the directory is missing; then the next attempt fails as well.
bool unnamed_unsupported(int number) {
  return number == EOPNOTSUPP || number == EISDIR || number == ENOENT;
}

int make_named(const std::string& directory) {
  std::string path = directory + "/.cumempool-XXXXXX";
  const int fd = mkostemp(path.data(), O_CLOEXEC);
  if (fd >= 0) unlink(path.c_str());
  return fd;
}

int open_file(const std::string& directory, bool unnamed) {
  int fd = -1;
  if (unnamed) fd = open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (!unnamed || (fd < 0 && unnamed_unsupported(errno))) fd = make_named(directory);
  if (fd >= 0) return fd;
  throw backup_failed("a backup file cannot be made in '" + directory + "': " + strerror(errno), 0,
                      "name an existing directory that this process may write to");
}

const char* advice_for(int number) {
  if (number == ENOSPC || number == EDQUOT || number == EFBIG) {
    return "make room there, name a directory with more of it, or discard tags instead";
  }
  return "look at the disk and its file system, or name another directory";
}

int without_interruption(int (*call)(int fd, int mode, off_t offset, off_t bytes), int fd, int mode,
                         std::size_t offset, std::size_t bytes) {
  while (true) {
    const int result = call(fd, mode, static_cast<off_t>(offset), static_cast<off_t>(bytes));
    if (result == 0 || errno != EINTR) return result;
  }
}

std::size_t page_bytes() {
  static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

std::byte* map_file(int fd, std::size_t offset, std::size_t bytes) {
  void* mapped =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(offset));
  if (mapped != MAP_FAILED) return static_cast<std::byte*>(mapped);
  throw backup_failed(std::string("a backup file cannot be mapped: ") + strerror(errno), bytes,
                      "raise the limit on address space (ulimit -v)");
}

}  // namespace

// ---- making, room -------------------------------------------------------------------------------

BackupFile::BackupFile(std::string directory, Wishes wishes)
    : directory_(std::move(directory)),
      wishes_(wishes),
      fd_(open_file(directory_, wishes.unnamed)) {
  if (wishes_.direct) set_direct(true);
}

BackupFile::~BackupFile() { close(fd_); }

// Sets the flag on the open file: some file systems that refuse it at open() leave a new file
// behind.
void BackupFile::set_direct(bool direct) noexcept {
  const int flags = fcntl(fd_, F_GETFL);
  const int wanted = direct ? flags | O_DIRECT : flags & ~O_DIRECT;
  if (flags >= 0 && fcntl(fd_, F_SETFL, wanted) == 0) direct_ = direct;
}

std::size_t BackupFile::acquire(std::size_t bytes) {
  const std::size_t room = whole_blocks(bytes);
  std::size_t offset = 0;
  {
    const std::lock_guard lock(mutex_);
    auto found = free_.take_first_fit(room);
    if (!found.has_value()) {
      // Offsets cost nothing: a free range at the end that is too small stays for others.
      free_.add(end_, room);
      end_ += room;
      found = free_.take_first_fit(room);
    }
    offset = *found;
    held_bytes_ += room;
  }
  try {
    allocate(offset, room);
  } catch (const Error&) {
    release(offset, room);
    throw;
  }
  return offset;
}

void BackupFile::allocate(std::size_t offset, std::size_t bytes) {
  if (wishes_.reserve && without_interruption(fallocate, fd_, 0, offset, bytes) == 0) return;
  const bool unreserved = !wishes_.reserve || errno == EOPNOTSUPP;
  if (unreserved && grow_to(offset + bytes)) return;
  const int number = errno;
  throw backup_failed(
      "no room for a backup in '" + directory_ + "': " + strerror(number) + free_room(), bytes,
      advice_for(number));
}

// Extends the file to `end`, without reserving room on disk.
bool BackupFile::grow_to(std::size_t end) {
  const std::lock_guard lock(mutex_);
  FileStatus file{};
  if (fstat(fd_, &file) != 0) return false;
  return file.st_size >= static_cast<off_t>(end) || ftruncate(fd_, static_cast<off_t>(end)) == 0;
}

std::string BackupFile::free_room() const {
  FileSystemStatus system{};
  if (fstatvfs(fd_, &system) != 0) return {};
  return "; " + format_bytes(std::uint64_t{system.f_bavail} * system.f_frsize) + " are free there";
}

void BackupFile::release(std::size_t offset, std::size_t bytes) noexcept {
  const std::size_t room = whole_blocks(bytes);
  // If the disk does not take the room back, the next backup can still use it.
  without_interruption(fallocate, fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, room);
  const std::lock_guard lock(mutex_);
  free_.give_back(offset, room);
  held_bytes_ -= room;
}

std::uint64_t BackupFile::held_bytes() const {
  const std::lock_guard lock(mutex_);
  return held_bytes_;
}

// ---- transfers ----------------------------------------------------------------------------------

// Whether a failed transfer can be tried again. Some file systems take the flag for direct I/O, but
// then refuse each transfer.
bool BackupFile::goes_on(int number, bool was_direct) noexcept {
  if (number == EINTR) return true;
  if (number != EINVAL || !was_direct) return false;
  set_direct(false);
  return !direct_;
}

void BackupFile::write(std::size_t offset, const std::byte* data, std::size_t bytes) {
  for (std::size_t done = 0; done < bytes;) {
    const bool was_direct = direct_;
    const ssize_t moved = pwrite(fd_, data + done, bytes - done, static_cast<off_t>(offset + done));
    const int number = moved == 0 ? EIO : errno;
    if (moved > 0) {
      done += static_cast<std::size_t>(moved);
    } else if (!goes_on(number, was_direct)) {
      throw backup_failed("writing at offset " + std::to_string(offset + done) +
                              " of the backup file in '" + directory_ +
                              "' failed: " + strerror(number) + free_room(),
                          bytes, advice_for(number));
    }
  }
}

void BackupFile::read(std::size_t offset, std::byte* data, std::size_t bytes) {
  for (std::size_t done = 0; done < bytes;) {
    const bool was_direct = direct_;
    const ssize_t moved = pread(fd_, data + done, bytes - done, static_cast<off_t>(offset + done));
    const int number = errno;
    if (moved >= static_cast<ssize_t>(kBlockBytes)) {
      done += static_cast<std::size_t>(moved) / kBlockBytes * kBlockBytes;
    } else if (moved >= 0) {  // less than a block: the file has ended
      Error error(CUMEMPOOL_BACKUP_DAMAGED,
                  "the backup file in '" + directory_ + "' was truncated: it ends at offset " +
                      std::to_string(offset + done + static_cast<std::size_t>(moved)));
      error.bytes = bytes;
      error.advice = "the backup is lost; discard the memory, which stays asleep until then";
      throw error;
    } else if (!goes_on(number, was_direct)) {
      throw backup_failed("reading at offset " + std::to_string(offset + done) +
                              " of the backup file in '" + directory_ +
                              "' failed: " + strerror(number),
                          bytes, advice_for(number));
    }
  }
}

// ---- mapping ------------------------------------------------------------------------------------

std::shared_ptr<std::byte> BackupFile::map(std::size_t offset, std::size_t bytes) const {
  const std::size_t before = offset % page_bytes();  // mappings begin at a page
  std::byte* const first = map_file(fd_, offset - before, before + bytes);
  const std::shared_ptr<std::byte> mapping(
      first, [mapped = before + bytes](std::byte* data) { munmap(data, mapped); });
  return {mapping, first + before};
}

// ---- storage ------------------------------------------------------------------------------------

static_assert(kSliceBytes % BackupFile::kBlockBytes == 0, "whole slices leave no gaps");
static_assert(BounceBuffers::kBufferBytes % kSliceBytes == 0, "a slice fits, gap included");

FileStorage::FileStorage(BackupFile& file, std::size_t bytes, std::size_t extents,
                         std::uint64_t seed)
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

FileStorage::~FileStorage() { file_.release(offset_, room_); }

// ---- layout -------------------------------------------------------------------------------------

std::size_t FileStorage::saved_bytes() const noexcept {
  return slices_.empty() ? 0 : slices_.back().position + slices_.back().bytes;
}

void FileStorage::grow(std::size_t bytes) {
  while (bytes != 0) {
    StoredSlice slice;
    slice.position = saved_bytes();
    slice.bytes = std::min(bytes, kSliceBytes);
    slice.offset = slices_.empty() ? offset_ : BackupFile::whole_blocks(slices_.back().end());
    if (BackupFile::whole_blocks(slice.end()) > offset_ + room_ ||
        slices_.size() == slices_.capacity()) {
      throw Error(CUMEMPOOL_INTERNAL, "the backup is larger than its room in the file");
    }
    slices_.push_back(slice);
    bytes -= slice.bytes;
  }
}

// Returns the slice that begins at `position`.
FileStorage::StoredSlice* FileStorage::find(std::size_t position) {
  const auto found = std::lower_bound(
      slices_.begin(), slices_.end(), position,
      [](const StoredSlice& slice, std::size_t wanted) { return slice.position < wanted; });
  if (found == slices_.end() || found->position != position) {
    throw Error(CUMEMPOOL_INTERNAL, "no slice of the backup begins at this position");
  }
  return &*found;
}

// Returns the slices from `position` on, at most `bytes`, that one buffer and one transfer can
// take.
FileStorage::Run FileStorage::next_run(std::size_t position, std::size_t bytes) {
  Run run;
  run.first = find(position);
  const StoredSlice* const end = slices_.data() + slices_.size();
  for (const StoredSlice* slice = run.first; slice != end && run.bytes < bytes; ++slice) {
    const bool adjoins = slice->offset == run.first->offset + run.bytes;
    if (!adjoins || run.bytes + slice->bytes > BounceBuffers::kBufferBytes) break;
    run.bytes += slice->bytes;
    ++run.count;
  }
  if (run.bytes > bytes)
    throw Error(CUMEMPOOL_INTERNAL, "a copy ends inside a slice of the backup");
  return run;
}

// ---- copies -------------------------------------------------------------------------------------

void FileStorage::save(Transfer& transfer, std::size_t position, cumempool_address source,
                       std::size_t bytes) {
  const std::size_t saved = saved_bytes();
  if (position + bytes > saved) grow(position + bytes - saved);
  for (std::size_t done = 0; done < bytes;) {
    const Run run = next_run(position + done, bytes - done);
    for (std::size_t i = 0; i < run.count; ++i) run.first[i].written = false;
    transfer.bounce_buffers.out(source + done, run.bytes,
                                [this, run](std::byte* data, std::size_t) { write(run, data); });
    done += run.bytes;
  }
}

void FileStorage::load(Transfer& transfer, std::size_t position, cumempool_address destination,
                       std::size_t bytes) {
  for (std::size_t done = 0; done < bytes;) {
    const Run run = next_run(position + done, bytes - done);
    transfer.bounce_buffers.in(destination + done, run.bytes,
                               [this, run](std::byte* data, std::size_t) { read(run, data); });
    done += run.bytes;
  }
}

// The last block may end with other bytes of the buffer.
void FileStorage::write(const Run& run, const std::byte* data) {
  file_.write(run.first->offset, data, BackupFile::whole_blocks(run.bytes));
  for (std::size_t i = 0; i < run.count; ++i) {
    StoredSlice& slice = run.first[i];
    slice.digest = driver::digest_on_cpu(seed_, data, slice.bytes);
    slice.written = true;
    data += slice.bytes;
  }
}

void FileStorage::read(const Run& run, std::byte* data) {
  file_.read(run.first->offset, data, BackupFile::whole_blocks(run.bytes));
  for (std::size_t i = 0; i < run.count; ++i) {
    const StoredSlice& slice = run.first[i];
    if (!slice.written) refuse(slice, "was never written to the end");
    if (checked_ && driver::digest_on_cpu(seed_, data, slice.bytes) != slice.digest) {
      refuse(slice, "does not hold what was written to it");
    }
    data += slice.bytes;
  }
}

void FileStorage::refuse(const StoredSlice& slice, const char* problem) const {
  Error error(CUMEMPOOL_BACKUP_DAMAGED, "the backup file in '" + file_.directory() + "' " +
                                            problem + " at offset " + std::to_string(slice.offset));
  error.bytes = slice.bytes;
  error.advice =
      "the memory stays asleep with its backup; discard it if you can load the contents from "
      "elsewhere";
  throw error;
}

// ---- view ---------------------------------------------------------------------------------------

BackupStorage::View FileStorage::view(std::size_t position, std::size_t bytes, bool writable) {
  const auto after = std::upper_bound(
      slices_.begin(), slices_.end(), position,
      [](std::size_t wanted, const StoredSlice& slice) { return wanted < slice.position; });
  if (after == slices_.begin() || position + bytes > saved_bytes()) return nullptr;
  const auto first = std::prev(after);
  const auto adjoins = [&](const StoredSlice& slice) {
    return slice.offset - first->offset == slice.position - first->position;
  };
  const auto end = std::find_if(after, slices_.end(), [&](const StoredSlice& slice) {
    return slice.position >= position + bytes || !adjoins(slice);
  });
  if (end != slices_.end() && end->position < position + bytes) return nullptr;
  std::shared_ptr<std::byte> mapping = mapping_.lock();
  if (mapping == nullptr) {
    mapping = file_.map(offset_, room_);
    mapping_ = mapping;
  }
  if (writable) checked_ = false;
  return {mapping, mapping.get() + (first->offset - offset_) + (position - first->position)};
}

}  // namespace cumempool::backup
