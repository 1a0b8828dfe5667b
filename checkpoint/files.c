/* Files and folders the careful way.
 *
 * A name is durable only once its folder was fsynced, a file's bytes only once the file was; so
 * every function here that makes something syncs both. */
#include "checkpoint/files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

static moe_status fail_io(const char *what, const char *path) {
  return moe_fail(MOE_IO, "%s: %s: %s", path, what, strerror(errno));
}

moe_status moe_files_sync_folder(const char *path) {
  int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return fail_io("cannot open the folder", path);
  int failed = fsync(fd);
  moe_status status = failed ? fail_io("cannot fsync the folder", path) : MOE_OK;
  close(fd);
  return status;
}

bool moe_files_is_folder(const char *path) {
  struct stat st;
  return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

int64_t moe_files_free_bytes(const char *path) {
  struct statvfs fs;
  if (statvfs(path, &fs) != 0) return INT64_MAX;
  double bytes = (double)fs.f_bavail * (double)fs.f_frsize;
  return bytes < 9e18 ? (int64_t)bytes : INT64_MAX;
}

static moe_status sync_parent(const char *path) {
  char parent[PATH_MAX];
  snprintf(parent, sizeof parent, "%s", path);
  char *slash = strrchr(parent, '/');
  if (!slash) return moe_files_sync_folder(".");
  slash[slash == parent] = 0; /* keep the root's slash */
  return moe_files_sync_folder(parent);
}

moe_status moe_files_make_folders(const char *path) {
  char prefix[PATH_MAX];
  size_t length = strlen(path);
  if (length == 0) return moe_fail(MOE_USAGE, "run.dir is empty: name the run's folder");
  if (length >= sizeof prefix) return moe_fail(MOE_USAGE, "%.60s...: the path is too long", path);
  for (size_t i = 1; i <= length; i++) {
    if (path[i] != '/' && path[i] != 0) continue;
    memcpy(prefix, path, i);
    prefix[i] = 0;
    if (prefix[i - 1] == '/' || moe_files_is_folder(prefix)) continue;
    if (mkdir(prefix, 0777) != 0 && errno != EEXIST)
      return fail_io("cannot make the folder", prefix);
    if (!moe_files_is_folder(prefix))
      return moe_fail(MOE_IO, "%s: is in the way: a folder is needed there", prefix);
    MOE_TRY(sync_parent(prefix));
  }
  return MOE_OK;
}

moe_status moe_files_write_new(const char *path, const void *data, int64_t length) {
  int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd < 0) return fail_io("cannot create", path);
  moe_status status = moe_files_write_at(fd, path, 0, length, data);
  if (status == MOE_OK && fsync(fd) != 0) status = fail_io("cannot fsync", path);
  if (close(fd) != 0 && status == MOE_OK) status = fail_io("cannot close", path);
  if (status != MOE_OK) unlink(path);
  return status;
}

moe_status moe_files_print_new(const char *path, void (*print)(FILE *out, const void *context),
                               const void *context) {
  char *text = NULL;
  size_t length = 0;
  FILE *out = open_memstream(&text, &length);
  if (out) print(out, context);
  moe_status status = out && fclose(out) == 0
                          ? moe_files_write_new(path, text, (int64_t)length)
                          : moe_fail(MOE_NO_MEMORY, "%s: no memory to write it", path);
  free(text);
  return status;
}

moe_status moe_files_replace(const char *path, const void *data, int64_t length) {
  char temporary[PATH_MAX + 8];
  snprintf(temporary, sizeof temporary, "%s.tmp", path);
  unlink(temporary);
  MOE_TRY(moe_files_write_new(temporary, data, length));
  if (rename(temporary, path) != 0) {
    moe_status status = fail_io("cannot replace", path);
    unlink(temporary);
    return status;
  }
  return sync_parent(path);
}

