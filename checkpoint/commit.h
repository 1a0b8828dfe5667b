/* The folders of a run's checkpoints, and how a new one takes its place among them.
 *
 *   RUN/checkpoints/step-00001234       complete, or it would not have this name
 *                  /.tmp-step-...       being written, or left by a crash
 *                  /.del-step-...       being deleted
 *                  /aside-step-...      later steps of an attempt that was abandoned
 *                  /latest              a hint for people
 *
 * Only rank 0 calls what changes folders, while its job holds the run's lock; it may do so from a
 * thread. All functions are local. */
#ifndef MOE_CHECKPOINT_COMMIT_H
#define MOE_CHECKPOINT_COMMIT_H

#include "checkpoint/checkpoint.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t step;
  char folder[MOE_PATH];    /* RUN/checkpoints */
  char temporary[MOE_PATH]; /* where this save is written; a name no earlier save had */
  char place[MOE_PATH];     /* where it goes */
  char old[MOE_PATH];       /* where the replaced checkpoint of this step is now; "" for none */
  bool renamed;             /* the new one is at `place` */
} moe_commit;

/* Which checkpoints stay: the newest (at least 2), those of every so many steps, and those younger
 * than so many hours (0: none more). */
typedef struct {
  int newest;
  int64_t every;
  double hours;
} moe_keep;

/* "RUN/checkpoints". MOE_USAGE when run_dir is too long. */
moe_status moe_commit_folder(const char *run_dir, char folder[MOE_PATH]);
/* "FOLDER/step-00001234". Returns path. */
const char *moe_commit_place(const char *folder, int64_t step, char path[MOE_PATH]);
/* Name the folders of a save. Each rank names another temporary one: rank 0's counts. MOE_USAGE:
 * too long. */
moe_status moe_commit_plan(const char *run_dir, int64_t step, moe_commit *out);
/* Make the folder of checkpoints and remove what earlier crashes left there. MOE_IO when the disk
 * has not `bytes` free. Before any rank writes. */
moe_status moe_commit_make_room(const moe_commit *c, int64_t bytes);
/* Everything is written and fsynced: give it its name. A checkpoint of the same step is replaced.
 */
moe_status moe_commit_rename(moe_commit *c);
/* Take back whatever was done; what was there before is there again. Leaves the message alone. */
void moe_commit_undo(moe_commit *c);
/* The new checkpoint verified: point `latest` to it, set later steps aside and prune. The
 * checkpoint stands whatever fails here, so failures are warnings. */
void moe_commit_finish(const moe_commit *c, moe_keep keep);

/* MOE_USAGE when the run has checkpoints: saving others into it would set them aside. */
moe_status moe_commit_check_new(const char *run_dir);
/* The steps that have a folder, newest first; malloc'd. A missing folder has none. */
moe_status moe_commit_list(const char *folder, int64_t **steps, int64_t *n);

#ifdef __cplusplus
}
#endif
#endif
