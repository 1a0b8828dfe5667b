/* Inference: a checkpoint's model, ready to generate, on any number of ranks.
 *
 * As in the engine, set-up measures first (core/base/arena.h): what --dry-run prints is what a run
 * takes. There are no gradients and no optimizer; experts are shared out over all ranks, whatever
 * parallel.ep was in training. */
#ifndef MOE_CORE_TRAIN_INFERENCE_H
#define MOE_CORE_TRAIN_INFERENCE_H

#include <stdio.h>

#include "checkpoint/checkpoint.h"
#include "core/model/generate.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  moe_config config;   /* the checkpoint's, resolved; may be changed between find and create */
  const char *place;   /* as asked for; borrowed */
  char path[MOE_PATH]; /* the step folder */
  moe_run_state state; /* what it says besides weights */
  int64_t chunk;       /* tokens per pass, as settled */
  moe_comm *host;      /* of find; borrowed */
  moe_device *dev;     /* its own */
  moe_comm *world;     /* tensors of dev */
  moe_mesh mesh;       /* ep = all ranks */
  moe_memory memory;
  int64_t program_bytes;    /* resident before any of it; 0 on a GPU */
  int64_t free_bytes;       /* of the GPU before any of it */
  moe_generator *generator; /* NULL when only planned */
} moe_inference;

/* Collective over `world` (host values). Take a step folder, or the newest of a run's folder, and
 * read its configuration; settings of that run's machine (backend, threads, memory) return to their
 * defaults. `place` must stay. MOE_USAGE when there is none, MOE_DAMAGED. The caller destroys *out
 * in any case. */
moe_status moe_inference_find(moe_comm *world, const char *place, moe_inference *out);

typedef struct {
  int64_t batch, room, chunk; /* moe_generator_options; chunk 0: what suits the device */
  moe_sample_args sample;
  bool eager;
  bool plan_only; /* measure, take nothing */
} moe_inference_options;

/* Collective. Open the device of config, plan, take the memory and load the weights: read once, and
 * verified on the way. When the newest checkpoint of a run proves damaged then, the newest of the
 * same model that verifies is taken, with warnings. MOE_NO_MEMORY when the plan exceeds what may be
 * used, with its largest part; MOE_USAGE for more ranks than experts. */
moe_status moe_inference_create(moe_inference *f, const moe_inference_options *options);
/* Collective. Rank 0 prints the plan of the fullest rank. */
moe_status moe_inference_print_plan(const moe_inference *f, FILE *out);
/* Bytes planned on this rank, and what it came to hold: the process's most on a host, what the GPU
 * has less than before, which counts the programs and graphs too. Local. */
int64_t moe_inference_planned_bytes(const moe_inference *f);
int64_t moe_inference_held_bytes(const moe_inference *f);
void moe_inference_destroy(moe_inference *f);

#ifdef __cplusplus
}
#endif
#endif
