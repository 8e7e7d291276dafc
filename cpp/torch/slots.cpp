// The exported pairs cumempool_malloc_<n> / cumempool_free_<n>, with the signatures that
// torch.cuda.memory.CUDAPluggableAllocator calls: void*(ssize_t, int, cudaStream_t) and
// void(void*, ssize_t, int, cudaStream_t). They never throw, enter Python or exit (R1).
#include "cumempool/cumempool.h"
#include "driver/driver.hpp"
#include "torch/slot_table.hpp"

namespace {

void* slot_malloc(std::uint32_t slot, ssize_t bytes, int device) noexcept {
  if (bytes <= 0 || cumempool::driver::in_forked_child()) return nullptr;
  return cumempool::torch::SlotTable::instance().malloc(slot, static_cast<std::size_t>(bytes),
                                                        device);
}

void slot_free(void* address) noexcept {
  if (address == nullptr || cumempool::driver::in_forked_child()) return;
  cumempool::torch::SlotTable::free(address);
}

}  // namespace

// The functions ignore torch's stream: memory is usable at once on every stream, and goes back once
// all streams are done with it.
#define CUMEMPOOL_SLOT(n)                                                                         \
  extern "C" CUMEMPOOL_API void* cumempool_malloc_##n(ssize_t bytes, int device, void*) noexcept; \
  extern "C" CUMEMPOOL_API void cumempool_free_##n(void* address, ssize_t, int, void*) noexcept;  \
  void* cumempool_malloc_##n(ssize_t bytes, int device, void*) noexcept {                         \
    return slot_malloc(n, bytes, device);                                                         \
  }                                                                                               \
  void cumempool_free_##n(void* address, ssize_t, int, void*) noexcept { slot_free(address); }

#define CUMEMPOOL_SLOTS_OF_8(a, b, c, d, e, f, g, h) \
  CUMEMPOOL_SLOT(a)                                  \
  CUMEMPOOL_SLOT(b)                                  \
  CUMEMPOOL_SLOT(c)                                  \
  CUMEMPOOL_SLOT(d)                                  \
  CUMEMPOOL_SLOT(e)                                  \
  CUMEMPOOL_SLOT(f)                                  \
  CUMEMPOOL_SLOT(g)                                  \
  CUMEMPOOL_SLOT(h)

CUMEMPOOL_SLOTS_OF_8(0, 1, 2, 3, 4, 5, 6, 7)
CUMEMPOOL_SLOTS_OF_8(8, 9, 10, 11, 12, 13, 14, 15)
CUMEMPOOL_SLOTS_OF_8(16, 17, 18, 19, 20, 21, 22, 23)
CUMEMPOOL_SLOTS_OF_8(24, 25, 26, 27, 28, 29, 30, 31)
CUMEMPOOL_SLOTS_OF_8(32, 33, 34, 35, 36, 37, 38, 39)
CUMEMPOOL_SLOTS_OF_8(40, 41, 42, 43, 44, 45, 46, 47)
CUMEMPOOL_SLOTS_OF_8(48, 49, 50, 51, 52, 53, 54, 55)
CUMEMPOOL_SLOTS_OF_8(56, 57, 58, 59, 60, 61, 62, 63)

static_assert(cumempool::torch::kSlotCount == 64, "the list above has 64 slots");
