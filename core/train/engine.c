/* Setting everything up in one place. */
#include "core/train/engine.h"

#include <sched.h>
#include <string.h>
#include <unistd.h>

#include "core/base/log.h"
#include "core/base/process_memory.h"
#include "core/base/startup.h"
#include "core/train/matrix_rate.h"
#include "core/train/memory_plan.h"
#include "kernels/ops.h"

/* This rank's share of the cores it may run on; mpirun binds ranks to cores unless told not to. */
static int64_t own_threads(void) {
  int local = moe_comm_local_size();
  int64_t cores = sysconf(_SC_NPROCESSORS_ONLN), allowed = cores;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) allowed = CPU_COUNT(&set);
  int64_t share = cores / local > 1 ? cores / local : 1;
  if (allowed < share) {
    moe_info("each rank is bound to %lld of %lld cores: mpirun --bind-to none lets it use %lld",
             (long long)allowed, (long long)cores, (long long)share);
  }
  return allowed < share ? allowed : share;
}

moe_status moe_engine_open_device(const moe_config *config, moe_device **out) {
  moe_device_options options = {
      .kind = (moe_device_kind)config->run.backend,
      .local_rank = moe_comm_local_rank(),
      .threads = (int)(config->run.threads > 0 ? config->run.threads : own_threads()),
      .deterministic = config->run.deterministic,
      .tf32 = config->precision.tf32,
      .debug = config->run.debug};
  moe_status status = moe_device_open(&options, out);
  moe_startup_done("device");
  return status;
}

/* Model and optimizer over e->memory, measuring or committed. */
static moe_status set_up(moe_engine *e, bool training) {
  moe_model_options options = {.config = &e->config,
                               .dev = e->dev,
                               .mesh = &e->mesh,
                               .batch = e->config.train.micro_batch,
                               .seq = e->config.data.sequence_length,
                               .micro_batches = e->accumulation,
                               .training = training};
  MOE_TRY(moe_model_create(&options, &e->memory, &e->model));
  if (!training) return MOE_OK;
  return moe_optimizer_create(&e->config, e->dev, &e->mesh, e->model, &e->memory, &e->optimizer);
}

static void tear_down(moe_engine *e) {
  moe_optimizer_destroy(e->optimizer);
  moe_model_destroy(e->model);
  e->optimizer = NULL;
  e->model = NULL;
}

static moe_status measure(moe_engine *e, bool training) {
  moe_memory_measure(&e->memory);
  moe_status status = set_up(e, training);
  tear_down(e);
  return status;
}

int64_t moe_engine_planned_bytes(const moe_engine *e) {
  return e->program_bytes + moe_memory_total(&e->memory);
}

static int64_t budget_bytes(moe_engine *e) {
  double gib = e->config.run.memory_gib;
  if (gib > 0.0) return (int64_t)(gib * 1073741824.0);
  return moe_device_free_bytes(e->dev);
}

static moe_status measure_fits(moe_engine *e, int64_t budget, bool *fits) {
  MOE_TRY(measure(e, true));
  int64_t largest = moe_engine_planned_bytes(e);
  MOE_TRY(moe_comm_host_all_reduce_i64(e->world, &largest, 1, MOE_MAX));
  *fits = largest <= budget;
  return MOE_OK;
}

/* The fewest layers in which train.recompute suffices; all of them where it does not. */
static moe_status settle_layers(moe_engine *e, int64_t budget, bool *fits) {
  int64_t *layers = &e->config.train.recompute_layers, low = 1, high = e->config.model.num_layers;
  *layers = high;
  MOE_TRY(measure_fits(e, budget, fits));
  while (*fits && low < high) { /* `high` layers do */
    bool enough = false;
    *layers = low + (high - low) / 2;
    MOE_TRY(measure_fits(e, budget, &enough));
    *(enough ? &high : &low) = enough ? *layers : *layers + 1;
  }
  *layers = high;
  return MOE_OK;
}

/* recompute = auto: the cheapest choice that fits every rank. One more layer of a mode is cheaper
 * than the first of the next, so all of one come before the next. */
static moe_status settle_recompute(moe_engine *e, int64_t budget, bool *fits) {
  e->config.train.recompute = MOE_RECOMPUTE_NONE;
  e->config.train.recompute_layers = 0;
  MOE_TRY(measure_fits(e, budget, fits));
  for (int mode = MOE_RECOMPUTE_SWIGLU; !*fits && mode <= MOE_RECOMPUTE_BLOCK; mode++) {
    e->config.train.recompute = mode;
    MOE_TRY(settle_layers(e, budget, fits));
  }
  return MOE_OK; /* the check that follows says what does not fit */
}

/* What the configuration leaves to the plan. Recomputation costs time and no accuracy, so the
 * experts' gradients become bf16 only when it does not suffice, and their moments after that. */
static moe_status settle(moe_engine *e, int64_t budget) {
  moe_config *c = &e->config;
  bool recompute = c->train.recompute == MOE_RECOMPUTE_AUTO, fits = false;
  bool grads = c->precision.grad_dtype == MOE_STATE_AUTO &&
               moe_config_allows_bf16_grads(c, moe_comm_size(e->world));
  bool moments = c->precision.moment_dtype == MOE_STATE_AUTO;
  if (c->precision.grad_dtype == MOE_STATE_AUTO) c->precision.grad_dtype = MOE_STATE_FP32;
  if (moments) c->precision.moment_dtype = MOE_STATE_FP32;
  while (recompute || grads || moments) {
    MOE_TRY(recompute ? settle_recompute(e, budget, &fits) : measure_fits(e, budget, &fits));
    if (fits || !(grads || moments)) return MOE_OK;
    *(grads ? &c->precision.grad_dtype : &c->precision.moment_dtype) = MOE_STATE_BF16;
    *(grads ? &grads : &moments) = false;
  }
  return MOE_OK;
}

