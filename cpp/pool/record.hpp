// One allocation as the pool sees it: its memory, its tag, whether it sleeps, and its backup.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>

#include "backup/backup.hpp"
#include "pool/tag.hpp"
#include "vmm/allocation.hpp"

namespace cumempool::pool {

class Allocator;

// `memory` belongs to whoever claimed the record, or retired it; everything below the line is
// guarded by the lock of the RecordSet.
struct Record {
  Record(std::shared_ptr<Allocator> owner_of, const Tag& under, int on_device,
         std::size_t bytes_requested, vmm::Allocation&& made, bool is_preserved)
      : owner(std::move(owner_of)),
        tag(&under),
        device(on_device),
        requested_bytes(bytes_requested),
        address(made.address()),
        bytes(made.bytes()),
        memory(std::move(made)),
        preserved(is_preserved) {}

  const std::shared_ptr<Allocator> owner;
  const Tag* const tag;
  const int device;
  const std::size_t requested_bytes;
  const cumempool_address address;
  const std::size_t bytes;
  vmm::Allocation memory;
  // ---------------------------------------------------------------------------------------------
  std::uint64_t sequence = 0;
  std::uint64_t generation = 1;
  bool asleep = false;
  bool preserved;           // its contents are kept where those of its tag are discarded
  bool unreleased = false;  // asleep, but the driver would not take the memory back
  bool intact = false;      // unreleased, and that memory still holds the contents
  // Asleep: the backup. Awake: a retained one, whose digests tell what has changed since. Null:
  // none.
  std::shared_ptr<backup::Backup> image;
  BackupChoice image_choice;  // where it is
  bool claimed = false;       // by the transition under way
  bool freed = false;         // by the program; while it is claimed, its teardown waits for that

  std::list<std::shared_ptr<Record>>::iterator place;  // in the set
  // Once it was taken out of the set, for the Reaper: the next of the list that it is in, and
  // whether its memory was given back, or refused.
  std::shared_ptr<Record> next;
  bool reaped = false;
};

}  // namespace cumempool::pool
