/* The experts of one block:
 *
 *     delta = sum_k gates[k] * W2 ( silu(W1 h) * (W3 h) )     over each token's K experts
 *
 *   router -> dispatch -> sort by expert -> expert GEMMs -> sum per row -> return
 *
 * Where rows do not travel the sum is left to the norm that follows.
 *
 * Expert work is done in rounds of at most C sorted rows. C holds a little more than balanced
 * routing needs, so one round is usual; what exceeds it runs in further rounds, and no routing can
 * overflow a buffer. Only the first round's gate and up projections may be kept for backward, or
 * with more memory all that backward wants of it: the sorted rows, the activation a, its
 * derivatives and the rows y it becomes (docs/decisions/0009). Those of further rounds are computed
 * again.
 *
 * Exchanges hide behind arithmetic (kernels/lanes.h). Forward, the rows set out while the router
 * still chooses. Backward, the gradients that only the optimizer waits for, those of the expert
 * weights, are put off: w2's covers the rows' way back, w1's and w3's the next layer's exchange.
 * Where every rank has all experts no row travels, but those gradients may: they come first, and
 * the rest of the layer covers their way. */
#include <math.h>

#include "core/base/integers.h"
#include "core/model/block.h"
#include "kernels/lanes.h"
#include "kernels/ops.h"

/* The buffers of one round, cut to its rows. */
typedef struct {
  int64_t begin, rows;
  moe_tensor window;             /* i32 [e + 1]: its part of the offsets */
  moe_tensor pair;               /* i32 [rows] */
  moe_tensor xs, ys, dxs, gu, a; /* [rows, ...] */
  moe_tensor y;                  /* [rows, D] forward: where ys are, or are kept for backward */
  moe_tensor gates, dgates;      /* f32 [rows] */
  bool again;                    /* backward: gu and a are computed again */
  moe_gu_kind kind;              /* MOE_GU_SLOPES: xs, a and y are kept */
} round_view;

/* Whether one round holds all: then its window is the offsets. */
static bool one_round(const moe_block_env *env, const moe_stash *s) {
  return s->sorted_rows <= env->round_rows;
}

/* Rows of sorted work to go through. Where one round holds whatever comes nobody needs to know how
 * many came: operations read the offsets on the device. Else the number is sent for here, and the
 * host waits for it in count_rows, once the first round is queued: the device is never idle. */
static moe_status ask_rows(moe_block_env *env, moe_stash *s) {
  int64_t last = moe_range_size(env->mesh->owned);
  s->sorted_rows = moe_block_most_rows(env);
  if (one_round(env, s)) return MOE_OK;
  const char *at = (const char *)s->offsets.data + last * moe_dtype_size(MOE_I32);
  MOE_TRY(moe_device_download(env->dev, env->rows_host, at, (int64_t)sizeof *env->rows_host));
  moe_device_mark(env->dev, &env->rows_asked);
  return MOE_OK;
}

static moe_status count_rows(moe_block_env *env, moe_stash *s) {
  if (one_round(env, s)) return MOE_OK;
  MOE_TRY(moe_device_wait(env->dev, &env->rows_asked));
  s->sorted_rows = *env->rows_host;
  return MOE_OK;
}

static round_view round_at(moe_block_env *env, moe_block *b, int64_t begin) {
  moe_work *w = &env->work;
  round_view r = {.begin = begin,
                  .rows = moe_min64(env->round_rows, b->stash->sorted_rows - begin),
                  .again = begin > 0 || b->recompute == MOE_RECOMPUTE_EXPERTS};
  bool keeps = begin == 0 && moe_tensor_present(b->a);
  r.kind = keeps ? MOE_GU_SLOPES : r.again ? MOE_GU_AND_A : MOE_GU_VALUES;
  r.window = one_round(env, b->stash) ? b->stash->offsets : w->window;
  r.pair = moe_tensor_rows(b->stash->pair, begin, r.rows);
  r.xs = moe_tensor_rows(keeps ? b->xs : w->xs, 0, r.rows);
  r.ys = moe_tensor_rows(w->ys, 0, r.rows);
  if (moe_tensor_present(w->dxs)) r.dxs = moe_tensor_rows(w->dxs, 0, r.rows);
  r.gu = moe_tensor_rows(begin == 0 ? b->gu : w->gu_again, 0, r.rows);
  r.a = moe_tensor_rows(keeps ? b->a : w->a, 0, r.rows);
  r.y = moe_tensor_rows(keeps ? b->y : w->ys, 0, r.rows);
  r.gates = moe_tensor_rows(w->sorted_gates, 0, r.rows);
  if (moe_tensor_present(w->sorted_dgates)) r.dgates = moe_tensor_rows(w->sorted_dgates, 0, r.rows);
  return r;
}

