/* One transformer block and the buffers it works in.
 *
 *   x   = x_in + delta_in         (the last block's experts, added inside the first norm)
 *   mid = x + attention(norm(x))
 *   delta = experts(norm(mid))    (added by the next block) */
#include "core/model/block.h"

#include <string.h>

#include "core/base/integers.h"
#include "kernels/ops.h"

/* Memory for what travels between ranks, if anything does. */
static moe_arena *travelling(const moe_block_env *env, moe_memory *memory,
                             moe_memory_purpose else_) {
  return &memory->arena[env->mesh->ep > 1 ? MOE_MEM_EXCHANGE : else_];
}

moe_status moe_stash_create(moe_block_env *env, moe_memory *memory, moe_stash *out) {
  moe_arena *arena = &memory->arena[MOE_MEM_STASH];
  moe_arena *shared = travelling(env, memory, MOE_MEM_STASH);
  const moe_dims *d = &env->dims;
  int64_t t = env->tokens, hidden = d->hidden;
  int64_t qkv = (d->heads + 2 * d->kv_heads) * d->head_dim;
  int64_t rows = moe_dispatch_max_rows(env->dispatcher);
  int64_t owned = moe_range_size(env->mesh->owned);
  memset(out, 0, sizeof *out);
  out->h1 = moe_arena_tensor_2d(arena, env->dtype, t, hidden);
  out->rstd1 = moe_arena_tensor_1d(arena, MOE_F32, t);
  out->qkv = moe_arena_tensor_2d(arena, env->dtype, t, qkv);
  out->attended = moe_arena_tensor_2d(arena, env->dtype, t, d->heads * d->head_dim);
  moe_tensor lse = moe_arena_tensor_1d(arena, MOE_F32, t * d->heads);
  out->lse = moe_tensor_3d(lse.data, MOE_F32, env->batch, d->heads, env->seq);
  out->mid = moe_arena_tensor_2d(arena, env->dtype, t, hidden);
  out->h2 = moe_arena_tensor_2d(shared, env->dtype, t, hidden);
  out->rstd2 = moe_arena_tensor_1d(arena, MOE_F32, t);
  out->probs = moe_arena_tensor_2d(arena, MOE_F32, t, d->experts);
  out->router_lse = moe_arena_tensor_1d(arena, MOE_F32, t);
  out->experts = moe_arena_tensor_2d(arena, MOE_I32, t, d->top_k);
  out->gates = moe_arena_tensor_2d(arena, MOE_F32, t, d->top_k);
  out->offsets = moe_arena_tensor_1d(arena, MOE_I32, owned + 1);
  out->pair = moe_arena_tensor_1d(arena, MOE_I32, moe_block_most_rows(env));
  out->slot = moe_arena_tensor_2d(arena, MOE_I32, rows, d->top_k);
  return moe_route_create(env->dispatcher, shared, &out->route);
}

void moe_stash_destroy(moe_stash *s) {
  moe_route_destroy(&s->route);
}

int64_t moe_block_most_rows(const moe_block_env *env) {
  int64_t owned = moe_range_size(env->mesh->owned);
  int64_t most = moe_min64(env->dims.top_k, owned);
  int64_t rows = moe_dispatch_max_rows(env->dispatcher) * most + owned * (env->pad - 1);
  return moe_round_up64(rows, env->pad);
}

