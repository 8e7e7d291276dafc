// A library that calls itself libcuda.so.1, to test how the `cuda` driver opens and uses it:
// FAKE_CUINIT is what cuInit returns, FAKE_MISSING names a symbol that it does not have,
// FAKE_DEVICES counts devices, FAKE_MODULE is what cuModuleLoadDataEx returns, FAKE_FREE what the
// first cuMemFree returns, FAKE_RESERVE what cuMemAddressReserve does, FAKE_REGISTER what
// cuMemHostRegister does, FAKE_ALLOC what cuMemAlloc does, FAKE_CAPTURING what cuStreamIsCapturing
// does. FAKE_WAITS has a letter for each call that waits for host functions: r for
// cuMemHostUnregister, f for cuMemFree, c for cuCtxSynchronize; all of them where it is not set.
// FAKE_ATS has the device use the page tables of the host. fake_calls() tells what was done with
// modules, access, addresses, memory and waits.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

int number(const char* variable, int otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr ? otherwise : std::atoi(text);
}

std::string& calls() {
  static std::string text;
  return text;
}

int fake_init(unsigned int) { return number("FAKE_CUINIT", 0); }

int fake_device_count(int* count) {
  *count = number("FAKE_DEVICES", 1);
  return 0;
}

int fake_device_get(int* device, int ordinal) {
  *device = 70 + ordinal;
  return 0;
}

int fake_device_name(char* name, int bytes, int device) {
  std::strncpy(name, device == 71 ? "device 71" : "another", static_cast<std::size_t>(bytes));
  return 0;
}

// Knows the attributes of CUDA 11.8, and says 1 to all of them.
int fake_device_attribute(int* value, int attribute, int) {
  *value = attribute == 100 ? number("FAKE_ATS", 0) : 1;
  return attribute < 125 ? 0 : 1;  // CUDA_ERROR_INVALID_VALUE
}

int fake_retain(void** context, int) {
  static int there = 0;
  *context = &there;
  return 0;
}

// Host memory is pinned, and found at its own address, but for the lowest page.
int fake_pointer_attribute(void* data, int, std::uint64_t pointer) {
  std::memcpy(data, &pointer, sizeof(pointer));
  return pointer >= 4096 ? 0 : 1;
}

int fake_module_load(void** module, const void* image, unsigned int, int*, void**) {
  static int there = 0;
  *module = &there;
  const bool ptx = std::strstr(static_cast<const char*>(image), ".version 6.3") != nullptr;
  calls() += ptx ? "load " : "load? ";
  return number("FAKE_MODULE", 0);
}

int fake_module_function(void** function, void*, const char* name) {
  static int there = 0;
  *function = &there;
  calls() += std::string(name) + " ";
  return 0;
}

int fake_module_unload(void*) {
  calls() += "unload ";
  return 0;
}

int fake_launch(void*, unsigned int blocks, unsigned int, unsigned int, unsigned int threads,
                unsigned int, unsigned int, unsigned int shared_bytes, void*, void**, void**) {
  calls() += "launch(" + std::to_string(blocks) + "," + std::to_string(threads) + "," +
             std::to_string(shared_bytes) + ") ";
  return 0;
}

// As CUmemAccessDesc: the kind of location, its number, and the flags.
struct AccessDescription {
  int location_type;
  int location;
  int flags;
};

int fake_set_access(std::uint64_t, std::size_t, const AccessDescription* access,
                    std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    calls() += "access(" + std::to_string(access[i].location) + "," +
               std::to_string(access[i].flags) + ") ";
  }
  return 0;
}

// Told of only where FAKE_RESERVE is set.
int fake_reserve(std::uint64_t* pointer, std::size_t bytes, std::size_t alignment) {
  if (std::getenv("FAKE_RESERVE") == nullptr) return 0;
  *pointer = alignment;
  calls() += "reserve(" + std::to_string(bytes) + "," + std::to_string(alignment >> 20) + "MiB) ";
  return number("FAKE_RESERVE", 0);
}

int fake_unreserve(std::uint64_t pointer, std::size_t bytes) {
  calls() += "unreserve(" + std::to_string(pointer >> 20) + "MiB," + std::to_string(bytes) + ") ";
  return 0;
}

