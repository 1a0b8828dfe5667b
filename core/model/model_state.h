/* The model's insides, shared by model.c (the passes) and model_setup.c. Private to core/model. */
#ifndef MOE_CORE_MODEL_MODEL_STATE_H
#define MOE_CORE_MODEL_MODEL_STATE_H

#include "core/model/block.h"
#include "core/model/head.h"

enum { MOE_STAGED = 2 };

struct moe_model {
  moe_config config;
  moe_model_options options;
  moe_params params;
  moe_block_env env;
  moe_head head;
  moe_tensor weights[MOE_POOLS], grads[MOE_POOLS];
  moe_grad_pool sums[MOE_POOLS]; /* of grads over ranks */
  moe_pool_gather gather;        /* of the experts' weights, when they are sharded with staging */
  moe_tensor embed, dembed;      /* [V, D] */
  moe_block *blocks;             /* [L] */
  moe_stash *stashes;            /* [stash_count], at most L: layers may share one */
  int stash_count;
  moe_tensor stats; /* f32 [micro_batches, L * (groups (2E + 1) + 1)]; made in the last row */
  moe_tensor loss;  /* f64 [2]: sum, count */
  /* Pinned host memory. staged: batches on their way, [MOE_STAGED, 4, T]. */
  float *stats_host;
  double *loss_host;
  int32_t *staged;
  moe_mark uploaded[MOE_STAGED]; /* when staged may be written over */
  int64_t loads;                 /* batches so far */
  moe_tensor bias;               /* f32 [L, E] */
  float *bias_host;
  double *load; /* [L, E] */
  float aux_scale, z_scale;
  int64_t micro; /* being done */
};

/* Floats of router statistics per layer and micro-batch, without the dropped count. */
int64_t moe_model_stats_width(const moe_model *m);

/* Pools, stashes and what blocks keep (layout.c), once sizes and statistics are there. Local. */
moe_status moe_model_lay_out(moe_model *m, moe_memory *memory);
/* Layer l's experts: elements of their pool. */
moe_range moe_model_experts_of(const moe_model *m, int64_t l);

#endif
