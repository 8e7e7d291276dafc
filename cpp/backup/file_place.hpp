// A backup in a file, written and read through pinned buffers, each slice checked on its way
// back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "backup/backup_file.hpp"
#include "backup/place.hpp"

namespace cumempool::backup {

// Slices are cut from the start of each save() that makes the place grow. Each begins at a
// block of the file, whatever its position in the image: a slice whose bytes are no whole
// blocks leaves a gap behind it. save() and load() take whole slices. The file outlives the
// place.
class FilePlace : public Place {
 public:
  // Takes its whole room at once: `bytes`, all of them multiples of CUMEMPOOL_DIGEST_ALIGNMENT,
  // that come in `extents` saves that do not end with a whole block. `seed` is that of the
  // digests. Throws Error (CUMEMPOOL_BACKUP_FAILED).
  FilePlace(BackupFile& file, std::size_t bytes, std::size_t extents, std::uint64_t seed);
  ~FilePlace() override;
  FilePlace(const FilePlace&) = delete;
  FilePlace& operator=(const FilePlace&) = delete;

  cumempool_backup_tier tier() const noexcept override { return CUMEMPOOL_BACKUP_FILE; }
  void save(Transfer& transfer, std::size_t position, cumempool_address source,
            std::size_t bytes) override;
  // Throws Error (CUMEMPOOL_BACKUP_DAMAGED), here or from the staged copies, where the file
  // does not hold what was saved.
  void load(Transfer& transfer, std::size_t position, cumempool_address destination,
            std::size_t bytes) override;
  // With `writable` the file is right, from now on, whatever it holds: nothing is checked any
  // more.
  View view(std::size_t position, std::size_t bytes, bool writable) override;

 private:
  struct Slice {
    std::size_t position = 0;
    std::size_t bytes = 0;
    std::size_t offset = 0;  // in the file
    cumempool_digest digest{};
    bool written = false;
    std::size_t end() const noexcept { return offset + bytes; }
  };
  // Slices side by side in the file, which one buffer takes.
  struct Run {
    Slice* first = nullptr;
    std::size_t count = 0;
    std::size_t bytes = 0;
  };

  std::size_t saved_bytes() const noexcept;
  void grow(std::size_t bytes);
  Slice* find(std::size_t position);
  Run next_run(std::size_t position, std::size_t bytes);
  void write(const Run& run, const std::byte* data);
  void read(const Run& run, std::byte* data);
  [[noreturn]] void refuse(const Slice& slice, const char* problem) const;

  BackupFile& file_;
  const std::uint64_t seed_;
  const std::size_t room_;
  const std::size_t offset_;   // of the room
  std::vector<Slice> slices_;  // by position; never moves: threads use them
  bool checked_ = true;
  std::weak_ptr<FileMapping> mapping_;  // that views share; gone with the last of them
};

}  // namespace cumempool::backup