int fake_allocate(std::uint64_t* pointer, std::size_t bytes) {
  *pointer = 0x10000;
  calls() += "alloc(" + std::to_string(bytes) + ") ";
  return bytes == 0 ? 1 : number("FAKE_ALLOC", 0);
}

// The host function that was launched and has not run yet.
struct Launched {
  void (*function)(void*) = nullptr;
  void* argument = nullptr;
};

Launched& launched() {
  static Launched pending;
  return pending;
}

int run_launched() {
  if (launched().function != nullptr) launched().function(launched().argument);
  launched() = {};
  return 0;
}

int fake_launch_host(void*, void (*function)(void*), void* argument) {
  launched() = {function, argument};
  return 0;
}

void wait_where_told(char letter) {
  const char* waits = std::getenv("FAKE_WAITS");
  if (waits == nullptr || std::strchr(waits, letter) != nullptr) run_launched();
}

int fake_register(void*, std::size_t, unsigned int) {
  calls() += "register ";
  return number("FAKE_REGISTER", 0);
}

int fake_unregister(void*) {
  wait_where_told('r');
  return 0;
}

int fake_synchronize_context() {
  calls() += "synchronize ";
  wait_where_told('c');
  return 0;
}

int fake_is_capturing(void*, int* status) {
  *status = 0;
  return number("FAKE_CAPTURING", 0);
}

int fake_free(std::uint64_t) {
  static int frees = 0;
  wait_where_told('f');
  calls() += "free ";
  return ++frees == 1 ? number("FAKE_FREE", 0) : 0;
}

int fake_success() { return 0; }

struct Symbol {
  const char* name;
  void* address;
};

template <typename Function>
void* address_of(Function* function) {
  return reinterpret_cast<void*>(function);
}

void* find(const char* name) {
  const Symbol symbols[] = {
      {"cuInit", address_of(fake_init)},
      {"cuDeviceGetCount", address_of(fake_device_count)},
      {"cuDeviceGet", address_of(fake_device_get)},
      {"cuDeviceGetName", address_of(fake_device_name)},
      {"cuDeviceGetAttribute", address_of(fake_device_attribute)},
      {"cuDevicePrimaryCtxRetain", address_of(fake_retain)},
      {"cuPointerGetAttribute", address_of(fake_pointer_attribute)},
      {"cuMemAddressReserve", address_of(fake_reserve)},
      {"cuMemAddressFree", address_of(fake_unreserve)},
      {"cuMemSetAccess", address_of(fake_set_access)},
      {"cuMemAlloc", address_of(fake_allocate)},
      {"cuMemHostRegister", address_of(fake_register)},
      {"cuMemHostUnregister", address_of(fake_unregister)},
      {"cuLaunchHostFunc", address_of(fake_launch_host)},
      {"cuStreamSynchronize", address_of(run_launched)},
      {"cuStreamIsCapturing", address_of(fake_is_capturing)},
      {"cuCtxSynchronize", address_of(fake_synchronize_context)},
      {"cuMemFree", address_of(fake_free)},
      {"cuModuleLoadDataEx", address_of(fake_module_load)},
      {"cuModuleGetFunction", address_of(fake_module_function)},
      {"cuModuleUnload", address_of(fake_module_unload)},
      {"cuLaunchKernel", address_of(fake_launch)},
  };
  for (const Symbol& symbol : symbols) {
    if (std::strcmp(symbol.name, name) == 0) return symbol.address;
  }
  return address_of(fake_success);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int cuGetProcAddress_v2(const char* symbol,
                                                                          void** address, int,
                                                                          unsigned long long,
                                                                          int*) {
  const char* missing = std::getenv("FAKE_MISSING");
  if (missing != nullptr && std::strcmp(missing, symbol) == 0) {
    *address = nullptr;
    return 500;  // CUDA_ERROR_NOT_FOUND
  }
  *address = find(symbol);
  return 0;
}

extern "C" __attribute__((visibility("default"))) const char* fake_calls() {
  return calls().c_str();
}
