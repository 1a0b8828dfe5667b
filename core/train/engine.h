/* The engine: device, ranks, memory, model and optimizer, set up together from one configuration.
 *
 * Creating it plans first (core/base/arena.h): set-up runs on measuring arenas, what the
 * configuration leaves to the plan (`auto`) is settled, then the memory is taken and set-up runs
 * again. Whoever holds an engine drives its steps (step.h); the trainer and the golden check do so
 * in the same words. */
#ifndef MOE_CORE_TRAIN_ENGINE_H
#define MOE_CORE_TRAIN_ENGINE_H

#include "core/train/optimizer.h"
#include "core/train/step_clock.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What step.c queues for a micro-batch, as a device graph. */
typedef struct {
  moe_graph *graph;        /* NULL: not yet */
  double loss_scale;       /* what was recorded with it */
  int64_t first_lap, laps; /* of the clock */
} moe_recorded;

typedef struct {
  moe_config config; /* resolved; recompute, grad_dtype and moment_dtype settled */
  moe_device *dev;
  moe_comm *world;
  moe_mesh mesh;
  moe_memory memory;
  int64_t program_bytes; /* resident before any of it: program, libraries, MPI; 0 on a GPU */
  moe_model *model;
  moe_optimizer *optimizer;    /* NULL in an engine for evaluation only */
  int64_t accumulation;        /* micro-batches per step */
  double loss_scale;           /* fp16; else 1 */
  int64_t good_steps;          /* fp16: finite steps since the scale changed */
  moe_step_clock clock;        /* of the current step */
  int64_t micro;               /* micro-batches of it that are queued */
  bool records, warm;          /* micro-batches are recorded, once a step was run as it is */
  moe_recorded recorded[2][2]; /* [not the step's first][its last] */
} moe_engine;

/* Open the device of `config` for this process: its node-local rank, its share of the cores. */
moe_status moe_engine_open_device(const moe_config *config, moe_device **out);

/* Collective over all ranks. config is resolved for the world's size; dev is borrowed. With
 * plan_only no large memory is taken: memory holds the measured sizes and model and optimizer are
 * absent. MOE_NO_MEMORY when the plan exceeds run.memory_gib or the device's free memory, with
 * the plan's largest parts. */
moe_status moe_engine_create(const moe_config *config, moe_device *dev, bool training,
                             bool plan_only, moe_engine *out);
void moe_engine_destroy(moe_engine *e);

/* Bytes the plan holds on this rank: all arenas, and on a CPU the program itself. Local. */
int64_t moe_engine_planned_bytes(const moe_engine *e);

/* The plan for people: parameters, who owns what, memory by purpose, checkpoint size, FLOPs.
 * Collective (it looks for the fullest rank); rank 0 prints. */
moe_status moe_engine_print_plan(moe_engine *e, FILE *out);

#ifdef __cplusplus
}
#endif
#endif