void moe_work_create(moe_block_env *env, moe_memory *memory, bool training) {
  const moe_dims *d = &env->dims;
  moe_work *w = &env->work;
  moe_arena *arena = &memory->arena[MOE_MEM_WORK];
  moe_arena *shared = travelling(env, memory, MOE_MEM_WORK);
  moe_dtype act = env->dtype;
  int64_t t = env->tokens, c = env->round_rows, rows = moe_dispatch_max_rows(env->dispatcher);
  int64_t owned = moe_range_size(env->mesh->owned);
  bool travels = env->mesh->ep > 1; /* else a token's row is the token's, and is not copied */
  w->delta = moe_arena_tensor_2d(arena, act, t, d->hidden);
  w->rows = travels ? moe_arena_tensor_2d(shared, act, rows, d->hidden) : w->delta;
  w->window = moe_arena_tensor_1d(arena, MOE_I32, owned + 1);
  w->xs = moe_arena_tensor_2d(arena, act, c, d->hidden);
  w->ys = moe_arena_tensor_2d(arena, act, c, d->hidden);
  w->a = moe_arena_tensor_2d(arena, act, c, d->ffn);
  w->sorted_gates = moe_arena_tensor_1d(arena, MOE_F32, c);
  bool rounds = moe_block_most_rows(env) > c;
  if (rounds) w->gu_again = moe_arena_tensor_2d(arena, act, c, 2 * d->ffn);
  if (!training) return;
  int64_t qkv = (d->heads + 2 * d->kv_heads) * d->head_dim;
  w->dx = moe_arena_tensor_2d(shared, act, t, d->hidden);
  w->dxs = moe_arena_tensor_2d(arena, act, c, d->hidden);
  w->dh = w->delta; /* one is of the forward pass, the other of the backward pass */
  w->dattended = moe_arena_tensor_2d(arena, act, t, d->heads * d->head_dim);
  w->dqkv = moe_arena_tensor_2d(arena, act, t, qkv);
  w->dgates = moe_arena_tensor_2d(arena, MOE_F32, t, d->top_k);
  w->dlogits = moe_arena_tensor_2d(arena, MOE_F32, t, d->experts);
  w->drows = travels ? moe_arena_tensor_2d(shared, act, rows, d->hidden) : w->dx;
  w->row_dgates = travels ? moe_arena_tensor_2d(arena, MOE_F32, rows, d->top_k) : w->dgates;
  w->sorted_dgates = moe_arena_tensor_1d(arena, MOE_F32, c);
  int64_t stats = env->groups * (2 * d->experts + 1);
  w->stats_again =
      moe_tensor_as_2d(moe_arena_tensor_1d(arena, MOE_F32, stats), env->groups, 2 * d->experts + 1);
}

/* From block->x to work.delta; `stats` receives the router's statistics. */
static moe_status forward_from_x(moe_block_env *env, moe_block *b, moe_tensor stats) {
  moe_device_label(env->dev, "attention forward", b->index);
  MOE_TRY(moe_attention_forward(env, b));
  moe_device_label(env->dev, "experts forward", b->index);
  return moe_experts_forward(env, b, stats);
}

moe_status moe_block_forward(moe_block_env *env, moe_block *b, moe_tensor x_in,
                             moe_tensor delta_in) {
  moe_stash *s = b->stash;
  double eps = env->config->model.norm_eps;
  moe_device_label(env->dev, "attention forward", b->index);
  MOE_TRY(moe_norm_after_experts(
      env, (moe_norm){x_in, delta_in, b->w.norm1, eps, b->x, s->h1, s->rstd1}));
  return forward_from_x(env, b, b->stats);
}

/* Fill the shared stash again from x. Routing is a pure function of x, so it comes out the same. */
static moe_status recompute(moe_block_env *env, moe_block *b) {
  moe_stash *s = b->stash;
  double eps = env->config->model.norm_eps;
  MOE_TRY(moe_experts_backward_end(env)); /* its inputs lie where this writes */
  moe_device_label(env->dev, "block recomputed", b->index);
  MOE_TRY(moe_rms_norm(env->dev, b->x, moe_tensor_none(), b->w.norm1, eps, b->x, s->h1, s->rstd1));
  return forward_from_x(env, b, env->work.stats_again);
}

moe_status moe_block_backward_experts(moe_block_env *env, moe_block *b, float aux_scale,
                                      float z_scale) {
  if (b->recompute == MOE_RECOMPUTE_BLOCK) MOE_TRY(recompute(env, b));
  moe_device_label(env->dev, "experts backward", b->index);
  return moe_experts_backward(env, b, aux_scale, z_scale);
}

moe_status moe_block_backward_attention(moe_block_env *env, moe_block *b) {
  moe_stash *s = b->stash;
  moe_work *w = &env->work;
  moe_device_label(env->dev, "attention backward", b->index);
  MOE_TRY(moe_attention_backward_pass(env, b));
  return moe_rms_norm_backward(env->dev, w->dh, b->x, b->w.norm1, s->rstd1, w->dx, b->g.norm1);
}
