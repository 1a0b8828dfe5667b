/* The model: weights, gradients, activations and the passes over them.
 *
 * Set-up runs twice over the same code, first with a measuring moe_memory, then with a committed
 * one (core/base/arena.h): what was measured is the memory plan.
 *
 *   x = embed[tokens];  for each block: x += attention(norm(x)); x += experts(norm(x))
 *   logits = norm(x) lm_head^T
 *
 * The residual stream is carried as (x, delta): a block adds the delta of the one before inside its
 * first norm, so no pass exists only to add. */
#ifndef MOE_CORE_MODEL_MODEL_H
#define MOE_CORE_MODEL_MODEL_H

#include "core/base/arena.h"
#include "core/model/params.h"
#include "data/loader.h"
#include "parallel/dispatch.h"
#include "parallel/pool_gather.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_model moe_model;

typedef struct {
  const moe_config *config; /* resolved; copied */
  moe_device *dev;
  const moe_mesh *mesh;  /* borrowed, like dev */
  int64_t batch, seq;    /* sequences and tokens per sequence of a micro-batch */
  int64_t micro_batches; /* per step: how many micro-batches' router statistics are kept */
  bool training;         /* gradients and stashes for backward */
} moe_model_options;

/* Local. Takes memory from `memory` (measuring or committed). MOE_NO_MEMORY, MOE_INVALID. */
moe_status moe_model_create(const moe_model_options *options, moe_memory *memory, moe_model **out);
void moe_model_destroy(moe_model *m);

/* Set elements [begin, begin + count) of a parameter from host values, rounded to the pool's type.
 * `master` [n] or absent: elements [master_begin, master_begin + n) of the pool, which receives its
 * part: the values in f32, or in low16 what goes with bf16 weights. Local; waits for the device. */
moe_status moe_model_write_param(moe_model *m, const moe_param *p, int64_t begin, int64_t count,
                                 const float *values, moe_tensor master, int64_t master_begin);
/* Draw a pool's initial weights, whatever the ranks (params.h); master as above. Local; queued on
 * the device's stream. */
moe_status moe_model_init_pool(moe_model *m, moe_pool_kind pool, uint64_t seed, moe_tensor master,
                               int64_t master_begin);

const moe_params *moe_model_params(const moe_model *m);
/* Flat pools [padded]: weights in moe_pool_dtype; gradients f32, the experts' by
 * precision.grad_dtype, absent unless training. The experts' gradients are there until the next
 * forward pass: they may lie over what layers keep for backward. */
moe_tensor moe_model_weights(const moe_model *m, moe_pool_kind pool);
moe_tensor moe_model_grads(const moe_model *m, moe_pool_kind pool);
/* f64 [1] on the device: after backward the sum of squares of the experts' gradients. It comes with
 * their making where those are final: one micro-batch to a step, no replicas; or with their sums
 * over replicas (grad_sync.h), of this rank's chunk. Else absent. */
moe_tensor moe_model_grad_squares(const moe_model *m);
/* How the experts' weights come to all replicas after an update; NULL when they need not, or come
 * all at once. A forward pass waits for those of a layer when it gets there. */
moe_pool_gather *moe_model_gather(moe_model *m, moe_pool_kind pool);
/* The gradients of all pools [MOE_POOLS], for moe_grad_sync; backward may have begun to sum them.
 */
moe_grad_pool *moe_model_grad_pools(moe_model *m);
/* Who shares a pool: the world, or the experts' replicas. */
moe_comm *moe_model_pool_group(const moe_model *m, moe_pool_kind pool);
/* Selection bias f32 [L, E] on the host and its upload, for auxiliary-loss-free balancing. */
float *moe_model_router_bias(moe_model *m); /* NULL when off */
moe_status moe_model_router_bias_changed(moe_model *m);

/* ---- one step; all collective ------------------------------------------------------------------
 *   moe_model_step_begin
 *   for i in micro-batches: moe_model_load, moe_model_forward(i), moe_model_backward,
 *                           moe_model_keep_stats(i)
 *   moe_model_step_end, moe_device_sync, moe_model_step_losses
 *
 * Where every rank has all experts begin, forward, backward and end queue the same work in every
 * step, whatever the batch: they can be recorded (kernels/device.h) for a micro-batch that is the
 * first, the last, both or neither, and a grad_scale. */

/* The tokens of the next pass. Local; the batch is not needed any more when this returns. */
moe_status moe_model_load(moe_model *m, const moe_batch *batch);
/* Zero the gradients and the losses. */
moe_status moe_model_step_begin(moe_model *m);
/* Loss of micro-batch `micro`, and the head's gradients. grad_scale multiplies every gradient of
 * this pass: 1 / micro_batches, times the loss scale. The mean is over the tokens of all ranks. */
moe_status moe_model_forward(moe_model *m, int64_t micro, double grad_scale);
/* Backward of the last forward; gradients add up. In the step's last micro-batch, with groups for
 * it (moe_mesh_create_beside), their sums over ranks begin as soon as a layer's are final. */
moe_status moe_model_backward(moe_model *m);
/* Put micro-batch `micro`'s router statistics where the next one's do not overwrite them. Local. */
moe_status moe_model_keep_stats(moe_model *m, int64_t micro);
/* Bring what moe_model_step_losses needs to the host. Local. */
moe_status moe_model_step_end(moe_model *m);

/* A step's losses, over all ranks and micro-batches, on the host. load [L, E] holds each layer's
 * shares (sum 1); counts likewise, in assignments, of this step. */
typedef struct {
  double loss, ce, aux, z; /* aux and z before their coefficients; loss = ce + coefficients * */
  double dropped;          /* assignments dropped by the capacity factor */
  double *load;            /* [L, E], owned by the model */
} moe_losses;
/* After moe_model_step_end, once the device was waited for. Collective. */
moe_status moe_model_step_losses(moe_model *m, moe_losses *out);

/* Forward only. Adds this batch's sum of -log p and number of targets to loss[2] (host, local to
 * the rank). Collective over the expert group. */
moe_status moe_model_evaluate(moe_model *m, const moe_batch *batch, double loss[2]);
/* Forward only; logits f32 [T, V] to host memory. Collective over the expert group. */
moe_status moe_model_logits(moe_model *m, const moe_batch *batch, float *logits);

/* For benchmarks: from now on tokens go to experts in turn, whatever the router says, so that every
 * expert gets as many. Gates are still the router's of the experts it chose. Local; waits. */
moe_status moe_model_force_balance(moe_model *m);

/* Seconds and bytes of expert exchange since the last call. */
void moe_model_exchange_cost(moe_model *m, double *seconds, double *bytes);
const char *moe_model_exchange_name(const moe_model *m);
/* How many layers, the first ones, recompute what train.recompute says (settled, not auto): what is
 * asked for, but where layers share a buffer for their experts' projections the last need not. */
int64_t moe_model_recomputing(const moe_config *c);
/* How many layers recompute what: MOE_RECOMPUTE_NONE to BLOCK. */
void moe_model_recompute(const moe_model *m, int64_t layers[MOE_RECOMPUTE_AUTO]);

#ifdef __cplusplus
}
#endif
#endif
