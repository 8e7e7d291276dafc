/* Status codes of the C interface, and the record of what went wrong. */
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
  CUMEMPOOL_INVALID_ARGUMENT = 1,   /* a value that the function does not take */
  CUMEMPOOL_UNAVAILABLE = 2,        /* no driver library, no device, no virtual memory support */
  CUMEMPOOL_OUT_OF_MEMORY = 3,      /* the device has no room */
  CUMEMPOOL_OUT_OF_HOST_MEMORY = 4, /* no host memory for a backup, or over the configured limit */
  CUMEMPOOL_UNKNOWN_TAG = 5,        /* nothing was ever declared under that tag */
  CUMEMPOOL_NOT_OWNED = 6,          /* the address lies in no allocation of (this) allocator */
  CUMEMPOOL_BUSY = 7,               /* called from inside a transition of the same allocator */
  CUMEMPOOL_CAPTURING = 8,          /* a stream capture is under way on the caller's stream */
  CUMEMPOOL_IN_USE = 9,             /* open scopes or live allocations forbid it */
  CUMEMPOOL_CLOSED = 10,            /* the allocator was closed */
  CUMEMPOOL_FORKED = 11,            /* called in a forked child */
  CUMEMPOOL_OUT_OF_SLOTS = 12,      /* every torch slot is bound */
  CUMEMPOOL_DRIVER_ERROR = 13,      /* a driver call failed for any other reason */
  CUMEMPOOL_INTERNAL = 14,          /* a defect of this library */
  CUMEMPOOL_BACKUP_FAILED = 15,     /* a backup file could not be made, written or read */
  CUMEMPOOL_BACKUP_DAMAGED = 16,    /* a backup file does not hold what was written to it */
  CUMEMPOOL_UNSUPPORTED = 17        /* the hardware or system cannot do what was asked for */
} cumempool_status;

/* What went wrong. Numbers that do not apply are -1 (device) or 0; texts are never NULL. */
typedef struct cumempool_error {
  cumempool_status status;
  const char *message;   /* one sentence with all of the below, then what to do */
  const char *operation; /* "sleep", "wake", "malloc", ... */
  const char *tag;
  int32_t device;
  uint64_t bytes;          /* bytes that the failing step asked for */
  const char *driver_call; /* "cuMemCreate", or "" where no driver call failed */
  cumempool_result result; /* what that call returned */
  const char *result_name; /* "CUDA_ERROR_OUT_OF_MEMORY" */
  uint64_t free_bytes;     /* device memory at that moment; total 0 = unknown */
  uint64_t total_bytes;
  const char *advice;           /* what to do about it */
  const char *const *secondary; /* failures met while undoing the operation */
  size_t secondary_count;
} cumempool_error;

#ifdef __cplusplus
}
#endif

#endif /* CUMEMPOOL_STATUS_H */
