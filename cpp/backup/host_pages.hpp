// Address space and pages from the kernel, as backups want them: huge pages, near to a device, and
// not inherited by children.
#pragma once

#include <cstddef>

namespace cumempool::backup {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Reserves up to `wanted` bytes of addresses, whole huge pages, that nothing can be written to yet;
// as much as the limits of the process allow, at least `least`. Throws Error
// (CUMEMPOOL_OUT_OF_HOST_MEMORY).
std::byte* reserve_pages(std::size_t wanted, std::size_t least, std::size_t& got);
void unreserve_pages(std::byte* first, std::size_t bytes) noexcept;

// Makes reserved addresses usable; `numa_node` -1 = wherever there is room. Nothing is touched.
// Throws Error (CUMEMPOOL_OUT_OF_HOST_MEMORY).
void commit_pages(std::byte* first, std::size_t bytes, int numa_node);
// Gives the pages back; the addresses stay reserved.
void decommit_pages(std::byte* first, std::size_t bytes) noexcept;

}  // namespace cumempool::backup
