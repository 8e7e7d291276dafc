// Records of the C interface as Python dictionaries, each made from one list of its fields.
#include "records.hpp"

#include <cstddef>
#include <type_traits>

namespace py = pybind11;

namespace cumempool::python {
namespace {

// ---- values -------------------------------------------------------------------------------------

// Return the name of an enum value, or None for UNSET.
py::object value_of(cumempool_backup_tier tier) {
  constexpr const char* kNames[] = {nullptr, "pinned", "pageable", "file", "peer"};
  return kNames[tier] == nullptr ? py::object(py::none()) : py::str(kNames[tier]);
}
py::object value_of(cumempool_on_sleep policy) {
  constexpr const char* kNames[] = {nullptr, "offload", "discard"};
  return kNames[policy] == nullptr ? py::object(py::none()) : py::str(kNames[policy]);
}
py::object value_of(cumempool_on_wake policy) {
  constexpr const char* kNames[] = {nullptr, "undefined", "zero"};
  return kNames[policy] == nullptr ? py::object(py::none()) : py::str(kNames[policy]);
}
py::object value_of(cumempool_state state) {
  constexpr const char* kNames[] = {"awake", "backed_up", "discarded"};
  return py::str(kNames[state]);
}
py::object value_of(cumempool_backing backing) {
  return py::str(backing == CUMEMPOOL_BACKING_CUDA_MALLOC ? "cuda_malloc" : "vmm");
}
py::object value_of(const char* text) { return py::str(text); }
template <typename Number>
std::enable_if_t<std::is_arithmetic_v<Number>, py::object> value_of(Number number) {
  return py::cast(number);
}

// ---- lists of fields ----------------------------------------------------------------------------

// Enter a field of a record into a dictionary by its name in C.
#define FIELD(name) fields[#name] = value_of(record.name)
#define FLAG(name) fields[#name] = py::bool_(record.name != 0)

py::dict fields_of(const cumempool_totals& record) {
  py::dict fields;
  FIELD(reserved_address_bytes);
  FIELD(physical_bytes);
  FIELD(mapped_bytes);
  FIELD(pending_free_bytes);
  FIELD(host_bytes);
  FIELD(host_used_bytes);
  FIELD(pageable_bytes);
  FIELD(file_bytes);
  FIELD(peer_bytes);
  FIELD(staging_bytes);
  FIELD(malloc_calls);
  FIELD(malloc_failures);
  FIELD(free_calls);
  FIELD(sleeps);
  FIELD(wakes);
  FIELD(swaps);
  FIELD(failed_transitions);
  FIELD(peak_physical_bytes);
  FIELD(leaked_bytes);
  return fields;
}

py::dict fields_of(const cumempool_tag_stats& record) {
  py::dict fields;
  FIELD(tag);
  FIELD(device);
  FIELD(on_sleep);
  FIELD(on_wake);
  FIELD(handle_types);
  FLAG(rdma);
  FIELD(awake_allocations);
  FIELD(awake_bytes);
  FIELD(backed_up_allocations);
  FIELD(backed_up_bytes);
  FIELD(discarded_allocations);
  FIELD(discarded_bytes);
  FIELD(backup_bytes);
  FIELD(retained_bytes);
  FIELD(backup_tier);
  FIELD(backing);
  FIELD(pins);
  FIELD(unreleased_bytes);
  FIELD(preserved_bytes);
  return fields;
}

py::dict fields_of(const cumempool_report_row& record) {
  py::dict fields;
  FIELD(tag);
  FIELD(device);
  FIELD(allocations);
  FIELD(freed_bytes);
  FIELD(mapped_bytes);
  FIELD(backed_up_bytes);
  FIELD(clean_bytes);
  FIELD(restored_bytes);
  FIELD(discarded_bytes);
  FIELD(zeroed_bytes);
  FIELD(copy_seconds);
  return fields;
}

template <typename Item, typename Convert>
py::list list_of(const Item* items, std::size_t count, const Convert& convert) {
  py::list list(count);
  for (std::size_t i = 0; i < count; ++i) list[i] = convert(items[i]);
  return list;
}

}  // namespace

py::dict fields_of(const cumempool_allocation_info& record) {
  py::dict fields;
  FIELD(address);
  FIELD(bytes);
  FIELD(requested_bytes);
  FIELD(tag);
  FIELD(device);
  FIELD(state);
  FIELD(generation);
  FIELD(backup_bytes);
  FIELD(backup_tier);
  FIELD(backing);
  FIELD(sequence);
  FLAG(preserved);
  return fields;
}

py::dict fields_of(const cumempool_device_probe& record) {
  py::dict fields;
  FIELD(name);
  FIELD(compute_capability);
  FLAG(virtual_memory);
  FLAG(usable);
  FIELD(handle_types);
  FIELD(handle_types_claimed);
  FLAG(rdma);
  FLAG(rdma_claimed);
  FIELD(fence);
  FLAG(pins_host_memory);
  FIELD(granularity);
  FIELD(free_bytes);
  FIELD(total_bytes);
  FIELD(reason);
  return fields;
}

// A field that does not apply is None.
py::dict fields_of(const cumempool_error& record) {
  py::dict fields;
  fields["status"] = static_cast<int>(record.status);
  FIELD(message);
  FIELD(operation);
  fields["tag"] = *record.tag == '\0' ? py::object(py::none()) : py::str(record.tag);
  fields["device"] = record.device < 0 ? py::object(py::none()) : py::int_(record.device);
  FIELD(bytes);
  FIELD(driver_call);
  FIELD(result);
  FIELD(result_name);
  const bool known = record.total_bytes != 0;
  fields["free_bytes"] = known ? py::object(py::int_(record.free_bytes)) : py::none();
  fields["total_bytes"] = known ? py::object(py::int_(record.total_bytes)) : py::none();
  FIELD(advice);
  fields["secondary"] = py::tuple(list_of(record.secondary, record.secondary_count,
                                          [](const char* text) { return py::str(text); }));
  return fields;
}

py::dict fields_of(const cumempool_snapshot& snapshot) {
  std::size_t count = 0;
  const auto* tags = cumempool_snapshot_tags(&snapshot, &count);
  py::dict fields;
  fields["tags"] = list_of(tags, count, [](const auto& row) { return fields_of(row); });
  const auto* allocations = cumempool_snapshot_allocations(&snapshot, &count);
  fields["allocations"] =
      list_of(allocations, count, [](const auto& info) { return fields_of(info); });
  fields["totals"] = fields_of(*cumempool_snapshot_totals(&snapshot));
  fields["last_malloc_failure"] = cumempool_snapshot_last_malloc_failure(&snapshot);
  return fields;
}

py::list ReportObject::rows() const {
  std::size_t count = 0;
  const cumempool_report_row* rows = cumempool_report_rows(report_.get(), &count);
  return list_of(rows, count, [](const auto& row) { return fields_of(row); });
}

py::list ReportObject::problems() const {
  std::size_t count = 0;
  const char* const* problems = cumempool_report_problems(report_.get(), &count);
  return list_of(problems, count, [](const char* problem) { return py::str(problem); });
}

}  // namespace cumempool::python
