/* One training step.
 *
 *   moe_step_begin(e, lr, step);
 *   for each of e->accumulation micro-batches: moe_step_micro_batch(e, &batch);
 *   moe_step_end(e, &result);
 *
 * On GPUs that each hold all experts (one, or parallel.ep = 1) a micro-batch is recorded as a
 * device graph (kernels/device.h) once a step has run as it is, and launched from then on. The
 * first micro-batch also begins the step and the last one sums the gradients and ends it, so
 * without accumulation one graph holds the whole step; only an update whose weights travel beside
 * the next step's forward pass (parallel/pool_gather.h) follows its graph as it is. Experts shared
 * out over ranks, CPUs, run.debug, run.graphs = false and timed operations (kernels/profile.h)
 * queue each operation anew. */
#ifndef MOE_CORE_TRAIN_STEP_H
#define MOE_CORE_TRAIN_STEP_H

#include "core/train/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  moe_losses losses;
  double grad_norm;
  bool finite; /* false: the update was skipped */
} moe_step_result;

/* Begin step number `step` = 1, 2, ..., which updates at rate lr. The step before has ended. Local.
 */
moe_status moe_step_begin(moe_engine *e, double lr, int64_t step);
/* Queue the passes over the next micro-batch, which is not needed any more afterwards; with the
 * last one the gradients' sums and the update of the weights too. Collective. */
moe_status moe_step_micro_batch(moe_engine *e, const moe_batch *batch);
/* Wait for the step and tell what it came to. Collective. */
moe_status moe_step_end(moe_engine *e, moe_step_result *out);

#ifdef __cplusplus
}
#endif
#endif