static moe_status check_budget(const moe_engine *e, int64_t budget) {
  moe_memory_plan p = moe_memory_plan_of(&e->memory, e->program_bytes);
  return moe_memory_plan_check(
      &p, budget,
      "lower train.micro_batch or data.sequence_length, set train.recompute = auto, "
      "parallel.zero1 = true, precision.grad_dtype or moment_dtype = auto, or use more ranks");
}

static moe_status plan(moe_engine *e, bool training) {
  int64_t budget = budget_bytes(e);
  MOE_TRY(moe_comm_host_all_reduce_i64(e->world, &budget, 1, MOE_MIN));
  if (training) MOE_TRY(settle(e, budget));
  MOE_TRY(measure(e, training));
  return moe_agree(e->world, check_budget(e, budget));
}

/* Resident bytes before any arena, once the matrix library holds the buffers it keeps. */
static moe_status measure_program(moe_engine *e) {
  double tflops;
  if (!moe_device_is_host(e->dev)) return MOE_OK;
  MOE_TRY(moe_matrix_rate(e->dev, 256, MOE_F32, &tflops));
  e->program_bytes = moe_process_resident();
  return MOE_OK;
}

/* The group between whose ranks an arena's tensors travel; NULL: what travels, if anything, need
 * not be where the others can reach it. */
static moe_comm *travels_in(const moe_engine *e, int purpose) {
  bool sharded =
      purpose == MOE_MEM_WEIGHTS || purpose == MOE_MEM_GRADIENTS || purpose == MOE_MEM_OVERLAID;
  if (sharded && e->config.parallel.zero1) return e->mesh.replicas_beside;
  return purpose == MOE_MEM_EXCHANGE ? e->mesh.experts : NULL;
}

/* The arenas, and what travels between ranks where the others can reach it. Collective. */
static moe_status take_memory(moe_engine *e) {
  moe_arena *arena = e->memory.arena;
  for (int i = 0; i < MOE_MEM_PURPOSES; i++)
    if (travels_in(e, i) && arena[i].used > 0)
      arena[i].base = moe_comm_alloc(travels_in(e, i), arena[i].used);
  MOE_TRY(moe_agree(e->world, moe_memory_commit(&e->memory, moe_device_alloc, e->dev)));
  moe_status status = MOE_OK;
  for (int i = 0; i < MOE_MEM_PURPOSES && status == MOE_OK; i++)
    if (travels_in(e, i) && arena[i].size > 0)
      status = moe_comm_share(travels_in(e, i), arena[i].base, arena[i].size);
  return moe_agree(e->world, status);
}

/* Host memory is only promised until it is written: have it now, not in the middle of a step. */
static moe_status touch_memory(moe_engine *e) {
  for (int i = 0; i < MOE_MEM_PURPOSES && moe_device_is_host(e->dev); i++) {
    const moe_arena *a = &e->memory.arena[i];
    if (a->base) MOE_TRY(moe_zero(e->dev, moe_tensor_1d(a->base, MOE_F32, a->size / 4)));
  }
  return MOE_OK;
}

static moe_status create(moe_engine *e, bool training, bool plan_only) {
  const moe_config *c = &e->config;
  MOE_TRY(moe_comm_world(e->dev, &e->world));
  MOE_TRY(moe_mesh_create(e->world, (int)c->parallel.ep, c->model.num_experts, &e->mesh));
  if (training && e->mesh.edp > 1) MOE_TRY(moe_mesh_create_beside(&e->mesh, c->parallel.zero1));
  int64_t per_pass = c->train.micro_batch * moe_comm_size(e->world);
  e->accumulation = training && c->train.global_batch > 0 ? c->train.global_batch / per_pass : 1;
  e->loss_scale = c->precision.dtype == MOE_PRECISION_FP16 ? c->precision.loss_scale : 1.0;
  e->records = c->run.graphs;
  MOE_TRY(measure_program(e));
  moe_startup_done("ranks");
  MOE_TRY(plan(e, training));
  moe_startup_done("plan");
  if (plan_only) return MOE_OK;
  MOE_TRY(take_memory(e));
  MOE_TRY(touch_memory(e));
  moe_startup_done("memory");
  enum { PER_MICRO_BATCH = 3, AT_THE_END = 2 };
  int64_t laps = e->accumulation * PER_MICRO_BATCH + AT_THE_END;
  MOE_TRY(moe_agree(e->world, moe_step_clock_create(e->dev, laps, &e->clock)));
  moe_status status = moe_agree(e->world, set_up(e, training));
  moe_startup_done("model");
  return status;
}

moe_status moe_engine_create(const moe_config *config, moe_device *dev, bool training,
                             bool plan_only, moe_engine *out) {
  memset(out, 0, sizeof *out);
  out->config = *config;
  out->dev = dev;
  moe_status status = create(out, training, plan_only);
  if (status != MOE_OK) moe_engine_destroy(out);
  return status;
}

void moe_engine_destroy(moe_engine *e) {
  moe_step_clock_destroy(&e->clock);
  for (int i = 0; i < 4; i++) moe_graph_destroy(e->dev, e->recorded[i / 2][i % 2].graph);
  tear_down(e);
  for (int i = 0; i < MOE_MEM_PURPOSES; i++) {
    if (travels_in(e, i))
      moe_comm_free(travels_in(e, i), e->memory.arena[i].base);
    else
      moe_device_free(e->dev, e->memory.arena[i].base);
  }
  moe_mesh_destroy(&e->mesh);
  moe_comm_destroy(e->world);
  memset(e, 0, sizeof *e);
}
