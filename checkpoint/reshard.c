/* Resharding: the elements of all tensors laid end to end, cut where another file's share begins.
 *
 * Files are written one after the other, the pieces of a file by all processors; each is read where
 * it lies in the old checkpoint, whatever slices and files that is. */
#include "checkpoint/reshard.h"

#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/commit.h"
#include "checkpoint/diff.h"
#include "checkpoint/files.h"
#include "checkpoint/shard.h"
#include "checkpoint/stored_config.h"
#include "checkpoint/tensors.h"
#include "core/base/log.h"
#include "data/progress.h"

enum { MOST_RANKS = 4096 };

typedef struct {
  moe_tensors *from;
  const moe_manifest *old;
  moe_commit commit;
  moe_manifest manifest; /* of the new one; its state is the old one's */
  moe_progress progress;
  int64_t total; /* bytes */
  const volatile sig_atomic_t *stop;
} resharding;

/* moe_piece.fetch */
static moe_status fetch(void *context, const moe_piece *p, int64_t at, int64_t n, void *out) {
  resharding *r = context;
  if (*r->stop) return moe_fail(MOE_STOPPED, "stopped on request: nothing was kept");
  int64_t first = moe_manifest_find(r->old, p->role, p->name);
  MOE_TRY(moe_tensors_read(r->from, first, p->begin + at, n, out));
  moe_progress_add(&r->progress, n * moe_dtype_size(p->dtype), r->total);
  return MOE_OK;
}

/* ---- who gets what */

static int64_t tensors_of(const resharding *r) {
  int64_t n = 0;
  for (int64_t i = 0; i < r->old->slices; i = moe_tensors_end(r->from, i)) n++;
  return n;
}

/* total * k / n, without overflow. */
static int64_t share(int64_t total, int64_t k, int64_t n) {
  return total / n * k + total % n * k / n;
}

/* The pieces of file k: bytes [total k / ranks, total (k + 1) / ranks) of all tensors laid end to
 * end, cut between elements. Returns how many. */
static int pieces_of(resharding *r, int k, moe_piece *pieces) {
  int64_t begin = share(r->total, k, r->manifest.ranks);
  int64_t end = share(r->total, k + 1, r->manifest.ranks);
  int64_t place = 0; /* of the tensor's first byte */
  int n = 0;
  for (int64_t i = 0; i < r->old->slices; i = moe_tensors_end(r->from, i)) {
    const moe_slice *s = &r->old->slice[i];
    int64_t size = moe_dtype_size(s->dtype), count = moe_slice_total(s);
    /* an element is the file's that has its last byte */
    int64_t first = begin <= place ? 0 : (begin - place) / size;
    int64_t last = end <= place ? 0 : (end - place) / size;
    place += count * size;
    if (last > count) last = count;
    if (first >= last) continue;
    moe_piece *p = &pieces[n++];
    *p = (moe_piece){.role = s->role, .dtype = s->dtype, .dims = s->dims, .fetch = fetch};
    memcpy(p->name, s->name, sizeof p->name);
    memcpy(p->shape, s->shape, sizeof p->shape);
    p->begin = first;
    p->count = last - first;
    p->context = r;
    p->any_thread = true;
  }
  return n;
}

static moe_status write_file(resharding *r, int k, moe_piece *pieces) {
  moe_manifest *m = &r->manifest;
  char path[MOE_PATH + MOE_SHARD_NAME];
  int64_t written = 0;
  int n = pieces_of(r, k, pieces);
  if (n == 0) return MOE_OK;
  moe_shard_file *file = &m->file[m->files];
  moe_slice *list = realloc(m->slice, (size_t)(m->slices + n) * sizeof *list);
  if (!list) return moe_fail(MOE_NO_MEMORY, "no memory for the list of tensors");
  m->slice = list;
  snprintf(file->name, sizeof file->name, "shard-%05d-of-%05d.h5", k, m->ranks);
  snprintf(path, sizeof path, "%s/%s", r->commit.temporary, file->name);
  MOE_TRY(moe_shard_write(path, NULL, pieces, n, list + m->slices, &written, file));
  for (int64_t i = 0; i < written; i++) list[m->slices++].file = m->files;
  m->files++;
  return MOE_OK;
}

