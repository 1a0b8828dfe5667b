/* A run's state in checkpoints: which pieces an engine saves and loads. */
#ifndef MOE_CORE_TRAIN_RUN_STATE_H
#define MOE_CORE_TRAIN_RUN_STATE_H

#include "checkpoint/checkpoint.h"
#include "core/train/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of weights, masters and moments in one checkpoint. */
int64_t moe_run_state_bytes(const moe_config *config);

/* Collective. Save after `step` steps to config.run.dir. `samples`: global samples consumed. */
moe_status moe_run_save(moe_engine *e, int64_t step, int64_t tokens, int64_t samples,
                        uint64_t data_fingerprint, int64_t *bytes, double *seconds);

/* Collective. Load weights and, when training, optimizer state from the checkpoint at `path`;
 * `state` is its moe_run_state. MOE_USAGE when its configuration contradicts this run's, listing
 * the keys that differ. */
moe_status moe_run_restore(moe_engine *e, const char *path, const moe_run_state *state);

#ifdef __cplusplus
}
#endif
#endif
