/* Saving: the commit protocol, phase by phase.
 *
 * Ranks wait for each other only between phases, in moe_agree, and no phase waits for another rank;
 * so a failure anywhere reaches everyone at the end of its phase. Until the rename nothing that a
 * reader looks at has changed. */
#include "checkpoint/save.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/files.h"
#include "checkpoint/shard.h"
#include "checkpoint/verify.h"
#include "core/base/log.h"

static moe_shard_file *report_file(char *report) {
  return (moe_shard_file *)(void *)report;
}

static moe_slice *report_slices(char *report) {
  return (moe_slice *)(void *)(report + sizeof(moe_shard_file));
}

/* ---- write */

/* This rank's shard. A rank without elements writes no file. */
static moe_status write_shard(moe_save *s) {
  char path[MOE_PATH + MOE_SHARD_NAME];
  int64_t elements = 0;
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

static moe_status write_phase(moe_save *s) {
  MOE_TRY(moe_files_make_folders(s->commit.temporary));
  return write_shard(s);
}

/* ---- publish */

static int64_t slices_in(int64_t length) {
  return (length - (int64_t)sizeof(moe_shard_file)) / (int64_t)sizeof(moe_slice);
}

/* Make the manifest's lists of what the ranks reported. */
static moe_status list_reports(const moe_save *s, moe_manifest *m) {
  const char *report = s->reports;
  int64_t slices = 0;
  for (int r = 0; r < m->ranks; r++) slices += slices_in(s->lengths[r]);
  m->file = calloc((size_t)m->ranks + 1, sizeof *m->file);
  m->slice = calloc((size_t)slices + 1, sizeof *m->slice);
  if (!m->file || !m->slice)
    return moe_fail(MOE_NO_MEMORY, "no memory for a manifest of %" PRId64 " slices", slices);
  for (int r = 0; r < m->ranks; report += s->lengths[r++]) {
    int64_t n = slices_in(s->lengths[r]);
    if (n == 0) continue;
    memcpy(&m->file[m->files], report, sizeof *m->file);
    memcpy(&m->slice[m->slices], report + sizeof *m->file, (size_t)n * sizeof *m->slice);
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

static moe_status publish_phase(moe_save *s) {
  if (moe_comm_rank(s->world) != 0) return MOE_OK;
  moe_manifest m = {.ranks = moe_comm_size(s->world)};
  moe_status status;
  MOE_TRY_OR(status, done, list_reports(s, &m));
  m.state = s->state;
  MOE_TRY_OR(status, done, check_pieces(&m));
  MOE_TRY_OR(status, done, moe_manifest_write(&m, s->commit.temporary));
  status = moe_commit_rename(&s->commit);
done:
  m.state = (moe_run_state){0}; /* borrowed */
  moe_manifest_clear(&m);
  return status;
}

/* ---- tidy */

static moe_status tidy_phase(moe_save *s) {
  if (moe_comm_rank(s->world) != 0) return MOE_OK;
  if (s->outcome == MOE_OK)
    moe_commit_finish(&s->commit, s->keep);
  else
    moe_commit_undo(&s->commit);
  return MOE_OK;
}

/* ---- the phases in turn */

static moe_status work(moe_save *s) {
  switch (s->phase) {
  case MOE_SAVE_WRITE:
    return write_phase(s);
  case MOE_SAVE_PUBLISH:
    return publish_phase(s);
  case MOE_SAVE_VERIFY:
    return moe_checkpoint_verify_share(s->commit.place, moe_comm_rank(s->world),
                                       moe_comm_size(s->world));
  case MOE_SAVE_TIDY:
    return tidy_phase(s);
  case MOE_SAVE_DONE:
    break;
  }
  return MOE_OK;
}

moe_status moe_save_work(moe_save *s) {
  double start_s = moe_clock_s();
  moe_status status = work(s);
  s->work_s[s->phase] = moe_clock_s() - start_s;
  return status;
}

static moe_status gather_reports(moe_save *s) {
  int64_t length = (int64_t)sizeof(moe_shard_file) + s->slices * (int64_t)sizeof(moe_slice);
  return moe_comm_host_gather_bytes(s->world, s->report, length, 0, &s->reports, s->lengths);
}

static moe_status settle(moe_save *s, moe_status outcome) {
  double slowest[2] = {s->work_s[MOE_SAVE_WRITE], s->work_s[MOE_SAVE_VERIFY]};
  s->outcome = outcome;
  if (outcome != MOE_OK) snprintf(s->message, sizeof s->message, "%s", moe_error_message());
  s->seconds = moe_clock_s() - s->started;
  s->phase = MOE_SAVE_TIDY;
  MOE_TRY(moe_comm_host_all_reduce_f64(s->world, slowest, 2, MOE_MAX));
  s->write_s = slowest[0];
  s->verify_s = slowest[1];
  return MOE_OK;
}

moe_status moe_save_advance(moe_save *s, moe_status mine) {
  moe_status agreed = moe_agree(s->world, mine);
  if (s->phase == MOE_SAVE_TIDY)
    s->phase = MOE_SAVE_DONE;
  else if (agreed != MOE_OK || s->phase == MOE_SAVE_VERIFY)
    return settle(s, agreed);
  else if (++s->phase == MOE_SAVE_PUBLISH)
    return gather_reports(s);
  return MOE_OK;
}

/* ---- opening and closing */

static moe_status copy_state(moe_run_state *to, const moe_run_state *from) {
  size_t bias = (size_t)from->router_bias_count * sizeof *from->router_bias;
  *to = *from;
  to->config = from->config ? strdup(from->config) : NULL;
  to->router_bias = bias > 0 ? malloc(bias) : NULL;
  if ((from->config && !to->config) || (bias > 0 && !to->router_bias))
    return moe_fail(MOE_NO_MEMORY, "no memory for the state to save");
  if (bias > 0) memcpy(to->router_bias, from->router_bias, bias);
  return MOE_OK;
}

/* This rank's part of opening. */
static moe_status prepare(moe_save *s, const char *run_dir, const moe_run_state *state,
                          const moe_piece *pieces) {
  size_t n = (size_t)s->n;
  MOE_TRY(copy_state(&s->state, state));
  s->pieces = malloc((n + 1) * sizeof *s->pieces);
  s->report = calloc(1, sizeof(moe_shard_file) + n * sizeof(moe_slice));
  s->lengths = calloc((size_t)moe_comm_size(s->world), sizeof *s->lengths);
  if (!s->pieces || !s->report || !s->lengths)
    return moe_fail(MOE_NO_MEMORY, "no memory to list %d pieces", s->n);
  if (n > 0) memcpy(s->pieces, pieces, n * sizeof *pieces);
  for (int i = 0; i < s->n; i++) s->bytes += pieces[i].count * moe_dtype_size(pieces[i].dtype);
  return moe_commit_plan(run_dir, state->step, &s->commit);
}

moe_status moe_save_open(moe_comm *world, moe_device *dev, const char *run_dir,
                         const moe_run_state *state, const moe_piece *pieces, int n, moe_keep keep,
                         moe_save *out) {
  moe_status status = MOE_OK;
  *out = (moe_save){.world = world, .dev = dev, .n = n, .keep = keep, .started = moe_clock_s()};
  MOE_TRY_OR(status, failed, moe_agree(world, prepare(out, run_dir, state, pieces)));
  MOE_TRY_OR(status, failed, moe_comm_host_broadcast(world, out->commit.temporary, MOE_PATH, 0));
  MOE_TRY_OR(status, failed, moe_comm_host_all_reduce_i64(world, &out->bytes, 1, MOE_SUM));
  if (moe_comm_rank(world) == 0) status = moe_commit_make_room(&out->commit, out->bytes);
  MOE_TRY_OR(status, failed, moe_agree(world, status));
  return MOE_OK;
failed:
  moe_save_close(out);
  return status;
}

void moe_save_close(moe_save *s) {
  moe_run_state_clear(&s->state);
  free(s->pieces);
  free(s->report);
  free(s->reports);
  free(s->lengths);
  *s = (moe_save){0};
}

moe_status moe_checkpoint_save(moe_comm *world, moe_device *dev, const char *run_dir,
                               const moe_run_state *state, const moe_piece *pieces, int n, int keep,
                               int64_t *bytes, double *seconds) {
  moe_save s;
  MOE_TRY(moe_save_open(world, dev, run_dir, state, pieces, n, (moe_keep){.newest = keep}, &s));
  moe_status status = MOE_OK;
  while (status == MOE_OK && s.phase != MOE_SAVE_DONE)
    status = moe_save_advance(&s, moe_save_work(&s));
  if (status == MOE_OK && s.outcome != MOE_OK) status = moe_fail(s.outcome, "%s", s.message);
  if (bytes) *bytes = s.bytes;
  if (seconds) *seconds = s.seconds;
  moe_save_close(&s);
  return status;
}
