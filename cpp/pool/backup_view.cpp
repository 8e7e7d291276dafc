// A look at the backup of sleeping memory, without a copy.
#include "pool/backup_view.hpp"

#include <utility>

#include "pool/registry.hpp"

namespace cumempool::pool {
namespace {

Error refusal(cumempool_status status, const char* why, const Record* record, const char* advice) {
  Error error(status, why);
  error.advice = advice;
  annotate(error, "read_backup", record);
  return error;
}

}  // namespace

BackupView::BackupView(std::shared_ptr<Allocator> allocator, cumempool_address address,
                       std::size_t bytes, bool writable)
    : allocator_(std::move(allocator)) {
  const Turnstile::Turn turn(allocator_->turnstile(), "read_backup");
  if (bytes == 0) {
    throw refusal(CUMEMPOOL_INVALID_ARGUMENT, "a view has at least one byte", nullptr,
                  "ask for the bytes that you read");
  }
  const RecordPointer record = Registry::instance().find(address);
  bool lives = false;
  bool asleep = false;
  if (record != nullptr && record->owner == allocator_) {
    allocator_->records().update([&] {
      lives = !record->freed;  // else it is being torn down
      asleep = record->asleep;
      if (lives && asleep) image_ = record->image;
    });
  }
  if (!lives) {
    throw refusal(CUMEMPOOL_NOT_OWNED, "the address lies in no allocation of the allocator",
                  nullptr, "pass a tensor of the allocator's pools");
  }
  if (image_ == nullptr) {
    throw refusal(CUMEMPOOL_INVALID_ARGUMENT,
                  asleep ? "its contents were discarded" : "the memory is awake", record.get(),
                  "read backups of tags that sleep with a backup");
  }
  {
    const driver::ContextScope scope(allocator_->driver(), record->device);
    data_ = image_->view(address - record->address, bytes, writable);
    if (image_.use_count() == 2) image_->settle_views();  // the record's and this one
  }
  if (data_ == nullptr && image_->tier() == CUMEMPOOL_BACKUP_PEER) {
    throw refusal(CUMEMPOOL_UNSUPPORTED, "the backup is in the memory of another device",
                  record.get(), "wake it, or use another tier");
  }
  if (data_ == nullptr) {
    throw refusal(CUMEMPOOL_INVALID_ARGUMENT, "the bytes are not all in the backup", record.get(),
                  "read live bytes of one allocation");
  }
  allocator_->counters().open_views += 1;
}

BackupView::~BackupView() {
  const bool was_open = data_ != nullptr;
  data_.reset();
  image_.reset();
  if (was_open) allocator_->counters().open_views -= 1;
}

}  // namespace cumempool::pool
