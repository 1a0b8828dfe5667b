/* AdamW over the pools. */
#include "core/train/optimizer.h"

#include <math.h>
#include <stdlib.h>

#include "core/base/startup.h"
#include "kernels/lanes.h"
#include "kernels/ops.h"
#include "parallel/grad_sync.h"

struct moe_optimizer {
  moe_config config;
  moe_device *dev;
  const moe_mesh *mesh;
  moe_model *model;
  moe_optimizer_pool pool[MOE_POOLS];
  moe_params whole;       /* with bf16 moments: all experts, for the elements' numbers */
  moe_tensor sum_squares; /* f64 [1]; the model's where it adds the experts' gradients itself */
  moe_tensor scale;       /* f32 [1] */
  bool gathers;           /* with zero1: weights of whole pools travel, */
  moe_mark gathered;      /* and from here on are everyone's */
  moe_tensor now;         /* f64 [MOE_ADAMW_NUMBERS], uploaded by each step */
  struct {
    double now[MOE_ADAMW_NUMBERS], sum_squares;
  } * host; /* pinned; NULL while measuring */
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
  moe_dtype moments = moe_config_moment_dtype(config);
  if (moments != MOE_F32) {
    moe_dims d = moe_dims_of(config);
    MOE_TRY(moe_params_create(&d, (moe_range){0, d.experts}, &o->whole));
  }
  for (int i = 0; i < MOE_POOLS; i++) {
    moe_pool_kind kind = (moe_pool_kind)i;
    moe_optimizer_pool *p = &o->pool[i];
    p->owned = owned_range(o, kind);
    int64_t n = moe_range_size(p->owned);
    moe_dtype weight = moe_model_weights(model, kind).dtype;
    moe_dtype master = weight == MOE_BF16 ? MOE_LOW16 : MOE_F32;
    if (weight != MOE_F32)
      p->master = moe_arena_tensor_1d(&memory->arena[MOE_MEM_MASTER], master, n);
    moe_dtype type = kind == MOE_POOL_EXPERT ? moments : MOE_F32;
    p->m = moe_arena_tensor_1d(&memory->arena[MOE_MEM_MOMENTS], type, n);
    p->v = moe_arena_tensor_1d(&memory->arena[MOE_MEM_MOMENTS], type, n);
  }
  o->sum_squares = moe_model_grad_squares(model);
  if (!moe_tensor_present(o->sum_squares))
    o->sum_squares = moe_arena_tensor_1d(&memory->arena[MOE_MEM_WORK], MOE_F64, 1);
  o->scale = moe_arena_tensor_1d(&memory->arena[MOE_MEM_WORK], MOE_F32, 1);
  o->now = moe_arena_tensor_1d(&memory->arena[MOE_MEM_WORK], MOE_F64, MOE_ADAMW_NUMBERS);
  if (memory->arena[MOE_MEM_WORK].measuring) return MOE_OK;
  o->host = moe_device_alloc_host(dev, (int64_t)sizeof *o->host);
  return o->host ? MOE_OK : moe_fail(MOE_NO_MEMORY, "out of memory: optimizer");
}

void moe_optimizer_destroy(moe_optimizer *o) {
  if (!o) return;
  moe_device_free_host(o->dev, o->host);
  moe_device_forget(o->dev, &o->gathered);
  moe_params_destroy(&o->whole);
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
  MOE_TRY(moe_device_sync(o->dev));
  moe_startup_done("initial weights");
  return MOE_OK;
}

moe_status moe_optimizer_reduce(moe_optimizer *o) {
  moe_device_label(o->dev, "gradient reduction", -1);
  return moe_grad_sync(o->dev, o->mesh->world, moe_model_grad_pools(o->model), MOE_POOLS,
                       o->sum_squares);
}

/* Elements `part` of a pool, all of them owned. */
static moe_status update_range(moe_optimizer *o, moe_pool_kind kind, moe_range part,
                               moe_adamw_args args) {
  const moe_optimizer_pool *p = &o->pool[kind];
  int64_t n = moe_range_size(part), at = part.begin - p->owned.begin;
  moe_tensor weights = moe_tensor_rows(moe_model_weights(o->model, kind), part.begin, n);
  moe_tensor grads = moe_tensor_rows(moe_model_grads(o->model, kind), part.begin, n);
  moe_tensor m = moe_tensor_rows(p->m, at, n), v = moe_tensor_rows(p->v, at, n);
  if (!moe_tensor_present(p->master))
    return moe_adamw(o->dev, args, o->now, grads, o->scale, weights, m, v, moe_tensor_none());
  return moe_adamw(o->dev, args, o->now, grads, o->scale, moe_tensor_rows(p->master, at, n), m, v,
                   weights);
}

/* The next of this rank's parameters in `kind` after number *at, NULL after the last; *shift: from
 * its place in this rank's pool to that in the whole model's. Both tables have the same order. */