static moe_status cut_window(moe_block_env *env, moe_block *b, const round_view *r) {
  if (one_round(env, b->stash)) return MOE_OK;
  return moe_permute_window(env->dev, b->stash->offsets, r->begin, r->rows, r->window);
}

/* Sorted inputs of a round: its window of the offsets, rows and gates. */
static moe_status gather_round(moe_block_env *env, moe_block *b, const round_view *r) {
  moe_stash *s = b->stash;
  MOE_TRY(cut_window(env, b, r));
  MOE_TRY(moe_gather_rows(env->dev, s->route.x, r->pair, env->dims.top_k, r->xs));
  return moe_gather_gates(env->dev, s->route.gates, r->pair, r->gates);
}

/* The norm and the router; where rows travel they set out between. */
static moe_status norm_and_router(moe_block_env *env, moe_block *b, moe_tensor stats) {
  moe_stash *s = b->stash;
  moe_norm n = {b->x,   env->work.delta, b->w.norm2, env->config->model.norm_eps,
                s->mid, s->h2,           s->rstd2};
  if (env->mesh->ep == 1)
    return moe_norm_router(env->dev, n, b->w.router, b->bias, s->probs, s->router_lse, s->experts,
                           s->gates, stats);
  MOE_TRY(moe_rms_norm_of(env->dev, n));
  MOE_TRY(moe_dispatch_send_early(env->dispatcher, s->h2, &s->route));
  return moe_router(env->dev, s->h2, b->w.router, b->bias, s->probs, s->router_lse, s->experts,
                    s->gates, stats);
}

static moe_status route_tokens(moe_block_env *env, moe_block *b, moe_tensor stats) {
  moe_stash *s = b->stash;
  const moe_dims *d = &env->dims;
  MOE_TRY(norm_and_router(env, b, stats));
  if (moe_tensor_present(env->forced)) { /* bits, not numbers: f32 to f32 is a copy */
    int64_t n = moe_tensor_count(s->experts);
    MOE_TRY(moe_copy(env->dev, moe_tensor_1d(s->experts.data, MOE_F32, n),
                     moe_tensor_1d(env->forced.data, MOE_F32, n)));
  }
  double factor = env->config->train.capacity_factor;
  if (factor > 0.0) {
    double share = factor * (double)(env->tokens * d->top_k) / (double)d->experts;
    MOE_TRY(moe_router_drop(env->dev, s->probs, (int64_t)ceil(share), s->experts, s->gates,
                            b->dropped));
  }
  MOE_TRY(moe_dispatch_send(env->dispatcher, s->h2, s->experts, s->gates, &s->route));
  MOE_TRY(moe_dispatch_wait(env->dispatcher));
  s->slot = moe_tensor_2d(s->slot.data, MOE_I32, s->route.rows, d->top_k);
  MOE_TRY(moe_permute_plan(env->dev, s->route.experts, env->pad, s->offsets, s->pair, s->slot));
  return ask_rows(env, s);
}

static moe_status round_forward(moe_block_env *env, moe_block *b, const round_view *r) {
  MOE_TRY(gather_round(env, b, r));
  MOE_TRY(moe_expert_up(env->dev, r->xs, r->window, b->w.w13, r->gates, r->kind, r->gu, r->a));
  return moe_expert_down(env->dev, r->a, r->window, b->w.w2, r->y);
}

