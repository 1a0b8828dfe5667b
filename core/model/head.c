/* Final norm, logits and cross-entropy, a chunk of tokens at a time. */
#include "core/model/head.h"

#include <stdlib.h>

#include "core/base/integers.h"
#include "kernels/ops.h"

/* Tokens per chunk: enough rows for an efficient product, within 256 MiB of logits. */
static int64_t chunk_tokens(const moe_block_env *env) {
  int64_t row = env->dims.vocab * moe_dtype_size(env->dtype);
  int64_t fit = (256LL << 20) / row;
  int64_t chunk = fit < 128 ? 128 : fit > 8192 ? 8192 : fit;
  return moe_min64(chunk, env->tokens);
}

void moe_head_create(moe_block_env *env, moe_arena *arena, moe_head *out) {
  int64_t t = env->tokens, hidden = env->dims.hidden;
  out->x = moe_arena_tensor_2d(arena, env->dtype, t, hidden);
  out->h = moe_arena_tensor_2d(arena, env->dtype, t, hidden);
  out->rstd = moe_arena_tensor_1d(arena, MOE_F32, t);
  if (moe_tensor_present(out->dweight)) out->dh = moe_arena_tensor_2d(arena, env->dtype, t, hidden);
  out->logits = moe_arena_tensor_2d(arena, env->dtype, chunk_tokens(env), env->dims.vocab);
}

static moe_status final_norm(moe_block_env *env, moe_head *head, moe_tensor x, moe_tensor delta) {
  return moe_norm_after_experts(env, (moe_norm){x, delta, head->gain, env->config->model.norm_eps,
                                                head->x, head->h, head->rstd});
}

/* Logits of `count` tokens from `begin`. */
static moe_status chunk_logits(moe_block_env *env, moe_head *head, int64_t begin, int64_t count,
                               moe_tensor *logits) {
  *logits = moe_tensor_rows(head->logits, 0, count);
  return moe_gemm(env->dev, MOE_NT, moe_tensor_rows(head->h, begin, count), head->weight, 0.0f,
                  *logits);
}

moe_status moe_head_loss(moe_block_env *env, moe_head *head, moe_tensor x, moe_tensor delta,
                         float scale, bool with_grad, moe_tensor loss) {
  MOE_TRY(final_norm(env, head, x, delta));
  int64_t chunk = head->logits.shape[0];
  for (int64_t begin = 0; begin < env->tokens; begin += chunk) {
    int64_t count = env->tokens - begin < chunk ? env->tokens - begin : chunk;
    moe_tensor logits, targets = moe_tensor_rows(env->targets, begin, count);
    MOE_TRY(chunk_logits(env, head, begin, count, &logits));
    MOE_TRY(
        moe_cross_entropy(env->dev, logits, targets, scale, with_grad, loss, moe_tensor_none()));
    if (!with_grad) continue;
    MOE_TRY(moe_gemm(env->dev, MOE_NN, logits, head->weight, 0.0f,
                     moe_tensor_rows(head->dh, begin, count)));
    MOE_TRY(moe_gemm(env->dev, MOE_TN, logits, moe_tensor_rows(head->h, begin, count), 1.0f,
                     head->dweight));
  }
  return MOE_OK;
}

moe_status moe_head_backward(moe_block_env *env, moe_head *head) {
  MOE_TRY(moe_zero(env->dev, env->work.dx));
  return moe_rms_norm_backward(env->dev, head->dh, head->x, head->gain, head->rstd, env->work.dx,
                               head->dgain);
}

/* Download a chunk of act logits as f32. */
static moe_status download_logits(moe_device *dev, moe_tensor logits, float *out) {
  int64_t n = moe_tensor_count(logits);
  if (logits.dtype == MOE_F32) {
    MOE_TRY(moe_device_download(dev, out, logits.data, n * 4));
    return moe_device_sync(dev);
  }
  uint16_t *bits = malloc((size_t)n * sizeof *bits);
  if (!bits) return moe_fail(MOE_NO_MEMORY, "out of memory: logits");
  moe_status status = moe_device_download(dev, bits, logits.data, n * 2);
  if (status == MOE_OK) status = moe_device_sync(dev);
  for (int64_t i = 0; i < n && status == MOE_OK; i++) {
    out[i] = logits.dtype == MOE_BF16 ? moe_bf16_to_f32(bits[i]) : moe_f16_to_f32(bits[i]);
  }
  free(bits);
  return status;
}

moe_status moe_head_logits(moe_block_env *env, moe_head *head, moe_tensor x, moe_tensor delta,
                           float *out) {
  MOE_TRY(final_norm(env, head, x, delta));
  int64_t chunk = head->logits.shape[0];
  for (int64_t begin = 0; begin < env->tokens; begin += chunk) {
    int64_t count = env->tokens - begin < chunk ? env->tokens - begin : chunk;
    moe_tensor logits;
    MOE_TRY(chunk_logits(env, head, begin, count, &logits));
    MOE_TRY(download_logits(env->dev, logits, out + begin * env->dims.vocab));
  }
  return MOE_OK;
}
