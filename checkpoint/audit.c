/* Verification that says how it goes. */
#include "checkpoint/audit.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/commit.h"
#include "checkpoint/files.h"
#include "checkpoint/shard.h"
#include "checkpoint/verify.h"
#include "core/base/log.h"
#include "data/progress.h"

typedef struct {
  moe_manifest manifest;
  const char *folder;
  FILE *report;
  moe_progress progress;
  int64_t done, total; /* bytes */
  moe_status worst;    /* of the files; its message was reported */
} audit;

static moe_status check_file(audit *a, int i) {
  const moe_shard_file *f = &a->manifest.file[i];
  char size[MOE_TEXT], more[MOE_SHARD_NAME + 16];
  snprintf(more, sizeof more, "file %d of %d", i + 1, a->manifest.files);
  moe_progress_show(&a->progress, a->done, a->total, more);
  double start_s = moe_clock_s();
  moe_status status = moe_shard_verify(a->folder, &a->manifest, i);
  double seconds = moe_clock_s() - start_s;
  a->done += f->size;
  if (!a->report || (status != MOE_OK && status != MOE_DAMAGED && status != MOE_IO)) return status;
  if (status == MOE_OK)
    fprintf(a->report, "  %s  %s  ok, %.2f GB/s\n", f->name, moe_text_bytes(size, (double)f->size),
            1e-9 * (double)f->size / (seconds + 1e-9));
  else
    fprintf(a->report, "  %s  %s\n", f->name, moe_error_message());
  if (a->worst == MOE_OK) a->worst = status;
  return MOE_OK; /* go on with the others */
}

static moe_status check_files(audit *a, const volatile sig_atomic_t *stop) {
  moe_status status = MOE_OK;
  for (int i = 0; i < a->manifest.files; i++) a->total += a->manifest.file[i].size;
  moe_progress_start(&a->progress, "verifying");
  for (int i = 0; i < a->manifest.files && status == MOE_OK; i++)
    status = *stop ? moe_fail(MOE_STOPPED, "%s: stopped on request", a->folder) : check_file(a, i);
  double seconds = moe_progress_end(&a->progress);
  char bytes[MOE_TEXT], time[MOE_TEXT];
  if (status == MOE_OK && a->worst == MOE_OK && a->report)
    fprintf(a->report,
            "%s: step %" PRId64 ", %" PRId64 " datasets in %d files, %s: complete, every hash is "
            "right (%s, %.2f GB/s)\n",
            a->folder, a->manifest.state.step, a->manifest.slices, a->manifest.files,
            moe_text_bytes(bytes, (double)a->total), moe_text_seconds(time, seconds),
            1e-9 * (double)a->total / (seconds + 1e-9));
  return status;
}

moe_status moe_audit_checkpoint(const char *step_folder, const volatile sig_atomic_t *stop,
                                FILE *report) {
  audit a = {.folder = step_folder, .report = report};
  if (strlen(step_folder) >= MOE_PATH)
    return moe_fail(MOE_USAGE, "%.60s...: the path is too long", step_folder);
  MOE_TRY(moe_manifest_read(step_folder, &a.manifest));
  moe_status status = moe_checkpoint_check_model(&a.manifest, step_folder);
  if (status == MOE_OK) status = check_files(&a, stop);
  moe_manifest_clear(&a.manifest);
  if (status != MOE_OK || a.worst == MOE_OK) return status;
  return moe_fail(a.worst,
                  "%s: damaged: the lines above name the files: resume or export an older "
                  "checkpoint",
                  step_folder);
}

/* ---- of a run */

typedef struct {
  char folder[MOE_PATH]; /* RUN/checkpoints; "" when the place is a step folder */
  int64_t *steps, n;     /* newest first */
} run_steps;

static moe_status look(const char *place, run_steps *out) {
  *out = (run_steps){.n = 0};
  if (!moe_files_is_folder(place))
    return moe_fail(MOE_USAGE,
                    "%.200s: there is no such folder: name a run's folder or a "
                    "checkpoint (RUN/checkpoints/step-N)",
                    place);
  MOE_TRY(moe_commit_folder(place, out->folder));
  if (!moe_files_is_folder(out->folder)) {
    out->folder[0] = 0;
    return MOE_OK;
  }
  MOE_TRY(moe_commit_list(out->folder, &out->steps, &out->n));
  if (out->n > 0) return MOE_OK;
  return moe_fail(MOE_USAGE, "%.200s: this run has no checkpoint yet", place);
}

moe_status moe_audit(const char *place, bool all, const volatile sig_atomic_t *stop, FILE *report) {
  run_steps run;
  char path[MOE_PATH];
  MOE_TRY(look(place, &run));
  if (!run.folder[0]) return moe_audit_checkpoint(place, stop, report);
  int64_t bad = 0, n = all ? run.n : 1;
  moe_status status = MOE_OK;
  for (int64_t i = 0; i < n && status == MOE_OK; i++) {
    status = moe_audit_checkpoint(moe_commit_place(run.folder, run.steps[i], path), stop, report);
    if (n == 1 || (status != MOE_DAMAGED && status != MOE_IO)) continue;
    moe_warn("%s", moe_error_message());
    bad++;
    status = MOE_OK;
  }
  free(run.steps);
  if (status != MOE_OK || bad == 0) return status;
  return moe_fail(MOE_DAMAGED, "%s: %" PRId64 " of %" PRId64 " checkpoints are damaged", run.folder,
                  bad, n);
}

moe_status moe_audit_choose(const char *place, bool verify, const volatile sig_atomic_t *stop,
                            char path[MOE_PATH]) {
  run_steps run;
  MOE_TRY(look(place, &run));
  if (!run.folder[0]) {
    if (snprintf(path, MOE_PATH, "%s", place) >= MOE_PATH)
      return moe_fail(MOE_USAGE, "%.60s...: the path is too long", place);
    return verify ? moe_audit_checkpoint(path, stop, NULL) : MOE_OK;
  }
  moe_status status = MOE_DAMAGED;
  for (int64_t i = 0; i < run.n; i++) {
    moe_commit_place(run.folder, run.steps[i], path);
    status = verify ? moe_audit_checkpoint(path, stop, NULL) : MOE_OK;
    if (status != MOE_DAMAGED && status != MOE_IO) break;
    moe_warn("skipping the checkpoint of step %" PRId64 ": %s", run.steps[i], moe_error_message());
  }
  free(run.steps);
  if (status == MOE_DAMAGED || status == MOE_IO)
    return moe_fail(MOE_DAMAGED, "%s: none of its checkpoints is valid: the warnings say why",
                    run.folder);
  return status;
}
