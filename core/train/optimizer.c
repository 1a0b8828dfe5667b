/* AdamW over the pools. */
#include "core/train/optimizer.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/ops.h"
#include "parallel/grad_sync.h"

struct moe_optimizer {
  moe_config config;
  moe_device *dev;
  const moe_mesh *mesh;
  moe_model *model;
  moe_optimizer_pool pool[MOE_POOLS];
  moe_tensor sum_squares; /* f64 [1] */
  moe_tensor scale;       /* f32 [1] */
};

/* The part of a pool this rank updates. */
static moe_range owned_range(const moe_optimizer *o, moe_pool_kind pool) {
  int64_t n = moe_model_weights(o->model, pool).shape[0];
  moe_comm *group = moe_model_pool_group(o->model, pool);
  if (!o->config.parallel.zero1) return (moe_range){0, n};
  return moe_pool_chunk(n, moe_comm_size(group), moe_comm_rank(group));
}

moe_status moe_optimizer_create(const moe_config *config, moe_device *dev, const moe_mesh *mesh,
                                moe_model *model, moe_memory *memory, moe_optimizer **out) {
  moe_optimizer *o = calloc(1, sizeof *o);
  *out = o;
  if (!o) return moe_fail(MOE_NO_MEMORY, "out of memory: optimizer");
  o->config = *config;
  o->dev = dev;
  o->mesh = mesh;
  o->model = model;
  for (int i = 0; i < MOE_POOLS; i++) {
    moe_pool_kind kind = (moe_pool_kind)i;
    moe_optimizer_pool *p = &o->pool[i];
    p->owned = owned_range(o, kind);
    int64_t n = moe_range_size(p->owned);
    bool master = moe_model_weights(model, kind).dtype != MOE_F32;
    if (master) p->master = moe_arena_tensor_1d(&memory->arena[MOE_MEM_MASTER], MOE_F32, n);
    p->m = moe_arena_tensor_1d(&memory->arena[MOE_MEM_MOMENTS], MOE_F32, n);
    p->v = moe_arena_tensor_1d(&memory->arena[MOE_MEM_MOMENTS], MOE_F32, n);
  }
  o->sum_squares = moe_arena_tensor_1d(&memory->arena[MOE_MEM_WORK], MOE_F64, 1);
  o->scale = moe_arena_tensor_1d(&memory->arena[MOE_MEM_WORK], MOE_F32, 1);
  return MOE_OK;
}

void moe_optimizer_destroy(moe_optimizer *o) {
  free(o);
}

const moe_optimizer_pool *moe_optimizer_pool_state(const moe_optimizer *o, moe_pool_kind pool) {
  return &o->pool[pool];
}

moe_status moe_optimizer_init_weights(moe_optimizer *o, uint64_t seed) {
  for (int i = 0; i < MOE_POOLS; i++) {
    const moe_optimizer_pool *p = &o->pool[i];
    MOE_TRY(moe_model_init_pool(o->model, (moe_pool_kind)i, seed, p->master, p->owned.begin));
  }
  return MOE_OK;
}

moe_status moe_optimizer_reduce(moe_optimizer *o) {
  moe_grad_pool pools[MOE_POOLS];
  for (int i = 0; i < MOE_POOLS; i++) {
    moe_pool_kind kind = (moe_pool_kind)i;
    pools[i] = (moe_grad_pool){.grads = moe_model_grads(o->model, kind),
                               .group = moe_model_pool_group(o->model, kind),
                               .shard = o->config.parallel.zero1};
  }
  moe_device_label(o->dev, "gradient reduction", -1);
  return moe_grad_sync(o->dev, o->mesh->world, pools, MOE_POOLS, o->sum_squares);
}

static moe_status update_pool(moe_optimizer *o, moe_pool_kind kind, moe_adamw_args args) {
  const moe_optimizer_pool *p = &o->pool[kind];
  int64_t n = moe_range_size(p->owned);
  moe_tensor pool = moe_model_weights(o->model, kind);
  moe_tensor weights = moe_tensor_rows(pool, p->owned.begin, n);
  moe_tensor grads = moe_tensor_rows(moe_model_grads(o->model, kind), p->owned.begin, n);
  bool master = moe_tensor_present(p->master);
  if (!moe_pool_decays(kind)) args.weight_decay = 0.0;
  MOE_TRY(moe_adamw(o->dev, args, grads, o->scale, master ? p->master : weights, p->m, p->v,
                    master ? weights : moe_tensor_none()));
  if (!o->config.parallel.zero1) return MOE_OK;
  return moe_comm_all_gather(moe_model_pool_group(o->model, kind), pool);
}

moe_status moe_optimizer_step(moe_optimizer *o, double lr, int64_t step, double unscale) {
  moe_adamw_args args = {.lr = lr,
                         .beta1 = o->config.optim.beta1,
                         .beta2 = o->config.optim.beta2,
                         .eps = o->config.optim.eps,
                         .weight_decay = o->config.optim.weight_decay,
                         .step = step};
  moe_device_label(o->dev, "optimizer", -1);
  MOE_TRY(moe_clip_scale(o->dev, o->sum_squares, o->config.optim.clip, unscale, o->scale));
  for (int i = 0; i < MOE_POOLS; i++) MOE_TRY(update_pool(o, (moe_pool_kind)i, args));
  return MOE_OK;
}

moe_status moe_optimizer_norm(moe_optimizer *o, double unscale, double *norm) {
  double sum = 0.0;
  MOE_TRY(moe_device_download(o->dev, &sum, o->sum_squares.data, (int64_t)sizeof sum));
  MOE_TRY(moe_device_sync(o->dev));
  *norm = sqrt(sum) * unscale;
  return MOE_OK;
}
