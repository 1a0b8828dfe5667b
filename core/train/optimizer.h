/* The optimizer: AdamW over the model's pools, with the gradients' norm clipped globally.
 *
 * A pool's state (masters when the weights are not f32, moments m and v) covers the whole pool, or
 * with zero1 only this rank's chunk of it; then the updated weights are gathered.
 *
 * bf16 moments are rounded by random bits (kernels/ops.h, moe_adamw). An element's number there is
 * its place in the whole model's pool, so how experts are shared out does not change its bits. */
#ifndef MOE_CORE_TRAIN_OPTIMIZER_H
#define MOE_CORE_TRAIN_OPTIMIZER_H

#include "core/model/model.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_optimizer moe_optimizer;

/* One pool's optimizer state: elements [owned.begin, owned.end) of the pool. */
typedef struct {
  moe_range owned;
  moe_tensor master; /* [owned]; as moe_adamw wants it: low16 beside bf16 weights, f32 beside f16 */
  moe_tensor m, v;   /* [owned]; f32, the experts' by precision.moment_dtype */
} moe_optimizer_pool;

/* Local. Takes memory (MASTER, MOMENTS) like moe_model_create; model and dev are borrowed. */
moe_status moe_optimizer_create(const moe_config *config, moe_device *dev, const moe_mesh *mesh,
                                moe_model *model, moe_memory *memory, moe_optimizer **out);
void moe_optimizer_destroy(moe_optimizer *o);
/* Initial weights of the model and their masters. Local. */
moe_status moe_optimizer_init_weights(moe_optimizer *o, uint64_t seed);

/* The learning rate and the number, from 1, of the next moe_optimizer_step, which reads them when
 * the device gets there: the step before must be over. Local. */
moe_status moe_optimizer_set(moe_optimizer *o, double lr, int64_t step);
/* Collective: sum the gradients over the ranks that share them. */
moe_status moe_optimizer_reduce(moe_optimizer *o);
/* Collective with zero1, where the experts' weights of other ranks may arrive later: when a forward
 * pass needs them (moe_model_gather). One update; unscale undoes the loss scale. Does nothing when
 * a gradient was not finite. Only queues, and the same every time: it can be recorded
 * (kernels/device.h). */
moe_status moe_optimizer_step(moe_optimizer *o, double unscale);
/* After moe_optimizer_step, once the device was waited for: the gradients' norm before clipping;
 * not finite when a gradient was not. Local. */
double moe_optimizer_norm(const moe_optimizer *o, double unscale);

const moe_optimizer_pool *moe_optimizer_pool_state(const moe_optimizer *o, moe_pool_kind pool);

#ifdef __cplusplus
}
#endif
#endif
