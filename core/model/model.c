/* The passes over embedding, blocks and head, and a step's losses. */
#include "core/model/model.h"

#include <string.h>

#include "core/model/model_state.h"
#include "kernels/lanes.h"
#include "kernels/ops.h"

/* By way of pinned memory, so that the host goes on at once. */
static moe_status upload_row(const moe_block_env *env, moe_tensor to, const int32_t *from,
                             int32_t *staged) {
  if (!moe_tensor_present(to) || !from) return MOE_OK;
  memcpy(staged, from, (size_t)moe_tensor_bytes(to));
  return moe_device_upload(env->dev, to.data, staged, moe_tensor_bytes(to));
}

moe_status moe_model_load(moe_model *m, const moe_batch *batch) {
  moe_block_env *env = &m->env;
  if (batch->batch != env->batch || batch->seq != env->seq) {
    return moe_fail(MOE_INVALID, "batch of %lld x %lld where the model was set up for %lld x %lld",
                    (long long)batch->batch, (long long)batch->seq, (long long)env->batch,
                    (long long)env->seq);
  }
  int slot = (int)(m->loads++ % MOE_STAGED);
  int32_t *staged = m->staged + slot * 4 * env->tokens;
  MOE_TRY(moe_device_wait(env->dev, &m->uploaded[slot]));
  MOE_TRY(upload_row(env, env->tokens_in, batch->tokens, staged));
  MOE_TRY(upload_row(env, env->targets, batch->targets, staged + env->tokens));
  MOE_TRY(upload_row(env, env->positions, batch->positions, staged + 2 * env->tokens));
  MOE_TRY(upload_row(env, env->doc_start, batch->doc_start, staged + 3 * env->tokens));
  moe_device_mark(env->dev, &m->uploaded[slot]);
  return MOE_OK;
}

/* The experts of layer l are there for what is queued next: after an update they arrive while the
 * layers before them are at work. */
static moe_status experts_are_there(moe_model *m, int64_t l) {
  return moe_pool_gather_need(&m->gather, moe_model_experts_of(m, l));
}

/* Embedding and blocks; leaves the residual stream in the last block's mid and work.delta. */
static moe_status forward_blocks(moe_model *m) {
  moe_block_env *env = &m->env;
  moe_device_label(env->dev, "embedding", -1);
  /* The first block's x receives the embedding directly. */
  MOE_TRY(moe_embed(env->dev, env->tokens_in, m->embed, m->blocks[0].x));
  moe_tensor x = m->blocks[0].x, delta = moe_tensor_none();
  for (int64_t l = 0; l < env->dims.layers; l++) {
    MOE_TRY(experts_are_there(m, l));
    MOE_TRY(moe_block_forward(env, &m->blocks[l], x, delta));
    x = m->blocks[l].stash->mid;
    delta = env->work.delta;
  }
  return MOE_OK;
}

static moe_tensor last_mid(const moe_model *m) {
  return m->blocks[m->env.dims.layers - 1].stash->mid;
}

moe_status moe_model_step_begin(moe_model *m) {
  m->gather.awaited = 0; /* if it is recorded, others of its kind will have to wait */
  for (int i = 0; i < MOE_POOLS; i++) {
    if (i != MOE_POOL_EXPERT) MOE_TRY(moe_zero(m->env.dev, m->grads[i]));
  }
  moe_tensor squares = moe_model_grad_squares(m);
  if (moe_tensor_present(squares)) MOE_TRY(moe_zero(m->env.dev, squares));
  return moe_zero(m->env.dev, m->loss);
}

/* The coefficients of ops.h's moe_router_backward. N: tokens of this micro-batch on all ranks. */
static void set_router_scales(moe_model *m, double grad_scale) {
  const moe_config *c = &m->config;
  const moe_dims *d = &m->env.dims;
  double n = (double)m->env.tokens * moe_comm_size(m->options.mesh->world);
  double load_tokens = c->train.aux_scope == MOE_AUX_SEQUENCE ? (double)m->env.seq : n;
  double share = load_tokens * (double)d->top_k; /* f = load / share */
  m->aux_scale = (float)(grad_scale * c->train.aux_coef * (double)d->experts / share / n);
  m->z_scale = (float)(grad_scale * c->train.z_coef / n);
}

/* ---- passes -------------------------------------------------------------------------------------
 */

static moe_tensor stats_now(const moe_model *m) {
  return moe_tensor_rows(m->stats, m->options.micro_batches - 1, 1);
}

