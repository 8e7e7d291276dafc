/* Status codes of the C interface, and the record of a failure. */
#ifndef CUMEMPOOL_STATUS_H
#define CUMEMPOOL_STATUS_H

#include <stddef.h>
#include <stdint.h>

#include "cumempool/driver.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum cumempool_status {
  CUMEMPOOL_OK = 0,
  CUMEMPOOL_INVALID_ARGUMENT = 1,   /* the function does not take this value */
  CUMEMPOOL_UNAVAILABLE = 2,        /* no driver library, no device, no virtual memory support */
  CUMEMPOOL_OUT_OF_MEMORY = 3,      /* the device has no room */
  CUMEMPOOL_OUT_OF_HOST_MEMORY = 4, /* no host memory, or a backup exceeds the configured limit */
  CUMEMPOOL_UNKNOWN_TAG = 5,        /* the tag was never declared */
  CUMEMPOOL_NOT_OWNED = 6,          /* the address lies in no allocation of (this) allocator */
  CUMEMPOOL_BUSY = 7,               /* called inside a transition of the same allocator */
  CUMEMPOOL_CAPTURING = 8,          /* a stream capture is under way on the caller's stream */
  CUMEMPOOL_IN_USE = 9,             /* open scopes or live allocations forbid it */
  CUMEMPOOL_CLOSED = 10,            /* the allocator was closed */
  CUMEMPOOL_FORKED = 11,            /* called in a forked child */
  CUMEMPOOL_OUT_OF_SLOTS = 12,      /* every torch slot is bound */
  CUMEMPOOL_DRIVER_ERROR = 13,      /* a driver call failed for any other reason */
  CUMEMPOOL_INTERNAL = 14,          /* a defect of this library */
  CUMEMPOOL_BACKUP_FAILED = 15,     /* creating, writing or reading a backup file failed */
  CUMEMPOOL_BACKUP_DAMAGED = 16,    /* a backup file does not hold the bytes written to it */
  CUMEMPOOL_UNSUPPORTED = 17        /* the hardware or system does not support this */
} cumempool_status;

/* One failure. Numbers that do not apply are -1 (device) or 0. Texts are never NULL. */
typedef struct cumempool_error {
  cumempool_status status;
  const char *message;   /* one sentence with all fields below, then the advice */
  const char *operation; /* "sleep", "wake", "malloc", ... */
  const char *tag;
  int32_t device;
  uint64_t bytes;          /* requested by the failing step */
  const char *driver_call; /* "cuMemCreate", or "" if no driver call failed */
  cumempool_result result; /* the result of that call */
  const char *result_name; /* "CUDA_ERROR_OUT_OF_MEMORY" */
  uint64_t free_bytes;     /* device memory at that moment; total 0 = unknown */
  uint64_t total_bytes;
  const char *advice;           /* the remedy */
  const char *const *secondary; /* failures while undoing the operation */
  size_t secondary_count;
} cumempool_error;

#ifdef __cplusplus
}
#endif

#endif /* CUMEMPOOL_STATUS_H */
