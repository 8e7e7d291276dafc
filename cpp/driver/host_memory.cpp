// Device memory of the host driver. A reservation is PROT_NONE address space. Physical memory is a
// sealed memfd, and a mapping is that memfd at a fixed address. An allocation is a mapping with
// address space of its own and no handle.
#include "driver/host_memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "driver/scope_exit.hpp"

namespace cumempool::driver {
namespace {

// No one can truncate sealed memory under a mapping, so touching it never raises SIGBUS.
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr int kPoison = 0xff;  // NaN in every floating-point format

using FileStatus = struct stat;

cumempool_result from_errno(int error) {
  return error == ENOMEM || error == ENOSPC ? CUMEMPOOL_RESULT_OUT_OF_MEMORY
                                            : CUMEMPOOL_RESULT_OPERATING_SYSTEM;
}

void* pointer(cumempool_address address) {
  return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));  // NOLINT
}

cumempool_address address_of(const void* pointer) {
  return static_cast<cumempool_address>(reinterpret_cast<std::uintptr_t>(pointer));
}

// Fills one page per granule. New memory has undefined contents (C8), but a memfd reads as zero,
// which hides a missing restore or fill. One page shows it and keeps large memory sparse.
bool poison(int descriptor, std::size_t bytes, std::size_t granularity) {
  const std::vector<unsigned char> page(static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), kPoison);
  for (std::size_t offset = 0; offset < bytes; offset += granularity) {
    if (pwrite(descriptor, page.data(), page.size(), static_cast<off_t>(offset)) < 0) return false;
  }
  return true;
}

// Takes address space at a multiple of the granularity. Returns 0 if the kernel refuses; errno says
// why.
cumempool_address take_address_space(std::size_t bytes, std::size_t granularity) {
  const std::size_t padded = bytes + granularity;
  void* const range =
      mmap(nullptr, padded, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) return 0;
  const cumempool_address first = address_of(range);
  const cumempool_address begin = (first + granularity - 1) / granularity * granularity;
  if (begin > first) munmap(range, begin - first);
  munmap(pointer(begin + bytes), first + padded - (begin + bytes));
  return begin;
}

void give_address_space_back(cumempool_address begin, std::size_t bytes) {
  if (begin != 0) munmap(pointer(begin), bytes);
}

bool map_file(cumempool_address address, std::size_t bytes, int file, int protection) {
  return mmap(pointer(address), bytes, protection, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, file,
              0) != MAP_FAILED;
}

