/* One job at a time on a run directory: flock on RUN/.lock.
 *
 * The kernel drops the lock with the process, however it ends, so there is never a stale one. The
 * file's text only says who to look for. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "checkpoint/checkpoint.h"
#include "checkpoint/files.h"

struct moe_run_lock {
  int fd; /* -1 off rank 0 */
};

static moe_status refuse(const char *path, int fd) {
  char who[160] = "";
  ssize_t n = pread(fd, who, sizeof who - 1, 0);
  who[n > 0 ? strcspn(who, "\n") : 0] = 0;
  return moe_fail(MOE_FAILED,
                  "%s: another job (%s) works on this run: wait until it has ended, or choose "
                  "another run.dir",
                  path, who[0] ? who : "unknown");
}

static moe_status lock(const char *run_dir, int *out) {
  char path[MOE_PATH], host[64] = "?", text[128];
  if (snprintf(path, sizeof path, "%s/.lock", run_dir) >= MOE_PATH)
    return moe_fail(MOE_USAGE, "%.60s...: the run's path is too long", run_dir);
  MOE_TRY(moe_files_make_folders(run_dir));
  int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0) return moe_fail(MOE_IO, "%s: cannot open: %s", path, strerror(errno));
  if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    moe_status status = errno == EWOULDBLOCK
                            ? refuse(path, fd)
                            : moe_fail(MOE_IO, "%s: cannot lock: %s", path, strerror(errno));
    close(fd);
    return status;
  }
  gethostname(host, sizeof host - 1);
  int length = snprintf(text, sizeof text, "process %ld on %s\n", (long)getpid(), host);
  if (ftruncate(fd, 0) != 0 || pwrite(fd, text, (size_t)length, 0) != length) {
    /* only a courtesy to who comes second */
  }
  *out = fd;
  return MOE_OK;
}

moe_status moe_run_lock_take(moe_comm *world, const char *run_dir, moe_run_lock **out) {
  *out = NULL;
  moe_run_lock *l = malloc(sizeof *l);
  moe_status status = l ? MOE_OK : moe_fail(MOE_NO_MEMORY, "no memory for a lock");
  if (l) l->fd = -1;
  if (l && moe_comm_rank(world) == 0) status = lock(run_dir, &l->fd);
  status = moe_agree(world, status);
  if (status != MOE_OK) {
    moe_run_lock_release(l);
    return status;
  }
  *out = l;
  return MOE_OK;
}

void moe_run_lock_release(moe_run_lock *l) {
  if (!l) return;
  if (l->fd >= 0) close(l->fd);
  free(l);
}
