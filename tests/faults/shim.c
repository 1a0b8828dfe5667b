/* A disk that fails on demand: LD_PRELOAD this library into a training job.
 *
 * It counts the calls that touch files below a folder named "checkpoints", and lets the n-th of a
 * kind fail. The environment says which:
 *
 *     FAULT_CALL   write read fsync rename mkdir fallocate truncate open close, or any
 *     FAULT_AT     n, from 1
 *     FAULT_KIND   EIO, ENOSPC, short (half of a read or write is done), or kill (SIGKILL to
 * itself) FAULT_MODE   once, or on: that one and all that follow FAULT_RANK   the rank it happens
 * on; without it all ranks FAULT_AFTER  a path: nothing is counted before it exists FAULT_TALLY  a
 * path: at the end write there, per rank, how many calls of each kind there were
 *
 * The calls are those that moe-train and HDF5 make, with either width of file offsets. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CALLS = 9, PATH = 512 };
static const char *const names[CALLS] = {"write", "read",      "fsync",    "rename", "mkdir",
                                         "open",  "fallocate", "truncate", "close"};
typedef enum { WRITE, READ, FSYNC, RENAME, MKDIR, OPEN, FALLOCATE, TRUNCATE, CLOSE } call;
typedef enum { PASS, FAIL, SHORT } verdict;

static struct {
  bool on, kill, half, again;
  int call; /* CALLS: any */
  int at, error;
  const char *after, *tally;
} fault;
static atomic_int seen, tally[CALLS];

static const char *env(const char *name) {
  const char *value = getenv(name);
  return value ? value : "";
}

__attribute__((constructor)) static void read_orders(void) {
  const char *rank = env("OMPI_COMM_WORLD_RANK"), *wanted = env("FAULT_RANK");
  fault.tally = getenv("FAULT_TALLY");
  fault.after = getenv("FAULT_AFTER");
  fault.on = env("FAULT_CALL")[0] && (!wanted[0] || strcmp(rank, wanted) == 0);
  fault.call = CALLS;
  for (int i = 0; i < CALLS; i++)
    if (strcmp(env("FAULT_CALL"), names[i]) == 0) fault.call = i;
  fault.at = atoi(env("FAULT_AT"));
  fault.error = strcmp(env("FAULT_KIND"), "ENOSPC") == 0 ? ENOSPC : EIO;
  fault.half = strcmp(env("FAULT_KIND"), "short") == 0;
  fault.kill = strcmp(env("FAULT_KIND"), "kill") == 0;
  fault.again = strcmp(env("FAULT_MODE"), "on") == 0;
}

__attribute__((destructor)) static void write_tally(void) {
  FILE *f = fault.tally && env("OMPI_COMM_WORLD_RANK")[0] ? fopen(fault.tally, "a") : NULL;
  if (!f) return;
  for (int i = 0; i < CALLS; i++)
    if (tally[i]) fprintf(f, "%s %s %d\n", env("OMPI_COMM_WORLD_RANK"), names[i], tally[i]);
  fclose(f);
}

static verdict judge(call c, const char *path) {
  if (!strstr(path, "/checkpoints")) return PASS;
  if (fault.after && access(fault.after, F_OK) != 0) return PASS;
  tally[c]++;
  if (!fault.on || (fault.call != CALLS && fault.call != (int)c)) return PASS;
  int n = ++seen;
  if (fault.again ? n < fault.at : n != fault.at) return PASS;
  if (fault.kill) kill(getpid(), SIGKILL);
  errno = fault.error;
  return !fault.half ? FAIL : c == WRITE || c == READ ? SHORT : PASS;
}

static verdict judge_fd(call c, int fd) {
  char link[64], path[PATH];
  int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  errno = before;
  if (n <= 0) return PASS;
  path[n] = 0;
  return judge(c, path);
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* A transfer of n bytes: none, half or all of it. */
#define TRANSFER(type, name, kind, parameters, ...) \
  type name parameters {                            \
    REAL(name);                                     \
    verdict v = judge_fd(kind, fd);                 \
    if (v == FAIL) return -1;                       \
    if (v == SHORT && n > 1) n /= 2;                \
    return real(__VA_ARGS__);                       \
  }
TRANSFER(ssize_t, write, WRITE, (int fd, const void *b, size_t n), fd, b, n)
TRANSFER(ssize_t, pwrite, WRITE, (int fd, const void *b, size_t n, off_t at), fd, b, n, at)
TRANSFER(ssize_t, pwrite64, WRITE, (int fd, const void *b, size_t n, off64_t at), fd, b, n, at)
TRANSFER(ssize_t, read, READ, (int fd, void *b, size_t n), fd, b, n)
TRANSFER(ssize_t, pread, READ, (int fd, void *b, size_t n, off_t at), fd, b, n, at)
TRANSFER(ssize_t, pread64, READ, (int fd, void *b, size_t n, off64_t at), fd, b, n, at)

/* A call on an open file, or on a path, that fails or not. */
#define ON_FILE(name, kind, parameters, ...)   \
  int name parameters {                        \
    REAL(name);                                \
    if (judge_fd(kind, fd) == FAIL) return -1; \
    return real(__VA_ARGS__);                  \
  }
#define ON_PATH(name, kind, parameters, ...)  \
  int name parameters {                       \
    REAL(name);                               \
    if (judge(kind, path) == FAIL) return -1; \
    return real(__VA_ARGS__);                 \
  }
ON_FILE(fsync, FSYNC, (int fd), fd)
ON_FILE(fdatasync, FSYNC, (int fd), fd)
ON_FILE(ftruncate, TRUNCATE, (int fd, off_t n), fd, n)
ON_FILE(ftruncate64, TRUNCATE, (int fd, off64_t n), fd, n)
ON_FILE(fallocate, FALLOCATE, (int fd, int mode, off_t at, off_t n), fd, mode, at, n)
ON_FILE(fallocate64, FALLOCATE, (int fd, int mode, off64_t at, off64_t n), fd, mode, at, n)
ON_PATH(mkdir, MKDIR, (const char *path, mode_t mode), path, mode)
ON_PATH(rename, RENAME, (const char *from, const char *path), from, path)
ON_PATH(renameat2, RENAME, (int a, const char *from, int b, const char *path, unsigned flags), a,
        from, b, path, flags)

/* The file is closed all the same, as Linux does. */
int close(int fd) {
  REAL(close);
  verdict v = judge_fd(CLOSE, fd);
  int result = real(fd);
  if (v != FAIL) return result;
  errno = fault.error;
  return -1;
}

#define OPENING(name)                                         \
  int name(const char *path, int flags, ...) {                \
    REAL(name);                                               \
    va_list rest;                                             \
    va_start(rest, flags);                                    \
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                             \
    if (judge(OPEN, path) == FAIL) return -1;                 \
    return real(path, flags, mode);                           \
  }
OPENING(open)
OPENING(open64)
