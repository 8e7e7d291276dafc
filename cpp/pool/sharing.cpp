// Hands the physical memory of an allocation to other processes.
#include "pool/sharing.hpp"

#include <exception>

#include "pool/registry.hpp"
#include "pool/snapshot.hpp"

namespace cumempool::pool {
namespace {

Error refusal(cumempool_status status, const char* why, const char* advice) {
  Error error(status, why);
  error.advice = advice;
  return error;
}

void refuse(Allocator& allocator, const Record& record, std::uint32_t handle_type) {
  if (!record.memory.can_export()) {
    throw refusal(CUMEMPOOL_UNSUPPORTED, "memory of cudaMalloc has no handle to export",
                  "share it with torch's own means, or give the tag backing='vmm'");
  }
  if (record.asleep) {
    throw refusal(CUMEMPOOL_INVALID_ARGUMENT, "the memory is asleep", "wake its tag first");
  }
  const auto& properties = allocator.devices().at(record.device)->kind().properties;
  if ((properties.handle_types & handle_type) == 0) {
    throw refusal(CUMEMPOOL_UNSUPPORTED, "the memory cannot be exported as that type of handle",
                  "cumempool.probe() says which types the device grants");
  }
}

}  // namespace

cumempool_allocation_info export_memory(Allocator& allocator, cumempool_address address,
                                        std::uint32_t handle_type, void* exported) {
  const Turnstile::Turn turn(allocator.turnstile(), "export");
  const RecordPointer record = Registry::instance().find(address);
  // Claimed, so that it cannot be freed meanwhile.
  const auto claimed = allocator.records().claim(
      [&](const Record& candidate) { return &candidate == record.get() && !candidate.freed; });
  if (claimed.empty()) {
    throw refusal(CUMEMPOOL_NOT_OWNED, "the address lies in no allocation of the allocator",
                  "pass a tensor of the allocator's pools");
  }
  try {
    refuse(allocator, *record, handle_type);
    const auto& table = allocator.driver().table();
    driver::check(table, "export_handle",
                  table.export_handle(table.self, record->memory.handle(), handle_type, exported),
                  record->device, record->bytes);
  } catch (Error& error) {
    allocator.unclaim(claimed);
    annotate(error, "export", record.get());
    throw;
  } catch (const std::exception&) {  // no memory to say what failed
    allocator.unclaim(claimed);
    throw;
  }
  const cumempool_allocation_info info = describe(*record);
  allocator.unclaim(claimed);
  return info;
}

}  // namespace cumempool::pool
