// A file without a name that backups are written to: room in it, direct I/O, and mappings of
// parts.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

#include "backup/interval_set.hpp"

namespace cumempool::backup {

// Part of a file as memory, for as long as it lives.
class FileMapping {
 public:
  // Changes to the memory change the file. Throws Error (CUMEMPOOL_BACKUP_FAILED).
  FileMapping(int fd, std::size_t offset, std::size_t bytes);
  ~FileMapping();
  FileMapping(const FileMapping&) = delete;
  FileMapping& operator=(const FileMapping&) = delete;

  std::byte* data() const noexcept { return data_; }

 private:
  std::size_t before_;  // bytes between the start of a page and data_
  std::size_t bytes_;
  std::byte* data_;
};

// Thread-safe. Gone with the process, however that ends.
class BackupFile {
 public:
  // Offsets, room, and for direct I/O also memory and transfers, are multiples of this.
  static constexpr std::size_t kBlockBytes = 4096;

  // What is asked of the file system first, and done without where it refuses.
  struct Wishes {
    bool unnamed = true;  // a file that never has a name; else it loses it right away
    bool direct = true;   // I/O past the page cache
    bool reserve = true;  // room on disk before bytes come; else a full disk shows at write()
  };

  // In an existing directory. Throws Error (CUMEMPOOL_BACKUP_FAILED).
  explicit BackupFile(std::string directory) : BackupFile(std::move(directory), Wishes()) {}
  BackupFile(std::string directory, Wishes wishes);
  ~BackupFile();
  BackupFile(const BackupFile&) = delete;
  BackupFile& operator=(const BackupFile&) = delete;

  // Room for `bytes`, rounded up to whole blocks, in one piece: returns its offset. Throws
  // Error (CUMEMPOOL_BACKUP_FAILED) where the disk is full, with nothing held.
  std::size_t acquire(std::size_t bytes);
  // Gives room back that acquire() returned for as many bytes, to the disk as well.
  void release(std::size_t offset, std::size_t bytes) noexcept;
  // Bytes acquired and not released.
  std::uint64_t held_bytes() const;

  // Whole blocks at a block's offset. Throw Error: CUMEMPOOL_BACKUP_FAILED, or
  // CUMEMPOOL_BACKUP_DAMAGED where the file ends early.
  void write(std::size_t offset, const std::byte* data, std::size_t bytes);
  void read(std::size_t offset, std::byte* data, std::size_t bytes);

  const std::string& directory() const noexcept { return directory_; }
  bool direct() const noexcept { return direct_; }
  int fd() const noexcept { return fd_; }

  static constexpr std::size_t whole_blocks(std::size_t bytes) noexcept {
    return (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
  }

 private:
  void set_direct(bool direct) noexcept;
  bool goes_on(int number, bool was_direct) noexcept;
  void allocate(std::size_t offset, std::size_t bytes);
  bool grow_to(std::size_t end);
  std::string free_room() const;

  const std::string directory_;
  const Wishes wishes_;
  const int fd_;
  std::atomic<bool> direct_{false};

  mutable std::mutex mutex_;  // guards everything below
  IntervalSet free_;
  std::size_t end_ = 0;  // of the offsets that were ever handed out
  std::uint64_t held_bytes_ = 0;
};

}  // namespace cumempool::backup
