/* Writing safetensors: the header first, since all sizes are known, then data as it comes. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoint/files.h"
#include "checkpoint/safetensors.h"

enum { ALIGN = 8 }; /* data begins at a multiple of this */

static int64_t entry_bytes(const moe_safetensors_entry *e) {
  return e->shape[0] * (e->dims == 2 ? e->shape[1] : 1) * moe_dtype_size(e->dtype);
}

static const char *type_name(moe_dtype dtype) {
  return dtype == MOE_F32 ? "F32" : dtype == MOE_BF16 ? "BF16" : "F16";
}

/* The header as malloc'd text of *length bytes; *data: bytes that follow it. Names are ours and
 * plain. */
static char *make_header(const moe_safetensors_entry *entries, int64_t n, int64_t *length,
                         int64_t *data) {
  char *text = NULL;
  size_t size = 0;
  FILE *out = open_memstream(&text, &size);
  if (!out) return NULL;
  fprintf(out, "{\"__metadata__\":{\"format\":\"pt\"}");
  *data = 0;
  for (int64_t i = 0; i < n; i++) {
    const moe_safetensors_entry *e = &entries[i];
    fprintf(out, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%" PRId64, e->name, type_name(e->dtype),
            e->shape[0]);
    if (e->dims == 2) fprintf(out, ",%" PRId64, e->shape[1]);
    fprintf(out, "],\"data_offsets\":[%" PRId64 ",%" PRId64 "]}", *data, *data + entry_bytes(e));
    *data += entry_bytes(e);
  }
  fputc('}', out);
  while (ftello(out) % ALIGN != 0) fputc(' ', out);
  if (fclose(out) != 0) {
    free(text);
    return NULL;
  }
  *length = (int64_t)size;
  return text;
}

/* A full disk shows now, not after hours. Where the file system cannot, it shows later. */
static moe_status set_room_aside(const moe_safetensors_writer *w, int64_t bytes) {
  if (fallocate(w->fd, FALLOC_FL_KEEP_SIZE, 0, bytes) == 0 || errno == EOPNOTSUPP ||
      errno == ENOSYS || errno == EINTR)
    return MOE_OK;
  return moe_fail(MOE_IO, "%s: cannot set aside %" PRId64 " bytes: %s", w->path, bytes,
                  strerror(errno));
}

moe_status moe_safetensors_create(const char *path, const moe_safetensors_entry *entries, int64_t n,
                                  moe_safetensors_writer *out) {
  _Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the file is little-endian");
  *out = (moe_safetensors_writer){.fd = -1};
  snprintf(out->path, sizeof out->path, "%s", path);
  int64_t length = 0;
  char *header = make_header(entries, n, &length, &out->size);
  if (!header) return moe_fail(MOE_NO_MEMORY, "%s: no memory for its header", path);
  moe_status status = MOE_OK;
  if (length > MOE_SAFETENSORS_HEADER)
    status = moe_fail(MOE_USAGE, "%s: too many tensors for one file: make smaller files", path);
  else if ((out->fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)) < 0)
    status = moe_fail(MOE_IO, "%s: cannot create: %s", path, strerror(errno));
  uint64_t prefix = (uint64_t)length;
  out->data = (int64_t)sizeof prefix + length;
  out->left = out->size;
  if (status == MOE_OK) status = set_room_aside(out, out->data + out->size);
  if (status == MOE_OK) status = moe_files_write_at(out->fd, path, 0, sizeof prefix, &prefix);
  if (status == MOE_OK) status = moe_files_write_at(out->fd, path, sizeof prefix, length, header);
  free(header);
  if (status != MOE_OK) moe_safetensors_abandon(out);
  return status;
}

moe_status moe_safetensors_write(moe_safetensors_writer *w, int64_t at, int64_t bytes,
                                 const void *data) {
  if (at < 0 || bytes > w->size - at)
    return moe_fail(MOE_INVALID, "%s: more data than its header says", w->path);
  MOE_TRY(moe_files_write_part(w->fd, w->path, w->data + at, bytes, data));
  __atomic_sub_fetch(&w->left, bytes, __ATOMIC_RELAXED);
  return MOE_OK;
}

moe_status moe_safetensors_finish(moe_safetensors_writer *w) {
  moe_status status = MOE_OK;
  if (w->left != 0)
    status = moe_fail(MOE_INVALID, "%s: %" PRId64 " bytes of its data were not written", w->path,
                      w->left);
  else if (fsync(w->fd) != 0)
    status = moe_fail(MOE_IO, "%s: cannot fsync: %s", w->path, strerror(errno));
  int closed = close(w->fd);
  w->fd = -1;
  if (closed != 0 && status == MOE_OK)
    status = moe_fail(MOE_IO, "%s: cannot close: %s", w->path, strerror(errno));
  return status;
}

void moe_safetensors_abandon(moe_safetensors_writer *w) {
  if (w->fd >= 0) close(w->fd);
  w->fd = -1;
}