/* Whether the routers' losses need all ranks' statistics. They travel beside the head, and so does
 * the wait for a rank that is late. */
static bool shares_stats(const moe_model *m) {
  bool sequence = m->config.train.aux_scope == MOE_AUX_SEQUENCE;
  return !sequence && moe_comm_size(m->options.mesh->world) > 1;
}

static moe_status share_stats(moe_model *m) {
  moe_device *dev = m->env.dev;
  if (!shares_stats(m)) return MOE_OK;
  moe_device_use_lane(dev, MOE_LANE_EXCHANGE);
  moe_status status = moe_device_wait_lane(dev, MOE_LANE_MAIN);
  if (status == MOE_OK) status = moe_comm_all_reduce(m->options.mesh->world, stats_now(m), MOE_SUM);
  moe_device_use_lane(dev, MOE_LANE_MAIN);
  return status;
}

moe_status moe_model_forward(moe_model *m, int64_t micro, double grad_scale) {
  moe_block_env *env = &m->env;
  m->micro = micro;
  set_router_scales(m, grad_scale);
  MOE_TRY(moe_zero(env->dev, stats_now(m)));
  MOE_TRY(forward_blocks(m));
  MOE_TRY(share_stats(m));
  moe_device_label(env->dev, "head", -1);
  double n = (double)env->tokens * moe_comm_size(m->options.mesh->world);
  return moe_head_loss(env, &m->head, last_mid(m), env->work.delta, (float)(grad_scale / n), true,
                       m->loss);
}

/* The gradients of `pool` are final from those of `first` on. */
static moe_status final_from(moe_model *m, moe_pool_kind pool, moe_tensor first) {
  if (m->micro + 1 < m->options.micro_batches) return MOE_OK; /* others will add to them */
  return moe_grad_final(m->env.dev, &m->sums[pool], first);
}

/* Layer l's experts, then the rest of it. Weights' gradients that experts leave for later cover the
 * next layer's exchange (moe_layer.c), which the last layer has none of. */
static moe_status backward_layer(moe_model *m, int64_t l) {
  moe_block_env *env = &m->env;
  moe_block *b = &m->blocks[l];
  b->accumulate = m->micro > 0;
  MOE_TRY(moe_block_backward_experts(env, b, m->aux_scale, m->z_scale));
  if (l == 0) MOE_TRY(moe_experts_backward_end(env));
  MOE_TRY(moe_block_backward_attention(env, b));
  MOE_TRY(final_from(m, MOE_POOL_DENSE, b->g.qkv));
  MOE_TRY(final_from(m, MOE_POOL_ROUTER, b->g.router));
  return final_from(m, MOE_POOL_GAIN, b->g.norm1);
}

static moe_status backward_pass(moe_model *m) {
  moe_block_env *env = &m->env;
  moe_device_label(env->dev, "head backward", -1);
  MOE_TRY(moe_head_backward(env, &m->head));
  MOE_TRY(final_from(m, MOE_POOL_DENSE, m->head.dweight));
  if (shares_stats(m)) MOE_TRY(moe_device_wait_lane(env->dev, MOE_LANE_EXCHANGE));
  for (int64_t l = env->dims.layers - 1; l >= 0; l--) MOE_TRY(backward_layer(m, l));
  moe_device_label(env->dev, "embedding backward", -1);
  MOE_TRY(moe_embed_backward(env->dev, env->tokens_in, env->work.dx, m->dembed));
  return final_from(m, MOE_POOL_DENSE, m->dembed);
}

moe_status moe_model_backward(moe_model *m) {
  bool last = m->micro + 1 == m->options.micro_batches;
  m->env.sums = last ? &m->sums[MOE_POOL_EXPERT] : NULL;
  if (last && m->options.mesh->world_beside) moe_device_lend(m->env.dev, MOE_COMM_BESIDE);
  moe_status status = backward_pass(m);
  moe_device_lend(m->env.dev, 0);
  return status;
}

moe_status moe_model_keep_stats(moe_model *m, int64_t micro) {
  if (micro + 1 == m->options.micro_batches) return MOE_OK;
  return moe_copy(m->env.dev, moe_tensor_rows(m->stats, micro, 1), stats_now(m));
}

/* ---- what a step came to ------------------------------------------------------------------------
 */