moe_status moe_files_open(const char *path, int *fd, int64_t *size) {
  struct stat st;
  /* O_NONBLOCK: a named pipe in the file's place must not make us wait */
  *fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  if (*fd < 0 && (errno == ENOENT || errno == ELOOP))
    return moe_fail(MOE_DAMAGED, "%s: %s", path,
                    errno == ENOENT ? "is missing" : "is a symbolic link, which is not followed");
  if (*fd < 0) return fail_io("cannot open", path);
  moe_status status = MOE_OK;
  if (fstat(*fd, &st) != 0)
    status = fail_io("cannot stat", path);
  else if (!S_ISREG(st.st_mode))
    status = moe_fail(MOE_DAMAGED, "%s: is not a regular file", path);
  *size = st.st_size;
  if (status != MOE_OK) {
    close(*fd);
    *fd = -1;
  }
  return status;
}

moe_status moe_files_read_at(int fd, const char *path, int64_t at, int64_t bytes, void *out) {
  for (char *to = out; bytes > 0;) {
    ssize_t n = pread(fd, to, (size_t)bytes, at);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return fail_io("cannot read", path);
    if (n == 0) return moe_fail(MOE_DAMAGED, "%s: shrank while it was read", path);
    to += n;
    at += n;
    bytes -= n;
  }
  return MOE_OK;
}

moe_status moe_files_write_at(int fd, const char *path, int64_t at, int64_t bytes,
                              const void *data) {
  for (const char *from = data; bytes > 0;) {
    ssize_t n = pwrite(fd, from, (size_t)bytes, at);
    if (n < 0 && errno == EINTR) continue;
    if (n == 0) errno = ENOSPC;
    if (n <= 0) return fail_io("cannot write", path);
    from += n;
    at += n;
    bytes -= n;
  }
  return MOE_OK;
}

/* Left alone, the kernel gathers gigabytes before it begins, and the disk idles meanwhile. This
 * flag alone neither waits for the disk nor takes an error from fsync; where it is not supported,
 * fsync does it all. */
static void begin_sync(int fd, int64_t at, int64_t bytes) {
  sync_file_range(fd, at, bytes, SYNC_FILE_RANGE_WRITE);
}

void moe_files_sync_soon(int fd, int64_t end, int64_t *begun) {
  enum { WORTH = 8 << 20 };
  if (end - *begun < WORTH) return;
  begin_sync(fd, *begun, end - *begun);
  *begun = end;
}

moe_status moe_files_write_part(int fd, const char *path, int64_t at, int64_t bytes,
                                const void *data) {
  enum { WORTH = 512 << 10 };
  MOE_TRY(moe_files_write_at(fd, path, at, bytes, data));
  if (bytes >= WORTH) begin_sync(fd, at, bytes);
  return MOE_OK;
}

moe_status moe_files_read(const char *path, int64_t limit, char **out, int64_t *length) {
  int fd;
  int64_t size;
  MOE_TRY(moe_files_open(path, &fd, &size));
  moe_status status = MOE_OK;
  char *text = NULL;
  if (size > limit)
    status = moe_fail(MOE_DAMAGED, "%s: %" PRId64 " bytes, more than the %" PRId64 " allowed", path,
                      size, limit);
  else if (!(text = malloc((size_t)size + 1)))
    status = moe_fail(MOE_NO_MEMORY, "%s: no memory for %" PRId64 " bytes", path, size);
  if (status == MOE_OK) status = moe_files_read_at(fd, path, 0, size, text);
  close(fd);
  if (status != MOE_OK) {
    free(text);
    return status;
  }
  text[size] = 0;
  *out = text;
  *length = size;
  return MOE_OK;
}

bool moe_files_remove_folder(const char *path) {
  DIR *folder = opendir(path);
  if (!folder) return errno == ENOENT;
  for (struct dirent *e; (e = readdir(folder));)
    if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
      unlinkat(dirfd(folder), e->d_name, 0);
  closedir(folder);
  return rmdir(path) == 0;
}