static const moe_param *next_param(const moe_optimizer *o, moe_pool_kind kind, int *at,
                                   int *at_whole, int64_t *shift) {
  const moe_params *own = moe_model_params(o->model);
  while (*at < own->count && own->list[*at].row->pool != kind) ++*at;
  if (*at >= own->count) return NULL;
  const moe_param *p = &own->list[(*at)++], *q = &o->whole.list[*at_whole];
  while (q->row != p->row || q->layer != p->layer || q->expert != p->expert) q++;
  *at_whole = (int)(q - o->whole.list);
  *shift = q->offset - p->offset;
  return p;
}

/* bf16 moments: one update for each stretch of `whole` whose elements' numbers follow each other;
 * on one rank that is the whole pool. The padding after the last parameter stays zero. */
static moe_status update_numbered(moe_optimizer *o, moe_pool_kind kind, moe_range whole,
                                  moe_adamw_args args) {
  int at = 0, at_whole = 0;
  int64_t next_shift = 0;
  const moe_param *p = next_param(o, kind, &at, &at_whole, &next_shift);
  while (p) {
    moe_range part = {p->offset, p->offset};
    int64_t shift = next_shift;
    do {
      part.end = p->offset + p->count;
      p = next_param(o, kind, &at, &at_whole, &next_shift);
    } while (p && next_shift == shift);
    part = moe_range_intersect(part, whole);
    args.first = part.begin + shift;
    if (part.begin < part.end) MOE_TRY(update_range(o, kind, part, args));
  }
  return MOE_OK;
}

static moe_status update_part(moe_optimizer *o, moe_pool_kind kind, moe_range part,
                              moe_adamw_args args) {
  if (o->pool[kind].m.dtype == MOE_F32) return update_range(o, kind, part, args);
  return update_numbered(o, kind, part, args);
}

/* Update what is owned of a pool piece by piece; each travels while the next is updated. */
static moe_status update_pieces(moe_optimizer *o, moe_pool_kind kind, moe_pool_gather *gather,
                                moe_adamw_args args) {
  moe_range piece;
  while (moe_pool_gather_next(gather, &piece)) {
    MOE_TRY(update_part(o, kind, piece, args));
    MOE_TRY(moe_pool_gather_send(gather, piece));
  }
  return moe_pool_gather_end(gather);
}

/* Updated weights of a whole pool to all ranks, beside the update of the next. */
static moe_status gather_pool(moe_optimizer *o, moe_pool_kind kind) {
  moe_comm *group = moe_model_pool_group(o->model, kind);
  if (!o->config.parallel.zero1 || moe_comm_size(group) == 1) return MOE_OK;
  moe_device_use_lane(o->dev, MOE_LANE_EXCHANGE);
  moe_status status = moe_device_wait_lane(o->dev, MOE_LANE_MAIN);
  if (status == MOE_OK) status = moe_comm_all_gather(group, moe_model_weights(o->model, kind));
  moe_device_mark(o->dev, &o->gathered);
  o->gathers = true;
  moe_device_use_lane(o->dev, MOE_LANE_MAIN);
  return status;
}

static moe_status update_pool(moe_optimizer *o, moe_pool_kind kind, moe_adamw_args args) {
  moe_pool_gather *gather = moe_model_gather(o->model, kind);
  if (!moe_pool_decays(kind)) args.weight_decay = 0.0;
  if (gather) return update_pieces(o, kind, gather, args);
  MOE_TRY(update_part(o, kind, o->pool[kind].owned, args));
  return gather_pool(o, kind);
}

static moe_adamw_args constants(const moe_optimizer *o) {
  return (moe_adamw_args){.beta1 = o->config.optim.beta1,
                          .beta2 = o->config.optim.beta2,
                          .eps = o->config.optim.eps,
                          .weight_decay = o->config.optim.weight_decay};
}

moe_status moe_optimizer_set(moe_optimizer *o, double lr, int64_t step) {
  return moe_adamw_numbers(constants(o), lr, step, o->host->now);
}

moe_status moe_optimizer_step(moe_optimizer *o, double unscale) {
  moe_adamw_args args = constants(o);
  moe_device_label(o->dev, "optimizer", -1);
  MOE_TRY(moe_device_upload(o->dev, o->now.data, o->host->now, moe_tensor_bytes(o->now)));
  MOE_TRY(moe_clip_scale(o->dev, o->sum_squares, o->config.optim.clip, unscale, o->scale));
  /* The experts' last: beside their update the others' weights travel. */
  for (int i = 0; i < MOE_POOLS; i++) MOE_TRY(update_pool(o, (moe_pool_kind)i, args));
  if (o->gathers) MOE_TRY(moe_device_follow(o->dev, &o->gathered));
  return moe_device_download(o->dev, &o->host->sum_squares, o->sum_squares.data,
                             moe_tensor_bytes(o->sum_squares));
}

double moe_optimizer_norm(const moe_optimizer *o, double unscale) {
  return sqrt(o->host->sum_squares) * unscale;
}
