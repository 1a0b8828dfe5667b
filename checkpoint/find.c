/* Which checkpoint does a run go on from?
 *
 * The newest that verifies; `latest` is never asked. Rank 0 looks at folders and tells the others,
 * so all try the same ones in the same order. */
#include <stdlib.h>
#include <string.h>

#include "checkpoint/commit.h"
#include "checkpoint/files.h"
#include "checkpoint/verify.h"
#include "core/base/log.h"

/* Collective. The steps of the folder, newest first, malloc'd on every rank. */
static moe_status list_steps(moe_comm *world, const char *folder, int64_t **steps, int64_t *n) {
  bool first = moe_comm_rank(world) == 0;
  *steps = NULL;
  *n = 0;
  MOE_TRY(moe_agree(world, first ? moe_commit_list(folder, steps, n) : MOE_OK));
  MOE_TRY(moe_comm_host_broadcast(world, n, sizeof *n, 0));
  if (*n == 0) return MOE_OK;
  if (!first) *steps = malloc((size_t)*n * sizeof **steps);
  moe_status status = *steps ? MOE_OK : moe_fail(MOE_NO_MEMORY, "no memory to list %s", folder);
  MOE_TRY_OR(status, failed, moe_agree(world, status));
  MOE_TRY_OR(status, failed,
             moe_comm_host_broadcast(world, *steps, *n * (int64_t)sizeof **steps, 0));
  return MOE_OK;
failed:
  free(*steps);
  *steps = NULL;
  return status;
}

/* Without `verify`: does the manifest say that everything is there? */
static moe_status check(moe_comm *world, const char *path, bool verify) {
  moe_manifest m = {.files = 0};
  if (verify) return moe_checkpoint_verify(world, path);
  bool first = moe_comm_rank(world) == 0;
  moe_status status = first ? moe_manifest_read(path, &m) : MOE_OK;
  if (first && status == MOE_OK) status = moe_checkpoint_check_model(&m, path);
  moe_manifest_clear(&m);
  return moe_agree(world, status);
}

/* Path of the newest checkpoint below run_dir that is right; "" when there is none at all. */
static moe_status find_newest(moe_comm *world, const char *run_dir, bool verify,
                              char path[MOE_PATH]) {
  char folder[MOE_PATH];
  int64_t *steps, n;
  MOE_TRY(moe_agree(world, moe_commit_folder(run_dir, folder)));
  MOE_TRY(list_steps(world, folder, &steps, &n));
  moe_status status = MOE_OK;
  path[0] = 0;
  for (int64_t i = 0; i < n; i++) {
    moe_commit_place(folder, steps[i], path);
    status = check(world, path, verify);
    if (status != MOE_DAMAGED && status != MOE_IO) break;
    if (moe_comm_rank(world) == 0)
      moe_warn("skipping the checkpoint of step %lld: %s", (long long)steps[i],
               moe_error_message());
    path[0] = 0;
  }
  free(steps);
  if (n == 0 || path[0]) return status;
  return moe_fail(MOE_DAMAGED,
                  "%s: none of its checkpoints is valid (the warnings say why): restore one, or "
                  "move the folder away, or ask for a new start with --resume none",
                  folder);
}

typedef enum { NOTHING, CHECKPOINT, RUN } place_kind;

static place_kind what_is(const char *path) {
  char below[MOE_PATH + 16];
  snprintf(below, sizeof below, "%s/checkpoints", path);
  if (moe_files_is_folder(below)) return RUN;
  return moe_files_is_folder(path) ? CHECKPOINT : NOTHING;
}

static moe_status find_at(moe_comm *world, const char *place, bool verify, char path[MOE_PATH]) {
  int32_t kind = moe_comm_rank(world) == 0 ? (int32_t)what_is(place) : 0;
  MOE_TRY(moe_comm_host_broadcast(world, &kind, sizeof kind, 0));
  if (kind == NOTHING || strlen(place) >= MOE_PATH)
    return moe_fail(MOE_USAGE,
                    "%.200s: there is no such folder: name a checkpoint "
                    "(RUN/checkpoints/step-N) or a run's folder",
                    place);
  if (kind == RUN) {
    MOE_TRY(find_newest(world, place, verify, path));
    if (!path[0]) return moe_fail(MOE_USAGE, "%.200s: this run has no checkpoint yet", place);
    return MOE_OK;
  }
  snprintf(path, MOE_PATH, "%s", place);
  return check(world, place, verify);
}

moe_status moe_checkpoint_choose(moe_comm *world, const char *place, bool verify,
                                 char path[MOE_PATH]) {
  path[0] = 0;
  moe_status status = find_at(world, place, verify, path);
  if (status != MOE_OK) path[0] = 0;
  return status;
}

moe_status moe_checkpoint_find(moe_comm *world, const char *run_dir, const char *resume,
                               char path[MOE_PATH]) {
  path[0] = 0;
  if (strcmp(resume, "none") == 0) return MOE_OK;
  if (strcmp(resume, "auto") != 0) return moe_checkpoint_choose(world, resume, true, path);
  moe_status status = find_newest(world, run_dir, true, path);
  if (status != MOE_OK) path[0] = 0;
  return status;
}
