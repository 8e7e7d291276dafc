// A library that calls itself libcuda.so.1, to test how the `cuda` driver opens it: FAKE_CUINIT is
// what cuInit returns, FAKE_MISSING names a symbol that it does not have, FAKE_DEVICES counts
// devices.
#include <cstdlib>
#include <cstring>

namespace {

int number(const char* variable, int otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr ? otherwise : std::atoi(text);
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

int fake_success() { return 0; }

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
  if (std::strcmp(symbol, "cuInit") == 0) {
    *address = reinterpret_cast<void*>(fake_init);
  } else if (std::strcmp(symbol, "cuDeviceGetCount") == 0) {
    *address = reinterpret_cast<void*>(fake_device_count);
  } else if (std::strcmp(symbol, "cuDeviceGet") == 0) {
    *address = reinterpret_cast<void*>(fake_device_get);
  } else if (std::strcmp(symbol, "cuDeviceGetName") == 0) {
    *address = reinterpret_cast<void*>(fake_device_name);
  } else {
    *address = reinterpret_cast<void*>(fake_success);
  }
  return 0;
}