static moe_status write_files(resharding *r) {
  moe_piece *pieces = calloc((size_t)tensors_of(r) + 1, sizeof *pieces);
  r->manifest.file = calloc((size_t)r->manifest.ranks, sizeof *r->manifest.file);
  moe_status status = pieces && r->manifest.file
                          ? MOE_OK
                          : moe_fail(MOE_NO_MEMORY, "no memory for the list of tensors");
  moe_progress_start(&r->progress, "writing");
  for (int k = 0; k < r->manifest.ranks && status == MOE_OK; k++) status = write_file(r, k, pieces);
  moe_progress_end(&r->progress);
  free(pieces);
  return status;
}

/* ---- the new run */

/* The run's configuration, at home in its new folder: what moe-train can be started with. */
static moe_status write_config(const moe_run_state *state, const char *run_dir) {
  char path[MOE_PATH + 16];
  if (!state->config || !state->config[0]) return MOE_OK;
  moe_config *c;
  MOE_TRY(moe_stored_config(state->config, "the checkpoint", &c));
  snprintf(c->run.dir, sizeof c->run.dir, "%s", run_dir);
  char *text = moe_config_text(c);
  free(c);
  snprintf(path, sizeof path, "%s/config.ini", run_dir);
  moe_status status = text ? moe_files_replace(path, text, (int64_t)strlen(text))
                           : moe_fail(MOE_NO_MEMORY, "no memory for a configuration");
  free(text);
  return status;
}

/* What is in place now must be what was read, bit for bit. (Both are read to their last byte, and
 * their hashes are checked.) */
static moe_status compare(const resharding *r, const char *from) {
  bool differ = false;
  const moe_diff_options options = {.stop = r->stop};
  MOE_TRY(moe_diff_checkpoints(from, r->commit.place, &options, &differ));
  return differ ? moe_fail(MOE_FAILED, "%s: what was written differs from %s: it is deleted",
                           r->commit.place, from)
                : MOE_OK;
}

static moe_status publish(resharding *r, const char *from) {
  moe_manifest *m = &r->manifest;
  m->state = r->old->state; /* borrowed */
  moe_status status = moe_manifest_check(m, "the new checkpoint");
  if (status == MOE_OK) status = moe_manifest_write(m, r->commit.temporary);
  m->state = (moe_run_state){0};
  MOE_TRY(status);
  MOE_TRY(moe_commit_rename(&r->commit));
  return compare(r, from);
}

static moe_status reshard(resharding *r, const char *from, const char *run_dir) {
  r->old = moe_tensors_manifest(r->from);
  for (int64_t i = 0; i < r->old->slices; i++) r->total += moe_slice_bytes(&r->old->slice[i]);
  MOE_TRY(moe_commit_plan(run_dir, r->old->state.step, &r->commit));
  moe_status status = moe_commit_make_room(&r->commit, r->total);
  if (status == MOE_OK) status = moe_files_make_folders(r->commit.temporary);
  if (status == MOE_OK) status = write_files(r);
  if (status == MOE_OK) status = publish(r, from);
  if (status == MOE_OK) status = write_config(&r->old->state, run_dir);
  if (status == MOE_OK)
    moe_commit_finish(&r->commit, (moe_keep){.newest = INT_MAX});
  else
    moe_commit_undo(&r->commit);
  return status;
}

moe_status moe_reshard(moe_comm *world, const char *from, const char *run_dir, int ranks,
                       const volatile sig_atomic_t *stop) {
  resharding r = {.manifest = {.ranks = ranks}, .stop = stop};
  moe_run_lock *lock = NULL;
  double start_s = moe_clock_s();
  if (ranks < 1 || ranks > MOST_RANKS)
    return moe_fail(MOE_USAGE, "--ranks %d: not from 1 to %d", ranks, MOST_RANKS);
  MOE_TRY(moe_commit_check_new(run_dir));
  MOE_TRY(moe_tensors_open(from, &r.from));
  moe_status status = moe_run_lock_take(world, run_dir, &lock);
  if (status == MOE_OK) status = reshard(&r, from, run_dir);
  char bytes[MOE_TEXT], time[MOE_TEXT];
  if (status == MOE_OK)
    moe_info("%s: %s in %d files, in %s; equal to %s bit for bit", r.commit.place,
             moe_text_bytes(bytes, (double)r.total), r.manifest.files,
             moe_text_seconds(time, moe_clock_s() - start_s), from);
  moe_run_lock_release(lock);
  moe_manifest_clear(&r.manifest);
  moe_tensors_close(r.from);
  return status;
}
