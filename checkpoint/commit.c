/* How a checkpoint becomes visible, and how old ones go.
 *
 * A folder is named step-N by one rename, after everything in it is on the disk, and loses that
 * name by one rename before anything in it is deleted. So at any instant a folder with that name is
 * whole. */
#include "checkpoint/commit.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "checkpoint/files.h"
#include "core/base/log.h"

#define STEP "step-"
#define TEMPORARY ".tmp-"
#define DELETED ".del-"
#define ASIDE "aside-"

/* PATH = FOLDER/PREFIX + "step-N" */
static const char *step_path(const char *folder, const char *prefix, int64_t step,
                             char path[MOE_PATH]) {
  if (snprintf(path, MOE_PATH, "%s/%s" STEP "%08" PRId64, folder, prefix, step) >= MOE_PATH)
    path[0] = 0; /* cannot be: moe_commit_folder left room */
  return path;
}

const char *moe_commit_place(const char *folder, int64_t step, char path[MOE_PATH]) {
  return step_path(folder, "", step, path);
}

moe_status moe_commit_folder(const char *run_dir, char folder[MOE_PATH]) {
  enum { ROOM = 128 }; /* for the names in it */
  if (strlen(run_dir) > MOE_PATH - ROOM)
    return moe_fail(MOE_USAGE, "%.60s...: the run's path is too long", run_dir);
  snprintf(folder, MOE_PATH, "%s/checkpoints", run_dir);
  return MOE_OK;
}

moe_status moe_commit_plan(const char *run_dir, int64_t step, moe_commit *out) {
  struct timespec now;
  *out = (moe_commit){.step = step};
  if (step < 0) return moe_fail(MOE_INVALID, "cannot save step %" PRId64, step);
  MOE_TRY(moe_commit_folder(run_dir, out->folder));
  moe_commit_place(out->folder, step, out->place);
  step_path(out->folder, TEMPORARY, step, out->temporary);
  size_t length = strlen(out->temporary);
  clock_gettime(CLOCK_REALTIME, &now);
  snprintf(out->temporary + length, MOE_PATH - length, "-%llx%08lx", (long long)now.tv_sec,
           now.tv_nsec);
  return MOE_OK;
}

static bool has_prefix(const char *name, const char *prefix) {
  return strncmp(name, prefix, strlen(prefix)) == 0;
}

static void remove_leftovers(const moe_commit *c) {
  DIR *folder = opendir(c->folder);
  if (!folder) return;
  for (struct dirent *e; (e = readdir(folder));) {
    char victim[MOE_PATH + 256];
    if (!has_prefix(e->d_name, TEMPORARY) && !has_prefix(e->d_name, DELETED)) continue;
    snprintf(victim, sizeof victim, "%s/%s", c->folder, e->d_name);
    if (!moe_files_remove_folder(victim))
      moe_warn("%s: cannot remove this left-over: %s", victim, strerror(errno));
  }
  closedir(folder);
}

moe_status moe_commit_make_room(const moe_commit *c, int64_t bytes) {
  char have[MOE_TEXT], need[MOE_TEXT];
  MOE_TRY(moe_files_make_folders(c->folder));
  remove_leftovers(c);
  int64_t room = moe_files_free_bytes(c->folder);
  if (room >= bytes) return MOE_OK;
  return moe_fail(MOE_IO,
                  "%s: the disk has %s free and a checkpoint needs %s: free some space, or lower "
                  "checkpoint.keep",
                  c->folder, moe_text_bytes(have, (double)room),
                  moe_text_bytes(need, (double)bytes));
}

static moe_status put_in_place(moe_commit *c) {
  if (rename(c->temporary, c->place) != 0)
    return moe_fail(MOE_IO, "%s: cannot rename to it: %s", c->place, strerror(errno));
  c->renamed = true;
  return MOE_OK;
}

/* A checkpoint of the same step is there: exchange the two. Where the file system cannot, the old
 * one makes room first: for an instant there is none of this step, but those of others stand. */
static moe_status replace(moe_commit *c) {
  if (renameat2(AT_FDCWD, c->temporary, AT_FDCWD, c->place, RENAME_EXCHANGE) == 0) {
    memcpy(c->old, c->temporary, sizeof c->old);
    c->renamed = true;
    return MOE_OK;
  }
  step_path(c->folder, DELETED, c->step, c->old);
  if (rename(c->place, c->old) == 0) return put_in_place(c);
  c->old[0] = 0;
  return moe_fail(MOE_IO, "%s: cannot replace: %s", c->place, strerror(errno));
}

moe_status moe_commit_rename(moe_commit *c) {
  MOE_TRY(moe_files_sync_folder(c->temporary));
  MOE_TRY(moe_files_is_folder(c->place) ? replace(c) : put_in_place(c));
  return moe_files_sync_folder(c->folder);
}

void moe_commit_undo(moe_commit *c) {
  bool exchanged = c->old[0] && strcmp(c->old, c->temporary) == 0;
  if (exchanged) {
    renameat2(AT_FDCWD, c->temporary, AT_FDCWD, c->place, RENAME_EXCHANGE);
  } else {
    if (c->renamed) rename(c->place, c->temporary);
    if (c->old[0]) rename(c->old, c->place);
  }
  c->renamed = false;
  c->old[0] = 0;
  if (!moe_files_remove_folder(c->temporary))
    moe_warn("%s: cannot remove what a failed save left: %s", c->temporary, strerror(errno));
}

