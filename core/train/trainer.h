/* The trainer: the main job. */
#ifndef MOE_CORE_TRAIN_TRAINER_H
#define MOE_CORE_TRAIN_TRAINER_H

#include "core/train/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Collective. Train as `config` (resolved) says. resume: "auto", "none" or a path.
 * MOE_STOPPED after a save on request (TERM, INT or USR2 on any rank) or at run.wall_clock_limit,
 * MOE_DIVERGED after train.nonfinite_limit non-finite steps in a row. A rank that hangs ends the
 * whole job with MOE_HUNG's exit code. dev is borrowed. */
moe_status moe_train(const moe_config *config, moe_device *dev, const char *resume);

#ifdef __cplusplus
}
#endif
#endif