// Leaves the address space empty.
bool map_nothing(cumempool_address address, std::size_t bytes) {
  return mmap(pointer(address), bytes, PROT_NONE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED;
}

// The access of the CPU to memory with these readers and writers: it stands in for the devices.
int protection(std::uint64_t readers, std::uint64_t writers) {
  if (readers == 0) return PROT_NONE;
  return writers == 0 ? PROT_READ : PROT_READ | PROT_WRITE;
}

std::uint64_t bit_of(int device) { return std::uint64_t{1} << static_cast<unsigned>(device); }

bool same_file(int first, int second) {
  FileStatus a{};
  FileStatus b{};
  return fstat(first, &a) == 0 && fstat(second, &b) == 0 && a.st_dev == b.st_dev &&
         a.st_ino == b.st_ino;
}

// Names memory for other processes of the same user: the process and descriptor number where it is
// open, and the identity of the file. Unlike a descriptor, it keeps nothing alive.
struct FabricHandle {
  std::array<char, 8> mark;
  std::uint64_t process;
  std::uint64_t number;
  std::uint64_t file_system;
  std::uint64_t file;
};
static_assert(sizeof(FabricHandle) <= CUMEMPOOL_FABRIC_HANDLE_BYTES);
constexpr std::array<char, 8> kFabricMark{'c', 'u', 'm', 'e', 'm', 'h', 's', 't'};

bool write_fabric(int number, void* exported) {
  FileStatus file{};
  if (fstat(number, &file) != 0) return false;
  const FabricHandle handle{kFabricMark, static_cast<std::uint64_t>(getpid()),
                            static_cast<std::uint64_t>(number), file.st_dev, file.st_ino};
  std::memset(exported, 0, CUMEMPOOL_FABRIC_HANDLE_BYTES);
  std::memcpy(exported, &handle, sizeof handle);
  return true;
}

// Opens the file that a handle names; -1 if it is gone or this process may not open it.
Descriptor open_fabric(const void* exported) {
  FabricHandle handle{};
  std::memcpy(&handle, exported, sizeof handle);
  if (handle.mark != kFabricMark) return Descriptor(-1);
  const std::string path =
      "/proc/" + std::to_string(handle.process) + "/fd/" + std::to_string(handle.number);
  FileStatus file{};
  // A reused number may be any file, and opening that could disturb it.
  if (stat(path.c_str(), &file) != 0 || file.st_dev != handle.file_system ||
      file.st_ino != handle.file) {
    return Descriptor(-1);
  }
  return Descriptor(open(path.c_str(), O_RDWR | O_CLOEXEC));
}

// Forgets the exported descriptors that the program has closed.
void drop_closed(HostPhysical& memory) {
  auto& numbers = memory.exported;
  numbers.erase(std::remove_if(numbers.begin(), numbers.end(),
                               [&](int n) { return !same_file(n, memory.descriptor.get()); }),
                numbers.end());
}

}  // namespace

Descriptor::~Descriptor() {
  if (number_ >= 0) close(number_);
}

HostMemory::HostMemory(const cumempool_host_driver_options& options)
    : device_count_(options.device_count),
      bytes_per_device_(options.bytes_per_device),
      granularity_(options.granularity),
      handle_types_(options.handle_types),
      rdma_(options.rdma != 0),
      charged_(static_cast<std::size_t>(options.device_count), 0) {}

HostMemory::~HostMemory() {
  for (const auto& [address, bytes] : reservations_) munmap(pointer(address), bytes);
  for (const auto& [address, mapping] : mappings_) {
    if (mapping.allocated) munmap(pointer(address), whole_granules(mapping.bytes));
  }
}

bool HostMemory::granules(std::uint64_t value) const noexcept {
  return value != 0 && value % granularity_ == 0;
}

std::size_t HostMemory::whole_granules(std::size_t bytes) const noexcept {
  return (bytes + granularity_ - 1) / granularity_ * granularity_;
}

bool HostMemory::device_exists(int device) const noexcept {
  return device >= 0 && device < device_count_;
}

