/* The preflight's questions to the run's file system.
 *
 * Checkpoints rest on four promises: all hosts see one folder, fsync keeps, rename replaces at
 * once, flock excludes other hosts. Network file systems break some of them by a mount option, so
 * each host tries them with small files in RUN/.preflight. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

#include "checkpoint/checkpoint.h"
#include "checkpoint/files.h"
#include "core/base/log.h"
#include "core/train/preflight_checks.h"
#include "core/train/run_dir.h"

enum { PATIENCE_S = 15, TOKEN = 64 }; /* NFS shows a new file after some seconds */

/* One process per host asks. */
static bool speaks(void) {
  return moe_comm_local_rank() == 0;
}

/* What a rank leaves for the others to find. */
static void token_path(const char *folder, int rank, char path[MOE_PATH]) {
  snprintf(path, MOE_PATH, "%.3900s/rank-%d", folder, rank);
}

/* Wait until `path` holds `token`. */
static moe_status find_token(const char *path, const char *token) {
  double deadline = moe_clock_s() + PATIENCE_S;
  for (;;) {
    char *text = NULL;
    int64_t length = 0;
    moe_status status = moe_files_read(path, TOKEN, &text, &length);
    bool found = status == MOE_OK && strcmp(text, token) == 0;
    free(text);
    if (found) return MOE_OK;
    if (moe_clock_s() > deadline) {
      return moe_fail(MOE_FAILED,
                      "%s, written on another host, is not seen here after %d s: run.dir must be "
                      "on a file system that all hosts share",
                      path, PATIENCE_S);
    }
    nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
  }
}

/* Write, fsync, rename, fsync the folder: as a commit does. */
static moe_status leave_token(const char *folder, int rank, const char *token) {
  char path[MOE_PATH];
  token_path(folder, rank, path);
  return moe_files_replace(path, token, (int64_t)strlen(token));
}

/* Each host finds rank 0's file, and rank 0 finds one of each host. */
static moe_status find_all(moe_preflight_job *p, const char *folder, const char *token,
                           const int *speaking) {
  int rank = moe_comm_rank(p->world);
  char path[MOE_PATH];
  for (int r = 0; r < moe_comm_size(p->world); r++) {
    if (rank == 0 ? !speaking[r] : r > 0) continue;
    token_path(folder, r, path);
    MOE_TRY(find_token(path, token));
  }
  return MOE_OK;
}

/* While rank 0 holds the lock no other open of the file may get it. */
static moe_status try_lock(const char *folder) {
  char path[MOE_PATH];
  token_path(folder, 0, path);
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return moe_fail(MOE_IO, "%s: cannot open: %s", path, strerror(errno));
  bool got = flock(fd, LOCK_EX | LOCK_NB) == 0;
  int why = errno;
  close(fd);
  if (!got && why == EWOULDBLOCK) return MOE_OK;
  if (!got) return moe_fail(MOE_IO, "%s: flock: %s: mount it with locks", path, strerror(why));
  return moe_fail(MOE_FAILED,
                  "%s could be locked here while rank 0 holds its lock: two jobs could write one "
                  "run: mount it with locks across hosts (NFS: without nolock and local_lock; "
                  "Lustre: flock)",
                  path);
}

static moe_status check_lock(moe_preflight_job *p, const char *folder) {
  char path[MOE_PATH];
  int fd = -1;
  moe_status status = MOE_OK;
  if (moe_comm_rank(p->world) == 0) {
    token_path(folder, 0, path);
    fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0 || flock(fd, LOCK_EX | LOCK_NB) != 0)
      status = moe_fail(MOE_IO, "%s: cannot lock: %s: mount it with locks", path, strerror(errno));
  }
  status = moe_agree(p->world, status);
  if (status == MOE_OK && speaks()) status = try_lock(folder);
  status = moe_agree(p->world, status); /* everyone has tried */
  if (fd >= 0) close(fd);
  return status;
}

static moe_status try_folder(moe_preflight_job *p, const char *folder, const int *speaking) {
  char token[TOKEN] = "";
  int rank = moe_comm_rank(p->world);
  if (rank == 0) snprintf(token, sizeof token, "%ld-%lld", (long)getpid(), (long long)time(NULL));
  MOE_TRY(moe_comm_host_broadcast(p->world, token, (int64_t)sizeof token, 0));
  moe_status status = MOE_OK;
  if (rank == 0) status = moe_files_make_folders(folder);
  MOE_TRY(moe_agree(p->world, status));
  if (rank == 0) status = leave_token(folder, 0, token);
  MOE_TRY(moe_agree(p->world, status));
  if (rank > 0 && speaks()) { /* found first: the folder may take a while to show */
    status = find_all(p, folder, token, speaking);
    if (status == MOE_OK) status = leave_token(folder, rank, token);
  }
  MOE_TRY(moe_agree(p->world, status));
  if (rank == 0) status = find_all(p, folder, token, speaking);
  MOE_TRY(moe_agree(p->world, status));
  return check_lock(p, folder);
}

moe_status moe_preflight_run_dir(moe_preflight_job *p) {
  int ranks = moe_comm_size(p->world), mine = speaks(), hosts = 0;
  int *speaking = calloc((size_t)ranks, sizeof *speaking);
  char folder[MOE_PATH];
  moe_run_lock *lock = NULL;
  moe_status status = speaking ? MOE_OK : moe_fail(MOE_NO_MEMORY, "out of memory");
  status = moe_agree(p->world, status);
  if (status != MOE_OK || !speaking) goto done;
  MOE_TRY_OR(status, done, moe_comm_host_all_gather(p->world, &mine, sizeof mine, speaking));
  MOE_TRY_OR(status, done, moe_run_lock_take(p->world, p->config->run.dir, &lock));
  snprintf(folder, sizeof folder, "%.3900s/.preflight", p->config->run.dir);
  status = try_folder(p, folder, speaking);
  if (moe_comm_rank(p->world) == 0 && !moe_files_remove_folder(folder))
    moe_warn("%s: cannot be removed: %s", folder, strerror(errno));
  for (int r = 0; r < ranks; r++) hosts += speaking[r];
  snprintf(p->detail, sizeof p->detail, "%.120s: shared, fsync, rename and lock on %d host%s",
           p->config->run.dir, hosts, hosts > 1 ? "s" : "");
done:
  moe_run_lock_release(lock);
  free(speaking);
  return status;
}

moe_status moe_preflight_space(moe_preflight_job *p) {
  moe_run_disk d;
  char need[MOE_TEXT], have[MOE_TEXT], each[MOE_TEXT];
  if (moe_comm_rank(p->world) != 0) return MOE_OK;
  MOE_TRY(moe_files_make_folders(p->config->run.dir));
  MOE_TRY(moe_run_disk_of(p->config, &d));
  double all = (double)d.more * (double)d.each;
  moe_text_bytes(have, (double)d.free);
  moe_text_bytes(need, all);
  moe_text_bytes(each, (double)d.each);
  if ((double)d.free < all) {
    return moe_fail(MOE_FAILED,
                    "%s has %s free and %" PRId64
                    " more checkpoints of %s need %s: free some, lower "
                    "checkpoint.keep, or choose another run.dir",
                    p->config->run.dir, have, d.more, each, need);
  }
  snprintf(p->detail, sizeof p->detail, "%s free, %s needed: %" PRId64 " checkpoint%s of %s", have,
           need, d.more, d.more > 1 ? "s" : "", each);
  return MOE_OK;
}
