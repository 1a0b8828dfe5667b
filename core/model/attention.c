/* Attention of one block:  delta = attention(rope(h Wq^T, h Wk^T), h Wv^T) Wo^T. */
#include "core/model/block.h"
#include "kernels/ops.h"

static moe_attention_shape shape_of(const moe_block_env *env) {
  moe_attention_shape s = {.batch = env->batch,
                           .seq = env->seq,
                           .heads = env->dims.heads,
                           .kv_heads = env->dims.kv_heads,
                           .head_dim = env->dims.head_dim};
  return s;
}

moe_status moe_attention_forward(moe_block_env *env, moe_block *b) {
  moe_stash *s = b->stash;
  const moe_dims *d = &env->dims;
  MOE_TRY(moe_gemm(env->dev, MOE_NT, s->h1, b->w.qkv, 0.0f, s->qkv));
  MOE_TRY(moe_rope(env->dev, s->qkv, env->positions, env->rope_table, d->heads, d->kv_heads, 1));
  MOE_TRY(moe_attention(env->dev, shape_of(env), s->qkv, env->doc_start, s->attended, s->lse));
  return moe_gemm(env->dev, MOE_NT, s->attended, b->w.o, 0.0f, env->work.delta);
}

moe_status moe_attention_backward_pass(moe_block_env *env, moe_block *b) {
  moe_stash *s = b->stash;
  moe_work *w = &env->work;
  const moe_dims *d = &env->dims;
  MOE_TRY(moe_gemm(env->dev, MOE_NN, w->dx, b->w.o, 0.0f, w->dattended));
  MOE_TRY(moe_gemm(env->dev, MOE_TN, w->dx, s->attended, 1.0f, b->g.o));
  MOE_TRY(moe_attention_backward(env->dev, shape_of(env), w->dattended, s->qkv, env->doc_start,
                                 s->attended, s->lse, w->dqkv));
  MOE_TRY(moe_rope(env->dev, w->dqkv, env->positions, env->rope_table, d->heads, d->kv_heads, -1));
  MOE_TRY(moe_gemm(env->dev, MOE_NN, w->dqkv, b->w.qkv, 0.0f, w->dh));
  return moe_gemm(env->dev, MOE_TN, w->dqkv, s->h1, 1.0f, b->g.qkv);
}