cumempool_result HostMemory::check_properties(const cumempool_memory_properties* properties) const {
  constexpr std::uint32_t known = CUMEMPOOL_HANDLE_POSIX_FD | CUMEMPOOL_HANDLE_FABRIC;
  if (properties == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  if (!device_exists(properties->device)) return CUMEMPOOL_RESULT_INVALID_DEVICE;
  if ((properties->handle_types & ~known) != 0 || properties->rdma > 1 ||
      properties->reserved != 0) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostMemory::check_grants(const cumempool_memory_properties& properties) const {
  const std::uint32_t refused = properties.handle_types & ~handle_types_;
  if ((refused & CUMEMPOOL_HANDLE_FABRIC) != 0) return CUMEMPOOL_RESULT_NOT_PERMITTED;
  if (refused != 0 || (properties.rdma != 0 && !rdma_)) return CUMEMPOOL_RESULT_NOT_SUPPORTED;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostMemory::granularity(const cumempool_memory_properties* properties,
                                         std::size_t* bytes) {
  if (const auto result = check_properties(properties)) return result;
  if (bytes == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  *bytes = granularity_;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostMemory::reserve(std::size_t bytes, cumempool_address* address) {
  if (!granules(bytes) || bytes + granularity_ < bytes || address == nullptr) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  cumempool_address space = take_address_space(bytes, granularity_);
  if (space == 0) return from_errno(errno);
  const ScopeExit give_back([&] { give_address_space_back(space, bytes); });
  reservations_.emplace(space, bytes);
  *address = std::exchange(space, 0);
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostMemory::unreserve(cumempool_address address, std::size_t bytes) {
  const auto found = reservations_.find(address);
  if (found == reservations_.end() || found->second != bytes || overlaps_mapping(address, bytes)) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  if (munmap(pointer(address), bytes) != 0) return from_errno(errno);
  reservations_.erase(found);
  return CUMEMPOOL_RESULT_SUCCESS;
}

// Returns null if the kernel refuses; errno says why.
std::shared_ptr<HostPhysical> HostMemory::make_physical(std::size_t bytes, int device,
                                                        std::uint32_t handle_types) const {
  Descriptor file(memfd_create("cumempool-host", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (file.get() < 0 || ftruncate(file.get(), static_cast<off_t>(bytes)) != 0 ||
      !poison(file.get(), bytes, granularity_) || fcntl(file.get(), F_ADD_SEALS, kSeals) != 0) {
    return nullptr;
  }
  return std::make_shared<HostPhysical>(std::move(file), bytes, device, handle_types);
}

void HostMemory::charge(HostPhysical& memory) {
  memory.charged = true;
  charged_[static_cast<std::size_t>(memory.device)] += memory.bytes;
}

cumempool_result HostMemory::create(std::size_t bytes,
                                    const cumempool_memory_properties* properties,
                                    cumempool_physical* physical) {
  if (const auto result = check_properties(properties)) return result;
  if (!granules(bytes) || physical == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  if (const auto result = check_grants(*properties)) return result;
  if (bytes > free_bytes(properties->device)) return CUMEMPOOL_RESULT_OUT_OF_MEMORY;

  const auto memory = make_physical(bytes, properties->device, properties->handle_types);
  if (memory == nullptr) return from_errno(errno);
  handles_.emplace(next_handle_, memory);
  memory->handles = 1;
  charge(*memory);
  *physical = next_handle_++;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostMemory::release(cumempool_physical physical) {
  const auto found = handles_.find(physical);
  if (found == handles_.end()) return CUMEMPOOL_RESULT_INVALID_HANDLE;
  --found->second->handles;
  settle(*found->second);
  handles_.erase(found);
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostMemory::map(cumempool_address address, std::size_t bytes,
                                 cumempool_physical physical) {
  if (!granules(bytes) || !granules(address)) return CUMEMPOOL_RESULT_INVALID_VALUE;
  const auto handle = handles_.find(physical);
  if (handle == handles_.end()) return CUMEMPOOL_RESULT_INVALID_HANDLE;
  const auto& memory = handle->second;
  if (bytes != memory->bytes || !inside_reservation(address, bytes)) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  if (overlaps_mapping(address, bytes)) return CUMEMPOOL_RESULT_ALREADY_MAPPED;

  const auto mapping = mappings_.emplace(address, Mapping{bytes, memory, epoch_ + 1}).first;
  if (!map_file(address, bytes, memory->descriptor.get(), PROT_NONE)) {
    const int error = errno;
    mappings_.erase(mapping);
    return from_errno(error);
  }
  ++epoch_;
  ++memory->mappings;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostMemory::unmap(cumempool_address address, std::size_t bytes) {
  if (!granules(bytes) || !granules(address)) return CUMEMPOOL_RESULT_INVALID_VALUE;
  const auto found = mappings_.find(address);
  if (found == mappings_.end() || found->second.bytes != bytes || found->second.allocated) {
    return overlaps_mapping(address, bytes) ? CUMEMPOOL_RESULT_INVALID_VALUE
                                            : CUMEMPOOL_RESULT_NOT_MAPPED;
  }
  if (!map_nothing(address, bytes)) return from_errno(errno);
  --found->second.memory->mappings;
  settle(*found->second.memory);
  mappings_.erase(found);
  return CUMEMPOOL_RESULT_SUCCESS;
}

// Grants imported memory, because its device is not known here.
bool HostMemory::may_access(const HostPhysical& memory, std::uint64_t devices) const noexcept {
  if (peers_ || memory.device < 0) return true;
  return devices == bit_of(memory.device);
}

cumempool_result HostMemory::device_bits(const int* devices, std::size_t device_count,
                                         std::uint64_t& bits) const {
  bits = 0;
  for (std::size_t i = 0; i < device_count; ++i) {
    if (!device_exists(devices[i])) return CUMEMPOOL_RESULT_INVALID_DEVICE;
    bits |= bit_of(devices[i]);
  }
  return CUMEMPOOL_RESULT_SUCCESS;
}

// Gives the CPU the access that the devices are about to get, in all of the mappings or in none.
cumempool_result HostMemory::protect(Mappings::iterator first, Mappings::iterator last,
                                     std::uint64_t devices, cumempool_access access) {
  for (auto mapping = first; mapping != last; ++mapping) {
    const auto& [address, range] = *mapping;
    const int wanted = protection(devices, range.writers_after(devices, access));
    if (mprotect(pointer(address), range.bytes, wanted) == 0) continue;
    const int error = errno;
    for (auto done = first; done != mapping; ++done) {
      const auto& [at, back] = *done;
      mprotect(pointer(at), back.bytes, protection(back.readers, back.writers));
    }
    return from_errno(error);
  }
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostMemory::set_access(cumempool_address address, std::size_t bytes,
                                        const int* devices, std::size_t device_count,
                                        cumempool_access access) {
  if (!granules(bytes) || !granules(address) || devices == nullptr || device_count == 0 ||
      (access != CUMEMPOOL_ACCESS_READ && access != CUMEMPOOL_ACCESS_READ_WRITE)) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  std::uint64_t bits = 0;
  if (const auto result = device_bits(devices, device_count, bits)) return result;
  if (!overlaps_mapping(address, bytes)) return CUMEMPOOL_RESULT_NOT_MAPPED;
  const cumempool_address end = address + bytes;
  const auto first = mappings_.find(address);
  cumempool_address covered = address;
  auto last = first;
  while (last != mappings_.end() && last->first == covered && covered < end &&
         !last->second.allocated) {
    if (!may_access(*last->second.memory, bits)) return CUMEMPOOL_RESULT_INVALID_DEVICE;
    covered += last->second.bytes;
    ++last;
  }
  if (covered != end) return CUMEMPOOL_RESULT_INVALID_VALUE;
  if (const auto result = protect(first, last, bits, access)) return result;
  for (auto mapping = first; mapping != last; ++mapping) {
    Mapping& range = mapping->second;
    range.writers = range.writers_after(bits, access);
    range.readers |= bits;
  }
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostMemory::allocate(int device, std::size_t bytes, cumempool_address* address) {
  if (bytes == 0 || address == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  // Budgets are whole granules, so a size that fits also fits rounded up.
  if (bytes > free_bytes(device)) return CUMEMPOOL_RESULT_OUT_OF_MEMORY;
  const std::size_t size = whole_granules(bytes);
  const auto memory = make_physical(size, device, 0);
  if (memory == nullptr) return from_errno(errno);
  cumempool_address space = take_address_space(size, granularity_);
  const ScopeExit give_back([&] { give_address_space_back(space, size); });
  if (space == 0 || !map_file(space, size, memory->descriptor.get(), PROT_READ | PROT_WRITE)) {
    return from_errno(errno);
  }
  mappings_.emplace(space,
                    Mapping{bytes, memory, epoch_ + 1, true, bit_of(device), bit_of(device)});
  ++epoch_;
  ++memory->mappings;
  charge(*memory);
  *address = std::exchange(space, 0);
  return CUMEMPOOL_RESULT_SUCCESS;
}

bool HostMemory::allocated(int device, cumempool_address address) const {
  const auto found = mappings_.find(address);
  return found != mappings_.end() && found->second.allocated && found->second.memory != nullptr &&
         found->second.memory->device == device;
}

cumempool_result HostMemory::deallocate(int device, cumempool_address address) {
  if (!allocated(device, address)) return CUMEMPOOL_RESULT_INVALID_VALUE;
  const auto found = mappings_.find(address);
  if (munmap(pointer(address), whole_granules(found->second.bytes)) != 0) return from_errno(errno);
  --found->second.memory->mappings;
  settle(*found->second.memory);
  mappings_.erase(found);
  return CUMEMPOOL_RESULT_SUCCESS;
}

// Keeps the address space, so that no later memory gets the address of lost memory.
void HostMemory::lose_allocations(int device) {
  for (auto& [address, mapping] : mappings_) {
    if (!allocated(device, address)) continue;
    (void)map_nothing(address, whole_granules(mapping.bytes));  // no device has access any more
    mapping.readers = mapping.writers = 0;
    --mapping.memory->mappings;
    settle(*mapping.memory);
    mapping.memory = nullptr;
  }
}

cumempool_result HostMemory::export_handle(cumempool_physical physical, std::uint32_t handle_type,
                                           void* exported) {
  if (exported == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  const auto found = handles_.find(physical);
  if (found == handles_.end()) return CUMEMPOOL_RESULT_INVALID_HANDLE;
  const bool fabric = handle_type == CUMEMPOOL_HANDLE_FABRIC;
  if (fabric && (handle_types_ & handle_type) == 0) return CUMEMPOOL_RESULT_NOT_PERMITTED;
  const auto& memory = found->second;
  if ((!fabric && handle_type != CUMEMPOOL_HANDLE_POSIX_FD) ||
      (memory->handle_types & handle_type) == 0) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  settle_exported();
  drop_closed(*memory);
  memory->exported.reserve(memory->exported.size() + 1);
  if (std::find(exported_.begin(), exported_.end(), memory) == exported_.end()) {
    exported_.push_back(memory);
  }
  if (fabric) {
    return write_fabric(memory->descriptor.get(), exported) ? CUMEMPOOL_RESULT_SUCCESS
                                                            : from_errno(errno);
  }
  const int number = fcntl(memory->descriptor.get(), F_DUPFD_CLOEXEC, 0);
  if (number < 0) return from_errno(errno);
  memory->exported.push_back(number);
  *static_cast<int*>(exported) = number;
  return CUMEMPOOL_RESULT_SUCCESS;
}

cumempool_result HostMemory::import_handle(const void* exported, std::uint32_t handle_type,
                                           cumempool_physical* physical) {
  if (exported == nullptr || physical == nullptr) return CUMEMPOOL_RESULT_INVALID_VALUE;
  if (handle_type == CUMEMPOOL_HANDLE_FABRIC) {
    if ((handle_types_ & handle_type) == 0) return CUMEMPOOL_RESULT_NOT_PERMITTED;
    return import_file(open_fabric(exported).get(), handle_type, physical);
  }
  if (handle_type != CUMEMPOOL_HANDLE_POSIX_FD) return CUMEMPOOL_RESULT_INVALID_VALUE;
  return import_file(*static_cast<const int*>(exported), handle_type, physical);
}

cumempool_result HostMemory::import_file(int number, std::uint32_t handle_type,
                                         cumempool_physical* physical) {
  FileStatus file{};
  // Only memory that create() made has these seals.
  if (fcntl(number, F_GET_SEALS) != kSeals || fstat(number, &file) != 0 ||
      !granules(static_cast<std::uint64_t>(file.st_size))) {
    return CUMEMPOOL_RESULT_INVALID_VALUE;
  }
  const auto known = std::find_if(exported_.begin(), exported_.end(), [&](const auto& memory) {
    return same_file(number, memory->descriptor.get());
  });
  std::shared_ptr<HostPhysical> memory;
  if (known != exported_.end()) {
    memory = *known;
  } else {
    Descriptor copy(fcntl(number, F_DUPFD_CLOEXEC, 0));
    if (copy.get() < 0) return from_errno(errno);
    memory = std::make_shared<HostPhysical>(std::move(copy), static_cast<std::size_t>(file.st_size),
                                            -1, handle_type);
  }
  handles_.emplace(next_handle_, memory);
  ++memory->handles;
  *physical = next_handle_++;
  return CUMEMPOOL_RESULT_SUCCESS;
}

std::uint64_t HostMemory::free_bytes(int device) {
  settle_exported();
  return bytes_per_device_ - charged_[static_cast<std::size_t>(device)];
}

bool HostMemory::resolve(const cumempool_extent& range, int device, cumempool_access access,
                         std::uint64_t epoch, std::vector<HostSegment>* segments) const {
  if (range.address + range.bytes < range.address) return false;
  const cumempool_address end = range.address + range.bytes;
  const std::uint64_t bit = bit_of(device);
  const auto next = mappings_.upper_bound(range.address);
  if (next == mappings_.begin()) return false;
  auto found = std::prev(next);
  for (cumempool_address cursor = range.address; cursor < end; ++found) {
    if (found == mappings_.end() || found->first > cursor) return false;
    const Mapping& mapping = found->second;
    const cumempool_address mapping_end = found->first + mapping.bytes;
    const auto granted = access == CUMEMPOOL_ACCESS_READ ? mapping.readers : mapping.writers;
    if (cursor >= mapping_end || (granted & bit) == 0 || mapping.epoch > epoch) return false;
    const std::size_t part = std::min(end, mapping_end) - cursor;
    if (segments != nullptr) segments->push_back({mapping.memory, cursor - found->first, part});
    cursor += part;
  }
  return true;
}

bool HostMemory::overlaps_mapping(cumempool_address address, std::size_t bytes) const {
  const auto next = mappings_.lower_bound(address);
  if (next != mappings_.end() && next->first - address < bytes) return true;
  if (next == mappings_.begin()) return false;
  const auto before = std::prev(next);
  return address - before->first < before->second.bytes;
}

bool HostMemory::inside_reservation(cumempool_address address, std::size_t bytes) const {
  const auto next = reservations_.upper_bound(address);
  if (next == reservations_.begin()) return false;
  const auto& [begin, size] = *std::prev(next);
  return address - begin < size && bytes <= size - (address - begin);
}

// Returns memory to its budget once no handle, mapping or descriptor keeps it.
void HostMemory::settle(HostPhysical& memory) {
  if (!memory.charged || memory.handles != 0 || memory.mappings != 0) return;
  drop_closed(memory);
  if (!memory.exported.empty()) return;
  memory.charged = false;
  charged_[static_cast<std::size_t>(memory.device)] -= memory.bytes;
}

// Looks for exported descriptors that the program has closed: no call says so.
void HostMemory::settle_exported() {
  const auto gone = [this](const std::shared_ptr<HostPhysical>& memory) {
    if (memory->handles != 0 || memory->mappings != 0) return false;
    drop_closed(*memory);
    settle(*memory);
    return memory->exported.empty();
  };
  exported_.erase(std::remove_if(exported_.begin(), exported_.end(), gone), exported_.end());
}

void HostMemory::count(HostDriverCounters& counters) {
  settle_exported();
  counters.handles = handles_.size();
  counters.reservations = reservations_.size();
  for (const auto& reservation : reservations_) counters.reserved_bytes += reservation.second;
  for (const auto& [address, mapping] : mappings_) {
    ++(mapping.allocated ? counters.allocations : counters.mappings);
    if (!mapping.allocated) counters.mapped_bytes += mapping.bytes;
  }
  for (const auto bytes : charged_) counters.charged_bytes += bytes;
}

}  // namespace cumempool::driver
