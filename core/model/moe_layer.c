/* The experts of one block:
 *
 *     delta = sum_k gates[k] * W2 ( silu(W1 h) * (W3 h) )     over each token's K experts
 *
 *   router -> dispatch -> sort by expert -> expert GEMMs -> sum per row -> return
 *
 * Expert work is done in rounds of at most C sorted rows. C holds a little more than balanced
 * routing needs, so one round is usual; what exceeds it runs in further rounds, and no routing can
 * overflow a buffer. Only the first round's gate and up projections may be kept for backward; those
 * of further rounds are computed again. */
#include "core/model/block.h"
#include "kernels/ops.h"

/* The buffers of one round, cut to its rows. */
typedef struct {
  int64_t begin, rows;
  moe_tensor pair;          /* i32 [rows] */
  moe_tensor xs, ys, gu, a; /* [rows, ...] */
  moe_tensor gates, dgates; /* f32 [rows] */
} round_view;

static int64_t min_i64(int64_t a, int64_t b) {
  return a < b ? a : b;
}

/* Rows of sorted work to go through. Where one round holds whatever comes nobody needs to know how
 * many came: operations read the offsets on the device. Else the host waits here for one number,
 * once forward and once backward (on an H200 about 20 us each, while the GPU idles). */
static moe_status count_rows(moe_block_env *env, const moe_stash *s, int64_t *rows) {
  int64_t last = moe_range_size(env->mesh->owned);
  int32_t count = 0;
  *rows = moe_block_most_rows(env);
  if (*rows <= env->round_rows) return MOE_OK;
  const char *at = (const char *)s->offsets.data + last * moe_dtype_size(MOE_I32);
  MOE_TRY(moe_device_download(env->dev, &count, at, (int64_t)sizeof count));
  MOE_TRY(moe_device_sync(env->dev));
  *rows = count;
  return MOE_OK;
}

static round_view round_at(moe_block_env *env, moe_block *b, int64_t begin, int64_t total) {
  moe_work *w = &env->work;
  round_view r = {.begin = begin, .rows = min_i64(env->round_rows, total - begin)};
  r.pair = moe_tensor_rows(b->stash->pair, begin, r.rows);
  r.xs = moe_tensor_rows(w->xs, 0, r.rows);
  r.ys = moe_tensor_rows(w->ys, 0, r.rows);
  r.gu = moe_tensor_rows(b->gu, 0, r.rows);
  r.a = moe_tensor_rows(w->a, 0, r.rows);
  r.gates = moe_tensor_rows(w->sorted_gates, 0, r.rows);
  r.dgates = moe_tensor_rows(w->sorted_dgates, 0, r.rows);
  return r;
}

/* Sorted inputs of a round: its window of the offsets, rows and gates. */
static moe_status gather_round(moe_block_env *env, moe_block *b, const round_view *r) {
  moe_stash *s = b->stash;
  MOE_TRY(moe_permute_window(env->dev, s->offsets, r->begin, r->rows, env->work.window));
  MOE_TRY(moe_gather_rows(env->dev, s->route.x, r->pair, env->dims.top_k, r->xs));
  return moe_gather_gates(env->dev, s->route.gates, r->pair, r->gates);
}

static moe_status route_tokens(moe_block_env *env, moe_block *b, moe_tensor stats) {
  moe_stash *s = b->stash;
  const moe_dims *d = &env->dims;
  MOE_TRY(moe_router(env->dev, s->h2, b->w.router, b->bias, s->probs, s->router_lse, s->experts,
                     s->gates, stats));
  double factor = env->config->train.capacity_factor;
  if (factor > 0.0) {
    double share = factor * (double)(env->tokens * d->top_k) / (double)d->experts;
    int64_t capacity = (int64_t)share < share ? (int64_t)share + 1 : (int64_t)share;
    MOE_TRY(moe_router_drop(env->dev, s->probs, capacity, s->experts, s->gates, b->dropped));
  }
  MOE_TRY(moe_dispatch_send(env->dispatcher, s->h2, s->experts, s->gates, &s->route));
  s->slot = moe_tensor_2d(s->slot.data, MOE_I32, s->route.rows, d->top_k);
  return moe_permute_plan(env->dev, s->route.experts, env->pad, s->offsets, s->pair, s->slot);
}

