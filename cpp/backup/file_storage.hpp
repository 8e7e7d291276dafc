// A file without a name that backups are written to, by direct I/O, and a backup in it, which goes
// through bounce buffers and is checked slice by slice on its way back.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "backup/backup_storage.hpp"
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

// Room in a file, direct I/O, and mappings of parts. Thread-safe. Gone with the process, however
// that ends.
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

// Slices are cut from the start of each save() that makes the storage grow. Each begins at a
// block of the file, whatever its position in the backup: a slice whose bytes are no whole
// blocks leaves a gap behind it. save() and load() take whole slices. The file outlives the
// storage.
class FileStorage : public BackupStorage {
 public:
  // Takes its whole room at once: `bytes`, all of them multiples of CUMEMPOOL_DIGEST_ALIGNMENT,
  // that come in `extents` saves that do not end with a whole block. `seed` is that of the
  // digests. Throws Error (CUMEMPOOL_BACKUP_FAILED).
  FileStorage(BackupFile& file, std::size_t bytes, std::size_t extents, std::uint64_t seed);
  ~FileStorage() override;
  FileStorage(const FileStorage&) = delete;
  FileStorage& operator=(const FileStorage&) = delete;

  cumempool_backup_tier tier() const noexcept override { return CUMEMPOOL_BACKUP_FILE; }
  void save(Transfer& transfer, std::size_t position, cumempool_address source,
            std::size_t bytes) override;
  // Throws Error (CUMEMPOOL_BACKUP_DAMAGED), here or from the bounce buffers, where the file
  // does not hold what was saved.
  void load(Transfer& transfer, std::size_t position, cumempool_address destination,
            std::size_t bytes) override;
  // With `writable` the file is right, from now on, whatever it holds: nothing is checked any
  // more.
  View view(std::size_t position, std::size_t bytes, bool writable) override;

 private:
  struct StoredSlice {
    std::size_t position = 0;
    std::size_t bytes = 0;
    std::size_t offset = 0;  // in the file
    cumempool_digest digest{};
    bool written = false;
    std::size_t end() const noexcept { return offset + bytes; }
  };
  // Slices side by side in the file, which one buffer takes.
  struct Run {
    StoredSlice* first = nullptr;
    std::size_t count = 0;
    std::size_t bytes = 0;
  };

  std::size_t saved_bytes() const noexcept;
  void grow(std::size_t bytes);
  StoredSlice* find(std::size_t position);
  Run next_run(std::size_t position, std::size_t bytes);
  void write(const Run& run, const std::byte* data);
  void read(const Run& run, std::byte* data);
  [[noreturn]] void refuse(const StoredSlice& slice, const char* problem) const;

  BackupFile& file_;
  const std::uint64_t seed_;
  const std::size_t room_;
  const std::size_t offset_;         // of the room
  std::vector<StoredSlice> slices_;  // by position; never moves: threads use them
  bool checked_ = true;
  std::weak_ptr<FileMapping> mapping_;  // that views share; gone with the last of them
};

}  // namespace cumempool::backup
