/* What saves in the background need of a host's memory, and get. */
#ifndef MOE_CORE_TRAIN_SAVE_PLAN_H
#define MOE_CORE_TRAIN_SAVE_PLAN_H

#include "core/train/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t part;   /* bytes this rank saves, at most */
  int64_t memory; /* host memory to copy them to; 0 (on all ranks): training waits for each save */
} moe_save_plan;

/* Collective. As much as checkpoint.async and checkpoint.snapshot_gib ask for and the host's memory
 * allows beside the engine's plan. MOE_NO_MEMORY when async = on cannot have it all. */
moe_status moe_save_plan_make(moe_engine *e, moe_save_plan *out);
/* For people: the plan's lines on checkpoints; rank 0's part. Local. */
void moe_save_plan_print(const moe_save_plan *plan, FILE *out);

#ifdef __cplusplus
}
#endif
#endif
