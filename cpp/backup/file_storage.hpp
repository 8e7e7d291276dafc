// Backup storage in a nameless file, written by direct I/O through bounce buffers. Each slice is
// checked when it is read back.
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

// A file, with room that backups take, direct I/O and mappings. Thread-safe. The kernel deletes the
// file when the process ends, in whatever way.
class BackupFile {
 public:
  // Offsets and room are multiples of this, and for direct I/O also memory and transfers.
  static constexpr std::size_t kBlockBytes = 4096;

  // Features that the file uses if the file system supports them.
  struct Wishes {
    bool unnamed = true;  // the file never has a name; else it loses its name at once
    bool direct = true;   // I/O bypasses the page cache
    bool reserve = true;  // reserves room on disk early; else a full disk shows at write()
  };

  // Makes the file in an existing directory. Throws Error (CUMEMPOOL_BACKUP_FAILED).
  explicit BackupFile(std::string directory) : BackupFile(std::move(directory), Wishes()) {}
  BackupFile(std::string directory, Wishes wishes);
  ~BackupFile();
  BackupFile(const BackupFile&) = delete;
  BackupFile& operator=(const BackupFile&) = delete;

  // Takes a contiguous range of `bytes`, rounded up to whole blocks; returns its offset. If the
  // disk is full, throws Error (CUMEMPOOL_BACKUP_FAILED) and holds nothing.
  std::size_t acquire(std::size_t bytes);
  // Gives a range of acquire() back, to the disk as well; `bytes` as passed there.
  void release(std::size_t offset, std::size_t bytes) noexcept;
  // Bytes acquired and not released.
  std::uint64_t held_bytes() const;

  // Transfer whole blocks, from the offset of a block on. Throw Error: CUMEMPOOL_BACKUP_FAILED, or
  // CUMEMPOOL_BACKUP_DAMAGED if the file ends early.
  void write(std::size_t offset, const std::byte* data, std::size_t bytes);
  void read(std::size_t offset, std::byte* data, std::size_t bytes);

  // Maps part of the file; the last owner of the memory unmaps it. Writes to the memory change the
  // file. Throws Error (CUMEMPOOL_BACKUP_FAILED).
  std::shared_ptr<std::byte> map(std::size_t offset, std::size_t bytes) const;

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
  std::size_t end_ = 0;  // of all offsets ever handed out
  std::uint64_t held_bytes_ = 0;
};

// Each save() that makes the storage grow cuts its bytes into slices. A slice begins at a block of
// the file, so one that does not fill its last block leaves a gap behind it. save() and load() take
// whole slices. The file must outlive the storage.
class FileStorage : public BackupStorage {
 public:
  // Takes all its room at once: `bytes`, which come in multiples of CUMEMPOOL_DIGEST_ALIGNMENT, in
  // `extents` saves that may each end inside a block. `seed` is the seed of the digests. Throws
  // Error (CUMEMPOOL_BACKUP_FAILED).
  FileStorage(BackupFile& file, std::size_t bytes, std::size_t extents, std::uint64_t seed);
  ~FileStorage() override;
  FileStorage(const FileStorage&) = delete;
  FileStorage& operator=(const FileStorage&) = delete;

  cumempool_backup_tier tier() const noexcept override { return CUMEMPOOL_BACKUP_FILE; }
  void save(Transfer& transfer, std::size_t position, cumempool_address source,
            std::size_t bytes) override;
  // If the file does not hold the saved bytes, throws Error (CUMEMPOOL_BACKUP_DAMAGED), here or
  // from the bounce buffers.
  void load(Transfer& transfer, std::size_t position, cumempool_address destination,
            std::size_t bytes) override;
  // If `writable`, no slice is checked from now on, since the program may change the file.
  View view(std::size_t position, std::size_t bytes, bool writable) override;

 private:
  // A slice in the file.
  struct StoredSlice {
    std::size_t position = 0;
    std::size_t bytes = 0;
    std::size_t offset = 0;  // in the file
    cumempool_digest digest{};
    bool written = false;
    std::size_t end() const noexcept { return offset + bytes; }
  };
  // Adjacent slices of the file that fit into one buffer.
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
  std::vector<StoredSlice> slices_;  // by position; never reallocates, since threads use them
  bool checked_ = true;
  std::weak_ptr<std::byte> mapping_;  // of the whole room, shared by all open views
};

}  // namespace cumempool::backup
