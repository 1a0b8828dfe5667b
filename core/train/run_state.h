/* A run's state in checkpoints: which pieces an engine saves and loads. */
#ifndef MOE_CORE_TRAIN_RUN_STATE_H
#define MOE_CORE_TRAIN_RUN_STATE_H

#include "checkpoint/saver.h"
#include "core/train/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of weight, master and moments that a checkpoint holds for one parameter of a pool. */
int64_t moe_run_state_parameter_bytes(const moe_config *config, moe_pool_kind pool);
/* Bytes of weights, masters and moments in one checkpoint. */
int64_t moe_run_state_bytes(const moe_config *config);

/* Where a run is. */
typedef struct {
  int64_t step, tokens; /* done */
  int64_t samples;      /* global samples consumed */
  uint64_t data_fingerprint;
} moe_run_position;

/* Collective. Begin to save the engine's state at this position. Errors and what follows:
 * moe_saver_begin. */
moe_status moe_run_save(moe_engine *e, moe_saver *saver, const moe_run_position *at);

/* Collective. Load weights and, when training, optimizer state from the checkpoint at `path`;
 * `state` is its moe_run_state. MOE_USAGE when its configuration contradicts this run's, listing
 * the keys that differ. */
moe_status moe_run_restore(moe_engine *e, const char *path, const moe_run_state *state);

#ifdef __cplusplus
}
#endif
#endif
