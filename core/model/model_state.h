/* The model's insides, shared by model.c (the passes) and model_setup.c. Private to core/model. */
#ifndef MOE_CORE_MODEL_MODEL_STATE_H
#define MOE_CORE_MODEL_MODEL_STATE_H

#include "core/model/block.h"
#include "core/model/head.h"

/* A pass over a micro-batch, recorded as a device graph once it has run as it is. */
typedef struct {
  moe_graph *graph;  /* NULL: not yet */
  bool warm;         /* has run */
  double grad_scale; /* what was recorded with it */
} moe_recorded;

struct moe_model {
  moe_config config;
  moe_model_options options;
  moe_params params;
  moe_block_env env;
  moe_head head;
  moe_tensor weights[MOE_POOLS], grads[MOE_POOLS];
  moe_grad_pool sums[MOE_POOLS]; /* of grads over ranks */
  moe_tensor embed, dembed;      /* [V, D] */
  moe_block *blocks;             /* [L] */
  moe_stash *stashes;            /* [stash_count], at most L: layers may share one */
  int stash_count;
  moe_tensor
      stats; /* f32 [micro_batches + 1, L * (groups (2E + 1) + 1)]; the last row is being made */
  float *stats_host;
  moe_tensor loss; /* f64 [2]: sum, count */
  moe_tensor bias; /* f32 [L, E] */
  float *bias_host;
  double *load; /* [L, E] */
  float aux_scale, z_scale;
  double grad_scale;                 /* of the micro-batch being done */
  bool records;                      /* passes are recorded and launched as graphs */
  moe_recorded forward, backward[2]; /* backward: of the first micro-batch, of others */
  int64_t micros_done;
};

/* Floats of router statistics per layer and micro-batch, without the dropped count. */
int64_t moe_model_stats_width(const moe_model *m);

#endif