moe_status moe_experts_forward(moe_block_env *env, moe_block *b, moe_tensor stats) {
  moe_stash *s = b->stash;
  MOE_TRY(route_tokens(env, b, stats));
  moe_tensor rows = moe_tensor_rows(env->work.rows, 0, s->route.rows);
  int64_t total = 0;
  MOE_TRY(count_rows(env, s, &total));
  if (total == 0) MOE_TRY(moe_zero(env->dev, rows));
  for (int64_t begin = 0; begin < total; begin += env->round_rows) {
    round_view r = round_at(env, b, begin, total);
    if (begin > 0) r.gu = moe_tensor_rows(env->work.gu_again, 0, r.rows);
    MOE_TRY(gather_round(env, b, &r));
    MOE_TRY(moe_expert_up(env->dev, r.xs, env->work.window, b->w.w13, r.gates, r.gu, r.a));
    MOE_TRY(moe_expert_down(env->dev, r.a, env->work.window, b->w.w2, r.ys));
    MOE_TRY(moe_combine_rows(env->dev, r.ys, s->slot, begin, begin > 0, rows));
  }
  return moe_dispatch_return(env->dispatcher, &s->route, rows, env->work.delta);
}

/* Gradients of one round: weights, sorted rows (into r->ys) and gates. */
static moe_status round_backward(moe_block_env *env, moe_block *b, round_view *r,
                                 moe_tensor drows) {
  moe_work *w = &env->work;
  bool again = r->begin > 0 || b->recompute == MOE_RECOMPUTE_EXPERTS;
  if (r->begin > 0) r->gu = moe_tensor_rows(w->gu_again, 0, r->rows);
  MOE_TRY(gather_round(env, b, r));
  if (again) MOE_TRY(moe_expert_up(env->dev, r->xs, w->window, b->w.w13, r->gates, r->gu, r->a));
  MOE_TRY(moe_gather_rows(env->dev, drows, r->pair, env->dims.top_k, r->ys));
  MOE_TRY(moe_expert_down_backward(env->dev, r->ys, w->window, b->w.w2, r->gates, r->gu, r->a,
                                   r->dgates));
  int accumulate = b->accumulate || r->begin > 0;
  MOE_TRY(moe_expert_weight_grad(env->dev, r->ys, r->a, w->window, accumulate, b->g.w2));
  MOE_TRY(moe_expert_weight_grad(env->dev, r->gu, r->xs, w->window, accumulate, b->g.w13));
  return moe_expert_up_backward(env->dev, r->gu, w->window, b->w.w13, r->ys);
}

/* No tokens came: gradients that would have been stored are zero. */
static moe_status no_rows_backward(moe_block_env *env, moe_block *b, moe_tensor rows,
                                   moe_tensor row_dgates) {
  MOE_TRY(moe_zero(env->dev, rows));
  MOE_TRY(moe_zero(env->dev, row_dgates));
  if (b->accumulate) return MOE_OK;
  MOE_TRY(moe_zero(env->dev, b->g.w2));
  return moe_zero(env->dev, b->g.w13);
}

moe_status moe_experts_backward(moe_block_env *env, moe_block *b, float aux_scale, float z_scale) {
  moe_stash *s = b->stash;
  moe_work *w = &env->work;
  moe_tensor drows = moe_tensor_rows(w->drows, 0, s->route.rows);
  moe_tensor rows = moe_tensor_rows(w->rows, 0, s->route.rows);
  moe_tensor row_dgates = moe_tensor_rows(w->row_dgates, 0, s->route.rows);
  MOE_TRY(moe_dispatch_send_grad(env->dispatcher, &s->route, w->dx, drows));
  int64_t total = 0;
  MOE_TRY(count_rows(env, s, &total));
  if (total == 0) MOE_TRY(no_rows_backward(env, b, rows, row_dgates));
  for (int64_t begin = 0; begin < total; begin += env->round_rows) {
    round_view r = round_at(env, b, begin, total);
    MOE_TRY(round_backward(env, b, &r, drows));
    MOE_TRY(moe_combine_rows(env->dev, r.ys, s->slot, begin, begin > 0, rows));
    MOE_TRY(moe_combine_gates(env->dev, r.dgates, s->slot, begin, begin > 0, row_dgates));
  }
  MOE_TRY(moe_dispatch_return_grad(env->dispatcher, &s->route, rows, row_dgates, w->dh, w->dgates));
  moe_tensor load = moe_tensor_2d(b->stats.data, MOE_F32, env->groups, env->dims.experts);
  return moe_router_backward(env->dev, w->dgates, s->h2, b->w.router, s->probs, s->router_lse,
                             s->experts, s->gates, load, aux_scale, z_scale, w->dlogits, w->dh,
                             b->g.router);
}
