// A file without a name: how it is made on file systems of all kinds, and transfers that go on
// until they are done.
#include "backup/backup_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "driver/error.hpp"

namespace cumempool::backup {
namespace {

Error backup_failed(const std::string& problem, std::uint64_t bytes, const char* advice) {
  Error error(CUMEMPOOL_BACKUP_FAILED, problem);
  error.bytes = bytes;
  error.advice = advice;
  return error;
}

// What file systems and kernels answer that cannot make a file without a name. ENOENT is also
// that of a directory that is not there, which the next attempt meets again.
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
  throw backup_failed("no backup file can be made in '" + directory + "': " + strerror(errno), 0,
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

// ---- mapping ------------------------------------------------------------------------------------

FileMapping::FileMapping(int fd, std::size_t offset, std::size_t bytes)
    : before_(offset % page_bytes()),
      bytes_(before_ + bytes),
      data_(map_file(fd, offset - before_, bytes_) + before_) {}

FileMapping::~FileMapping() { munmap(data_ - before_, bytes_); }

// ---- making, room -------------------------------------------------------------------------------

BackupFile::BackupFile(std::string directory, Wishes wishes)
    : directory_(std::move(directory)),
      wishes_(wishes),
      fd_(open_file(directory_, wishes.unnamed)) {
  if (wishes_.direct) set_direct(true);
}

BackupFile::~BackupFile() { close(fd_); }

// Asked for once the file is open: some file systems that refuse it leave a new file behind.
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
      // Offsets cost nothing: what is free at the end, and too small, stays for others.
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

// Makes the file that long, without room on disk.
bool BackupFile::grow_to(std::size_t end) {
  const std::lock_guard lock(mutex_);
  struct stat file {};
  if (fstat(fd_, &file) != 0) return false;
  return file.st_size >= static_cast<off_t>(end) || ftruncate(fd_, static_cast<off_t>(end)) == 0;
}

std::string BackupFile::free_room() const {
  struct statvfs system {};
  if (fstatvfs(fd_, &system) != 0) return {};
  return "; " + format_bytes(std::uint64_t{system.f_bavail} * system.f_frsize) + " are free there";
}

void BackupFile::release(std::size_t offset, std::size_t bytes) noexcept {
  const std::size_t room = whole_blocks(bytes);
  // Where it cannot be given back to the disk it is there for the next backup all the same.
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

// Some file systems take the flag for direct I/O, and then refuse each transfer.
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
    } else if (moved >= 0) {  // less than a block is there: the file ends
      Error error(CUMEMPOOL_BACKUP_DAMAGED,
                  "the backup file in '" + directory_ + "' was truncated: it ends at offset " +
                      std::to_string(offset + done + static_cast<std::size_t>(moved)));
      error.bytes = bytes;
      error.advice = "the memory stays asleep with its backup, which is lost: discard it";
      throw error;
    } else if (!goes_on(number, was_direct)) {
      throw backup_failed("reading at offset " + std::to_string(offset + done) +
                              " of the backup file in '" + directory_ +
                              "' failed: " + strerror(number),
                          bytes, advice_for(number));
    }
  }
}

}  // namespace cumempool::backup
