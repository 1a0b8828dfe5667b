/* The engine: device, ranks, memory, model and optimizer, set up together from one configuration.
 *
 * Creating it plans first (core/base/arena.h): set-up runs on measuring arenas, what the
 * configuration leaves to the plan (`auto`) is settled, then the memory is taken and set-up runs
 * again. Whoever holds an engine drives the step; the trainer and the golden check do so in the
 * same words. */
#ifndef MOE_CORE_TRAIN_ENGINE_H
#define MOE_CORE_TRAIN_ENGINE_H

#include "core/train/optimizer.h"
#include "core/train/step_clock.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  moe_config config; /* resolved; recompute, grad_dtype and moment_dtype settled */
  moe_device *dev;
  moe_comm *world;
  moe_mesh mesh;
  moe_memory memory;
  int64_t program_bytes; /* resident before any of it: program, libraries, MPI; 0 on a GPU */
  moe_model *model;
  moe_optimizer *optimizer; /* NULL in an engine for evaluation only */
  int64_t accumulation;     /* micro-batches per step */
  double loss_scale;        /* fp16; else 1 */
  int64_t good_steps;       /* fp16: finite steps since the scale changed */
  moe_step_clock clock;     /* of the current step */
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

/* Sum gradients, update the weights, and tell the losses and the gradient norm of the step that
 * moe_model_step_begin began. finite is false when the update was skipped. Collective. */
typedef struct {
  moe_losses losses;
  double grad_norm;
  bool finite;
} moe_step_result;
moe_status moe_engine_finish_step(moe_engine *e, double lr, int64_t step, moe_step_result *out);
/* The factor of moe_model_forward: 1 / micro-batches, times the loss scale. */
double moe_engine_grad_scale(const moe_engine *e);
/* Bytes the plan holds on this rank: all arenas, and on a CPU the program itself. Local. */
int64_t moe_engine_planned_bytes(const moe_engine *e);

/* The plan for people: parameters, who owns what, memory by purpose, checkpoint size, FLOPs.
 * Collective (it looks for the fullest rank); rank 0 prints. */
moe_status moe_engine_print_plan(moe_engine *e, FILE *out);

#ifdef __cplusplus
}
#endif
#endif