moe_status moe_experts_forward(moe_block_env *env, moe_block *b, moe_tensor stats) {
  moe_stash *s = b->stash;
  MOE_TRY(route_tokens(env, b, stats));
  moe_tensor rows = moe_tensor_rows(env->work.rows, 0, s->route.rows);
  round_view r = round_at(env, b, 0);
  MOE_TRY(round_forward(env, b, &r));
  env->left = (moe_left_rows){r.y, s->slot};
  if (env->mesh->ep == 1) return MOE_OK; /* and one round holds all */
  MOE_TRY(moe_combine_rows(env->dev, r.y, s->slot, 0, 0, rows));
  MOE_TRY(count_rows(env, s));
  for (int64_t begin = env->round_rows; begin < s->sorted_rows; begin += env->round_rows) {
    r = round_at(env, b, begin);
    MOE_TRY(round_forward(env, b, &r));
    MOE_TRY(moe_combine_rows(env->dev, r.y, s->slot, begin, 1, rows));
  }
  MOE_TRY(moe_dispatch_return(env->dispatcher, &s->route, rows, env->work.delta));
  return moe_dispatch_wait(env->dispatcher);
}

moe_status moe_norm_after_experts(moe_block_env *env, moe_norm n) {
  if (env->mesh->ep == 1 && moe_tensor_present(n.residual))
    return moe_combine_norm(env->dev, env->left.y, env->left.slot, n);
  return moe_rms_norm_of(env->dev, n);
}

/* ---- backward ------------------------------------------------------------------------------ */

/* The gradients of the experts are final from dw on. */
static moe_status final_from(moe_block_env *env, moe_tensor dw) {
  return env->sums ? moe_grad_final(env->dev, env->sums, dw) : MOE_OK;
}

static moe_status due_grad(moe_block_env *env, moe_due_grad *due) {
  if (!moe_tensor_present(due->left)) return MOE_OK;
  MOE_TRY(moe_expert_weight_grad(env->dev, due->left, due->right, due->window, due->accumulate,
                                 due->dw, due->last ? env->grad_squares : moe_tensor_none()));
  due->left = moe_tensor_none();
  return due->last ? final_from(env, due->dw) : MOE_OK;
}

moe_status moe_experts_backward_end(moe_block_env *env) {
  return due_grad(env, &env->due);
}

/* A round's inputs again, and its gate and up projections, where they were not kept. */
static moe_status prepare_round(moe_block_env *env, moe_block *b, const round_view *r) {
  if (r->kind == MOE_GU_SLOPES) return cut_window(env, b, r); /* slopes have the gates in them */
  MOE_TRY(gather_round(env, b, r));
  if (!r->again) return MOE_OK;
  return moe_expert_up(env->dev, r->xs, r->window, b->w.w13, r->gates, r->kind, r->gu, r->a);
}

/* What the gradients of a prepared round's weights need: dY in r->ys, those of gate and up in place
 * of r->gu; and the gates' gradients. */
static moe_status down_backward(moe_block_env *env, moe_block *b, const round_view *r) {
  moe_work *w = &env->work;
  moe_stash *s = b->stash;
  bool slopes = r->kind == MOE_GU_SLOPES;
  moe_tensor drows = moe_tensor_rows(w->drows, 0, s->route.rows), dgates = moe_tensor_none();
  moe_tensor row_dgates = moe_tensor_rows(w->row_dgates, 0, s->route.rows);
  if (slopes) {
    MOE_TRY(moe_gather_backward(env->dev, drows, r->pair, r->y, s->slot, s->route.gates, r->ys,
                                row_dgates));
  } else {
    dgates = r->dgates;
    MOE_TRY(moe_gather_rows(env->dev, drows, r->pair, env->dims.top_k, r->ys));
  }
  MOE_TRY(moe_expert_down_backward(env->dev, r->ys, r->window, b->w.w2, r->gates, r->kind, r->gu,
                                   moe_tensor_rows(w->a, 0, r->rows), dgates));
  if (slopes) return MOE_OK;
  return moe_combine_gates(env->dev, dgates, s->slot, r->begin, r->begin > 0, row_dgates);
}

