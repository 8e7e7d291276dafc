// Which live allocation of the process an address belongs to, whichever allocator made it.
#include "pool/registry.hpp"

#include <iterator>

namespace cumempool::pool {

Registry& Registry::instance() {
  // Never destroyed: torch may free through a slot after static destructors have run (R14).
  static auto& registry = *new Registry;
  return registry;
}

void Registry::add(const RecordPointer& record) {
  const std::lock_guard lock(mutex_);
  records_.emplace_hint(records_.end(), record->address, record);  // addresses ascend, mostly
}

RecordPointer Registry::take(cumempool_address address) {
  const std::lock_guard lock(mutex_);
  const auto found = records_.find(address);
  if (found == records_.end()) return nullptr;
  RecordPointer record = found->second;
  records_.erase(found);
  return record;
}

RecordPointer Registry::find(cumempool_address address) const {
  const std::lock_guard lock(mutex_);
  const auto after = records_.upper_bound(address);
  if (after == records_.begin()) return nullptr;
  const RecordPointer& record = std::prev(after)->second;
  return address - record->address < record->bytes ? record : nullptr;
}

}  // namespace cumempool::pool
