/* Checkpoints: one plain HDF5 file per writing rank and a JSON manifest; complete or absent.
 *
 *   RUN/checkpoints/step-00001234/manifest.json
 *                                /shard-00003-of-00008.h5    /ROLE/NAME[begin]
 *   RUN/checkpoints/latest
 *
 * What is saved is a list of pieces: element ranges of named global tensors. Each rank writes the
 * pieces it is responsible for; any number of ranks loads any ranges. docs/formats.md draws it. */
#ifndef MOE_CHECKPOINT_CHECKPOINT_H
#define MOE_CHECKPOINT_CHECKPOINT_H

#include "core/base/config.h"
#include "parallel/comm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* role: where it lies in the file */
typedef enum {
  MOE_ROLE_PARAM,
  MOE_ROLE_MASTER,
  MOE_ROLE_ADAM_M,
  MOE_ROLE_ADAM_V,
  MOE_ROLES
} moe_role;

/* Elements [begin, begin + count) of the row-major global tensor `name`. data is device memory of
 * the device passed along. To save what was never in memory at once, `fetch` may be set instead: it
 * is asked for elements [begin + at, begin + at + n) in ascending order, to host memory; and where
 * `any_thread` is set, while other threads ask other pieces.
 *
 * Where `low` is set, an f32 tensor is kept in halves (core/base/halves.h): data is bf16, low is
 * low16. They are joined when they are saved and filled both when they are loaded; `fetch` then
 * gives the n halves of the first kind and, after them, those of the second. */
typedef struct moe_piece {
  char name[96];
  moe_role role;
  moe_dtype dtype;
  int dims;
  int64_t shape[2]; /* of the whole tensor */
  int64_t begin, count;
  void *data, *low;
  moe_status (*fetch)(void *context, const struct moe_piece *p, int64_t at, int64_t n, void *out);
  void *context;
  bool any_thread;
} moe_piece;

/* Everything else a run needs to go on. */
typedef struct {
  int64_t step, tokens; /* done */
  int64_t samples;      /* global samples consumed: the data position */
  uint64_t seed, data_fingerprint;
  double loss_scale;
  int64_t loss_scale_good_steps;
  int64_t router_bias_count; /* L * E, or 0 */
  float *router_bias;        /* [L, E], owned by the caller of save; malloc'd by read */
  char *config;              /* INI text as resolved; likewise */
} moe_run_state;
void moe_run_state_clear(moe_run_state *s);

/* Lock RUN for this job: a second job on the same run directory gets MOE_FAILED. Creates the
 * directory. Collective; rank 0 holds the lock. */
typedef struct moe_run_lock moe_run_lock;
moe_status moe_run_lock_take(moe_comm *world, const char *run_dir, moe_run_lock **out);
void moe_run_lock_release(moe_run_lock *l);

/* Collective. Write step-N by the commit protocol and prune to `keep`. On failure the previous
 * checkpoints are intact, leftovers are removed, and every rank gets the same error. bytes, seconds
 * may be NULL. */
moe_status moe_checkpoint_save(moe_comm *world, moe_device *dev, const char *run_dir,
                               const moe_run_state *state, const moe_piece *pieces, int n, int keep,
                               int64_t *bytes, double *seconds);

/* Collective. What `--resume` means: "auto" finds the newest checkpoint of run_dir that verifies
 * (manifest, sizes and every hash), warning about those it skips; "none" none; else a path to a
 * step folder or a run folder. path[] is "" when there is none to resume. MOE_DAMAGED when there
 * are only invalid ones. */
enum { MOE_PATH = 4096 };
moe_status moe_checkpoint_find(moe_comm *world, const char *run_dir, const char *resume,
                               char path[MOE_PATH]);

/* Collective. The same for readers: `place` is a step folder, or a run's folder, of which the
 * newest is taken. Without `verify` only the manifest and the model are looked at, for those who
 * load with verification: should they meet damage, they ask again, with `verify`. MOE_USAGE: there
 * is none. */
moe_status moe_checkpoint_choose(moe_comm *world, const char *place, bool verify,
                                 char path[MOE_PATH]);

/* Collective. Read manifest and state. */
moe_status moe_checkpoint_read_state(moe_comm *world, const char *path, moe_run_state *out);
/* Collective. Fill each piece's data from the files; what is not there whole is MOE_DAMAGED. Types
 * are converted between f32, bf16 and f16 when they differ. `verify` checks the hash of every
 * dataset read. A piece of role MASTER falls back to PARAM when the checkpoint has no masters, and
 * PARAM prefers MASTER when it asks for f32, or for another type than was saved: so what it gets is
 * the master rounded once. */
moe_status moe_checkpoint_load(moe_comm *world, moe_device *dev, const char *path,
                               const moe_piece *pieces, int n, bool verify);
/* Does the checkpoint hold any dataset of this role? Local. */
moe_status moe_checkpoint_has_role(const char *path, moe_role role, bool *out);

#ifdef __cplusplus
}
#endif
#endif