/* ---- after the commit */

/* Take the step's name from a folder, then delete it. */
static bool remove_step(const char *folder, const char *path, int64_t step) {
  char doomed[MOE_PATH];
  step_path(folder, DELETED, step, doomed);
  moe_files_remove_folder(doomed);
  return rename(path, doomed) == 0 && moe_files_remove_folder(doomed);
}

static void point_latest(const moe_commit *c) {
  char path[MOE_PATH], text[64];
  snprintf(path, sizeof path, "%.*s/latest", MOE_PATH - 16, c->folder);
  int length = snprintf(text, sizeof text, STEP "%08" PRId64 "\n", c->step);
  if (moe_files_replace(path, text, length) != MOE_OK) moe_warn("%s", moe_error_message());
}

/* A run that went back to an earlier step and saved again has left these behind. They must not be
 * what resumes next time, nor count among those kept; but a person may want them. */
static void set_aside(const moe_commit *c, int64_t step) {
  char from[MOE_PATH], to[MOE_PATH];
  moe_commit_place(c->folder, step, from);
  step_path(c->folder, ASIDE, step, to);
  size_t length = strlen(to);
  for (int i = 2; moe_files_is_folder(to) && i < 1000; i++)
    snprintf(to + length, MOE_PATH - length, ".%d", i);
  if (rename(from, to) == 0)
    moe_warn("%s: is ahead of the step just saved, so it belongs to an abandoned attempt: kept as "
             "%s; delete it when you do not need it",
             from, to);
  else
    moe_warn("%s: cannot set it aside: %s", from, strerror(errno));
}

/* Hours since the checkpoint at `path` was made; 0 when that cannot be known. */
static double age_hours(const char *path) {
  char manifest[MOE_PATH + 32];
  struct stat st;
  snprintf(manifest, sizeof manifest, "%s/manifest.json", path);
  return stat(manifest, &st) == 0 ? difftime(time(NULL), st.st_mtime) / 3600.0 : 0.0;
}

static void prune(const moe_commit *c, moe_keep keep) {
  int64_t *steps, n;
  if (moe_commit_list(c->folder, &steps, &n) != MOE_OK) {
    moe_warn("%s", moe_error_message());
    return;
  }
  int64_t newest = 0, at_least = keep.newest < 2 ? 2 : keep.newest;
  for (int64_t i = 0; i < n; i++) {
    char path[MOE_PATH];
    moe_commit_place(c->folder, steps[i], path);
    if (steps[i] > c->step) {
      set_aside(c, steps[i]);
      continue;
    }
    if (newest++ < at_least || (keep.every > 0 && steps[i] % keep.every == 0) ||
        (keep.hours > 0.0 && age_hours(path) < keep.hours))
      continue;
    if (!remove_step(c->folder, path, steps[i]))
      moe_warn("%s: cannot prune: %s", path, strerror(errno));
  }
  free(steps);
}

void moe_commit_finish(const moe_commit *c, moe_keep keep) {
  point_latest(c);
  prune(c, keep);
  if (c->old[0] && !moe_files_remove_folder(c->old))
    moe_warn("%s: cannot remove: %s", c->old, strerror(errno));
}

/* ---- listing
 * ------------------------------------------------------------------------------------- */

/* The step of a folder name, or -1: only the spelling that step_path gives counts. */
static int64_t step_of(const char *name) {
  char again[40];
  if (!has_prefix(name, STEP)) return -1;
  errno = 0;
  int64_t step = strtoll(name + strlen(STEP), NULL, 10);
  snprintf(again, sizeof again, STEP "%08" PRId64, step);
  return errno == 0 && step >= 0 && strcmp(name, again) == 0 ? step : -1;
}

static int newest_first(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x < y) - (x > y);
}

moe_status moe_commit_list(const char *folder, int64_t **steps, int64_t *n) {
  *steps = NULL;
  *n = 0;
  DIR *open_folder = opendir(folder);
  if (!open_folder && errno == ENOENT) return MOE_OK;
  if (!open_folder) return moe_fail(MOE_IO, "%s: cannot list: %s", folder, strerror(errno));
  moe_status status = MOE_OK;
  for (struct dirent *e; status == MOE_OK && (e = readdir(open_folder));) {
    int64_t step = step_of(e->d_name);
    if (step < 0) continue;
    int64_t *more = realloc(*steps, (size_t)(*n + 1) * sizeof **steps);
    if (more) {
      *steps = more;
      more[(*n)++] = step;
    } else {
      status = moe_fail(MOE_NO_MEMORY, "%s: no memory to list it", folder);
    }
  }
  closedir(open_folder);
  if (*n > 0) qsort(*steps, (size_t)*n, sizeof **steps, newest_first);
  if (status != MOE_OK) {
    free(*steps);
    *steps = NULL;
    *n = 0;
  }
  return status;
}

moe_status moe_commit_check_new(const char *run_dir) {
  char folder[MOE_PATH];
  int64_t *steps, n;
  MOE_TRY(moe_commit_folder(run_dir, folder));
  MOE_TRY(moe_commit_list(folder, &steps, &n));
  free(steps);
  if (n == 0) return MOE_OK;
  return moe_fail(MOE_USAGE, "%s: has checkpoints already: choose a new folder for --output",
                  folder);
}
