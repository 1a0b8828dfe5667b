/* A file that grows by whole records; the idea is in the header. */
#include "core/train/append_file.h"

#include "core/base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

moe_status moe_append_open(moe_append_file *f, const char *path) {
  *f = (moe_append_file){.fd = -1};
  int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  struct stat info;
  if (fd < 0 || fstat(fd, &info) != 0) {
    moe_status status = moe_fail(MOE_IO, "cannot open for writing: %s: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    return status;
  }
  f->path = strdup(path);
  if (f->path == NULL) {
    close(fd);
    return moe_fail(MOE_NO_MEMORY, "out of memory: opening %s", path);
  }
  f->fd = fd;
  f->size = info.st_size;
  return MOE_OK;
}

static void warn_once(moe_append_file *f, const char *why) {
  if (f->warned) return;
  f->warned = true;
  moe_warn("cannot write %s: %s: training goes on, this file misses records", f->path, why);
}

void moe_append_bytes(moe_append_file *f, const void *data, size_t bytes) {
  if (bytes == 0) return;
  if (f->used + bytes > f->capacity) {
    size_t capacity = 2 * (f->used + bytes);
    char *grown = realloc(f->pending, capacity);
    if (grown == NULL) abort(); /* a few kilobytes: the process cannot go on either */
    f->pending = grown;
    f->capacity = capacity;
  }
  memcpy(f->pending + f->used, data, bytes);
  f->used += bytes;
}

void moe_append_flush(moe_append_file *f) {
  size_t done = 0;
  while (done < f->used) {
    ssize_t n = write(f->fd, f->pending + done, f->used - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      warn_once(f, n < 0 ? strerror(errno) : "nothing was written");
      break;
    }
    done += (size_t)n;
  }
  if (done == f->used)
    f->size += (int64_t)done;
  else if (done > 0 && ftruncate(f->fd, (off_t)f->size) != 0)
    f->size += (int64_t)done; /* cannot cut: a torn record stays */
  f->used = 0;
}

void moe_append_close(moe_append_file *f) {
  if (f->path == NULL) return;
  moe_append_flush(f);
  if (close(f->fd) != 0) warn_once(f, strerror(errno));
  free(f->path);
  free(f->pending);
  *f = (moe_append_file){.fd = -1};
}
