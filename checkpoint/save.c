/* Saving: the commit protocol, phase by phase.
 *
 * Ranks wait for each other only between phases, in moe_agree, and no phase waits for another rank;
 * so a failure anywhere reaches everyone at the end of its phase. Until the rename nothing that a
 * reader looks at has changed. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/commit.h"
#include "checkpoint/shard.h"
#include "checkpoint/verify.h"
#include "core/base/log.h"

typedef struct {
  moe_comm *world;
  moe_device *dev;
  const moe_run_state *state;
  const moe_piece *pieces;
  int n;
  moe_commit commit;
  /* what this rank wrote, as it is sent to rank 0: one moe_shard_file, then the slices */
  char *report;
  int64_t slices;
} saving;

static moe_shard_file *report_file(char *report) {
  return (moe_shard_file *)(void *)report;
}

static moe_slice *report_slices(char *report) {
  return (moe_slice *)(void *)(report + sizeof(moe_shard_file));
}

/* Phase 1, rank 0: a folder to write to. */
static moe_status begin(saving *s) {
  return moe_comm_rank(s->world) == 0 ? moe_commit_begin(&s->commit) : MOE_OK;
}

/* Phase 2, every rank: its shard, on the disk. A rank without elements writes no file. */
static moe_status write_shard(saving *s) {
  char path[MOE_PATH + MOE_SHARD_NAME];
  int64_t elements = 0;
  s->report = calloc(1, sizeof(moe_shard_file) + (size_t)s->n * sizeof(moe_slice));
  if (!s->report) return moe_fail(MOE_NO_MEMORY, "no memory to list %d pieces", s->n);
  for (int i = 0; i < s->n; i++) {
    if (s->pieces[i].count < 0)
      return moe_fail(MOE_INVALID, "piece %.95s has a negative count", s->pieces[i].name);
    elements += s->pieces[i].count;
  }
  if (elements == 0) return MOE_OK;
  moe_shard_file *file = report_file(s->report);
  snprintf(file->name, sizeof file->name, "shard-%05d-of-%05d.h5", moe_comm_rank(s->world),
           moe_comm_size(s->world));
  snprintf(path, sizeof path, "%s/%s", s->commit.temporary, file->name);
  return moe_shard_write(path, s->dev, s->pieces, s->n, report_slices(s->report), &s->slices, file);
}

/* Make the manifest's lists of what the ranks reported, one report after the other in `reports`. */
static moe_status list_reports(moe_manifest *m, char *reports, const int64_t *lengths) {
  int64_t slices = 0;
  for (int r = 0; r < m->ranks; r++)
    slices += (lengths[r] - (int64_t)sizeof(moe_shard_file)) / (int64_t)sizeof(moe_slice);
  m->file = calloc((size_t)m->ranks + 1, sizeof *m->file);
  m->slice = calloc((size_t)slices + 1, sizeof *m->slice);
  if (!m->file || !m->slice)
    return moe_fail(MOE_NO_MEMORY, "no memory for a manifest of %" PRId64 " slices", slices);
  for (int r = 0; r < m->ranks; reports += lengths[r++]) {
    int64_t n = (lengths[r] - (int64_t)sizeof(moe_shard_file)) / (int64_t)sizeof(moe_slice);
    if (n == 0) continue;
    memcpy(&m->file[m->files], reports, sizeof *m->file);
    memcpy(&m->slice[m->slices], reports + sizeof *m->file, (size_t)n * sizeof *m->slice);
    for (int64_t i = 0; i < n; i++) m->slice[m->slices++].file = m->files;
    m->files++;
  }
  return MOE_OK;
}

static moe_status check_pieces(moe_manifest *m) {
  moe_status status = moe_manifest_check(m, "pieces to save");
  if (status == MOE_OK) status = moe_checkpoint_check_model(m, "pieces to save");
  return status == MOE_DAMAGED ? MOE_INVALID : status; /* no file was damaged: the caller erred */
}

/* Phase 3: rank 0 learns what was written, writes the manifest and renames. */
static moe_status publish(saving *s) {
  bool first = moe_comm_rank(s->world) == 0;
  moe_manifest m = {.ranks = moe_comm_size(s->world)};
  int64_t *lengths = calloc((size_t)m.ranks, sizeof *lengths);
  void *reports = NULL;
  int64_t length = (int64_t)sizeof(moe_shard_file) + s->slices * (int64_t)sizeof(moe_slice);
  moe_status status = lengths ? MOE_OK : moe_fail(MOE_NO_MEMORY, "no memory for %d ranks", m.ranks);
  MOE_TRY_OR(status, done, moe_agree(s->world, status));
  MOE_TRY_OR(status, done,
             moe_comm_host_gather_bytes(s->world, s->report, length, 0, &reports, lengths));
  if (!first) goto done;
  MOE_TRY_OR(status, done, list_reports(&m, reports, lengths));
  m.state = *s->state;
  MOE_TRY_OR(status, done, check_pieces(&m));
  MOE_TRY_OR(status, done, moe_manifest_write(&m, s->commit.temporary));
  status = moe_commit_rename(&s->commit);
done:
  m.state = (moe_run_state){0}; /* borrowed */
  moe_manifest_clear(&m);
  free(reports);
  free(lengths);
  return status;
}

static moe_status run_phases(saving *s, const char *run_dir) {
  MOE_TRY(moe_agree(s->world, moe_commit_plan(run_dir, s->state->step, &s->commit)));
  MOE_TRY(moe_comm_host_broadcast(s->world, s->commit.temporary, MOE_PATH, 0));
  MOE_TRY(moe_agree(s->world, begin(s)));
  MOE_TRY(moe_agree(s->world, write_shard(s)));
  MOE_TRY(moe_agree(s->world, publish(s)));
  return moe_checkpoint_verify(s->world, s->commit.place);
}

moe_status moe_checkpoint_save(moe_comm *world, moe_device *dev, const char *run_dir,
                               const moe_run_state *state, const moe_piece *pieces, int n, int keep,
                               int64_t *bytes, double *seconds) {
  double start = moe_clock_s();
  saving s = {.world = world, .dev = dev, .state = state, .pieces = pieces, .n = n};
  moe_status status = run_phases(&s, run_dir);
  if (moe_comm_rank(world) == 0 && status == MOE_OK) moe_commit_finish(&s.commit, keep);
  if (moe_comm_rank(world) == 0 && status != MOE_OK) moe_commit_undo(&s.commit);
  int64_t size = status == MOE_OK ? report_file(s.report)->size : 0;
  free(s.report);
  MOE_TRY(status);
  MOE_TRY(moe_comm_host_all_reduce_i64(world, &size, 1, MOE_SUM));
  if (bytes) *bytes = size;
  if (seconds) *seconds = moe_clock_s() - start;
  return MOE_OK;
}