/* aux, z, dropped and assignment counts (into load) of one layer of one micro-batch. */
static void layer_losses(const moe_model *m, const float *stats, double *load, double *aux,
                         double *z) {
  const moe_dims *d = &m->env.dims;
  int64_t groups = m->env.groups, e_count = d->experts;
  double n = (double)m->env.tokens * moe_comm_size(m->options.mesh->world);
  double group_tokens = m->config.train.aux_scope == MOE_AUX_SEQUENCE ? (double)m->env.seq : n;
  const float *counts = stats, *probs = stats + groups * e_count,
              *squares = probs + groups * e_count;
  for (int64_t g = 0; g < groups; g++) {
    double sum = 0.0;
    for (int64_t e = 0; e < e_count; e++) {
      double f = (double)counts[g * e_count + e] / (group_tokens * (double)d->top_k);
      sum += f * (double)probs[g * e_count + e] / group_tokens;
      load[e] += (double)counts[g * e_count + e];
    }
    *aux += (double)e_count * sum * group_tokens / n;
    *z += (double)squares[g] / n;
  }
}

moe_status moe_model_step_end(moe_model *m) {
  moe_device *dev = m->env.dev;
  MOE_TRY(moe_device_download(dev, m->stats_host, m->stats.data, moe_tensor_bytes(m->stats)));
  return moe_device_download(dev, m->loss_host, m->loss.data, moe_tensor_bytes(m->loss));
}

moe_status moe_model_step_losses(moe_model *m, moe_losses *out) {
  moe_block_env *env = &m->env;
  const moe_dims *d = &env->dims;
  double ce[2] = {m->loss_host[0], m->loss_host[1]};
  memset(out, 0, sizeof *out);
  memset(m->load, 0, sizeof *m->load * (size_t)(d->layers * d->experts));
  int64_t row = d->layers * (moe_model_stats_width(m) + 1);
  for (int64_t i = 0; i < m->options.micro_batches; i++) {
    const float *stats = m->stats_host + i * row;
    for (int64_t l = 0; l < d->layers; l++) {
      layer_losses(m, stats + l * moe_model_stats_width(m), m->load + l * d->experts, &out->aux,
                   &out->z);
      out->dropped += (double)stats[d->layers * moe_model_stats_width(m) + l];
    }
  }
  moe_comm *world = m->options.mesh->world;
  MOE_TRY(moe_comm_host_all_reduce_f64(world, ce, 2, MOE_SUM));
  if (m->config.train.aux_scope == MOE_AUX_SEQUENCE) { /* statistics are still this rank's alone */
    double sums[3] = {out->aux, out->z, out->dropped};
    MOE_TRY(moe_comm_host_all_reduce_f64(world, sums, 3, MOE_SUM));
    MOE_TRY(moe_comm_host_all_reduce_f64(world, m->load, (int)(d->layers * d->experts), MOE_SUM));
    out->aux = sums[0], out->z = sums[1], out->dropped = sums[2];
  }
  double micros = (double)m->options.micro_batches;
  double assigned = micros * (double)(env->tokens * d->top_k) * moe_comm_size(world);
  for (int64_t i = 0; i < d->layers * d->experts; i++) m->load[i] /= assigned;
  out->load = m->load;
  out->aux /= micros;
  out->z /= micros;
  out->ce = ce[1] > 0.0 ? ce[0] / ce[1] : 0.0;
  out->loss = out->ce + m->config.train.aux_coef * out->aux + m->config.train.z_coef * out->z;
  return MOE_OK;
}

moe_status moe_model_evaluate(moe_model *m, const moe_batch *batch, double loss[2]) {
  moe_block_env *env = &m->env;
  double sums[2];
  MOE_TRY(moe_model_load(m, batch));
  MOE_TRY(moe_zero(env->dev, m->loss));
  MOE_TRY(forward_blocks(m));
  MOE_TRY(moe_head_loss(env, &m->head, last_mid(m), env->work.delta, 0.0f, false, m->loss));
  MOE_TRY(moe_device_download(env->dev, sums, m->loss.data, (int64_t)sizeof sums));
  MOE_TRY(moe_device_sync(env->dev));
  loss[0] += sums[0];
  loss[1] += sums[1];
  return MOE_OK;
}

moe_status moe_model_logits(moe_model *m, const moe_batch *batch, float *logits) {
  moe_block_env *env = &m->env;
  MOE_TRY(moe_model_load(m, batch));
  MOE_TRY(forward_blocks(m));
  return moe_head_logits(env, &m->head, last_mid(m), env->work.delta, logits);
}
