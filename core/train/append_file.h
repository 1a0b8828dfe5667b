/* A file that grows by whole records, for reports that must never end a run.
 *
 * Records gather in memory and go to the file at a flush. A flush that fails (disk full) cuts the
 * file back to its last whole record, warns once and drops what was gathered: the file stays
 * readable, and later records are written when there is room again. */
#ifndef MOE_CORE_TRAIN_APPEND_FILE_H
#define MOE_CORE_TRAIN_APPEND_FILE_H

#include "core/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
  char *path;
  int fd;
  int64_t size; /* bytes that are known to be whole records */
  char *pending;
  size_t used, capacity;
  bool warned;
} moe_append_file;

/* Opens or creates `path`. MOE_IO names it. Local. */
moe_status moe_append_open(moe_append_file *f, const char *path);
/* Adds bytes to the record in the making. */
void moe_append_bytes(moe_append_file *f, const void *data, size_t bytes);
/* Writes what was gathered; to be called between records only. */
void moe_append_flush(moe_append_file *f);
/* Flushes and closes. A zeroed or closed file is fine. */
void moe_append_close(moe_append_file *f);

#endif