/* Then the gradients of its rows, into r->dxs. */
static moe_status up_backward(moe_block_env *env, moe_block *b, const round_view *r) {
  moe_stash *s = b->stash;
  moe_tensor rows = moe_tensor_rows(env->work.rows, 0, s->route.rows);
  MOE_TRY(moe_expert_up_backward(env->dev, r->gu, r->window, b->w.w13, r->dxs));
  return moe_combine_rows(env->dev, r->dxs, s->slot, r->begin, r->begin > 0, rows);
}

/* All rounds; of the last one the weights' gradients are left in grad_w2 and env->due, if there is
 * an exchange to cover. */
static moe_status rounds_backward(moe_block_env *env, moe_block *b, moe_due_grad *grad_w2) {
  for (int64_t begin = 0; begin < b->stash->sorted_rows; begin += env->round_rows) {
    round_view r = round_at(env, b, begin);
    if (begin > 0) {
      MOE_TRY(due_grad(env, grad_w2));
      MOE_TRY(due_grad(env, &env->due));
      MOE_TRY(prepare_round(env, b, &r));
    }
    MOE_TRY(down_backward(env, b, &r));
    bool last = begin + env->round_rows >= b->stash->sorted_rows;
    int accumulate = b->accumulate || begin > 0;
    *grad_w2 = (moe_due_grad){r.ys, r.a, r.window, b->g.w2, accumulate, last};
    env->due = (moe_due_grad){r.gu, r.xs, r.window, b->g.w13, accumulate, last};
    if (env->mesh->ep == 1) {
      MOE_TRY(due_grad(env, grad_w2));
      MOE_TRY(due_grad(env, &env->due));
    }
    MOE_TRY(up_backward(env, b, &r));
  }
  return MOE_OK;
}

/* No tokens came: gradients that would have been stored are zero. */
static moe_status no_rows_backward(moe_block_env *env, moe_block *b) {
  moe_work *w = &env->work;
  int64_t rows = b->stash->route.rows;
  MOE_TRY(moe_zero(env->dev, moe_tensor_rows(w->rows, 0, rows)));
  MOE_TRY(moe_zero(env->dev, moe_tensor_rows(w->row_dgates, 0, rows)));
  if (!b->accumulate) {
    MOE_TRY(moe_zero(env->dev, b->g.w2));
    MOE_TRY(moe_zero(env->dev, b->g.w13));
  }
  return final_from(env, b->g.w13);
}

moe_status moe_experts_backward(moe_block_env *env, moe_block *b, float aux_scale, float z_scale) {
  moe_stash *s = b->stash;
  moe_work *w = &env->work;
  moe_due_grad grad_w2 = {.left = moe_tensor_none()};
  moe_tensor drows = moe_tensor_rows(w->drows, 0, s->route.rows);
  moe_tensor rows = moe_tensor_rows(w->rows, 0, s->route.rows);
  moe_tensor row_dgates = moe_tensor_rows(w->row_dgates, 0, s->route.rows);
  MOE_TRY(moe_dispatch_send_grad(env->dispatcher, &s->route, w->dx, drows));
  MOE_TRY(due_grad(env, &env->due)); /* the layer above's */
  round_view first = round_at(env, b, 0);
  if (s->sorted_rows > 0) MOE_TRY(prepare_round(env, b, &first));
  MOE_TRY(moe_dispatch_wait(env->dispatcher));
  if (s->sorted_rows > 0)
    MOE_TRY(rounds_backward(env, b, &grad_w2));
  else
    MOE_TRY(no_rows_backward(env, b));
  MOE_TRY(moe_dispatch_return_grad(env->dispatcher, &s->route, rows, row_dgates, w->dh, w->dgates));
  MOE_TRY(due_grad(env, &grad_w2));
  MOE_TRY(moe_dispatch_wait(env->dispatcher));
  moe_tensor load = moe_tensor_2d(b->stats.data, MOE_F32, env->groups, env->dims.experts);
  moe_norm_gradient norm = {w->dh, s->mid, b->w.norm2, s->rstd2, w->dx, b->g.norm2};
  return moe_router_norm_backward(env->dev, w->dgates, s->h2, b->w.router, s->probs, s->router_lse,
                                  s->experts, s->gates, load, aux_scale, z_scale, w->dlogits,
                                  b->g.router, norm);
}
