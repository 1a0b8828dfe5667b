/* Setting a model up: sizes, buffers, initial weights. layout.c has pools and stashes. */
#include <stdlib.h>
#include <string.h>

#include "core/base/integers.h"
#include "core/model/model_state.h"
#include "kernels/ops.h"

static bool measuring(const moe_memory *memory) {
  return memory->arena[MOE_MEM_WEIGHTS].measuring;
}

/* A quarter more than balanced routing needs, and never more than any routing can. */
static int64_t choose_round_rows(const moe_block_env *env) {
  int64_t owned = moe_range_size(env->mesh->owned);
  double balanced = (double)(env->tokens * env->mesh->ep * env->dims.top_k) * (double)owned /
                    (double)env->dims.experts;
  int64_t usual = moe_round_up64((int64_t)(1.25 * balanced) + 1, env->pad) + owned * env->pad;
  int64_t most = moe_block_most_rows(env);
  return moe_min64(usual, most);
}

int64_t moe_model_stats_width(const moe_model *m) {
  return m->env.groups * (2 * m->env.dims.experts + 1);
}

static void create_batch(moe_model *m, moe_memory *memory) {
  moe_block_env *env = &m->env;
  moe_arena *work = &memory->arena[MOE_MEM_WORK];
  const moe_dims *d = &env->dims;
  env->tokens_in = moe_arena_tensor_1d(work, MOE_I32, env->tokens);
  env->targets = moe_arena_tensor_1d(work, MOE_I32, env->tokens);
  env->positions = moe_arena_tensor_1d(work, MOE_I32, env->tokens);
  if (m->config.data.document_mask) {
    env->doc_start = moe_arena_tensor_1d(work, MOE_I32, env->tokens);
  }
  env->rope_table = moe_arena_tensor_2d(work, MOE_F32, env->seq, d->head_dim);
  m->stats = moe_arena_tensor_2d(work, MOE_F32, m->options.micro_batches,
                                 d->layers * (moe_model_stats_width(m) + 1));
  m->loss = moe_arena_tensor_1d(work, MOE_F64, 2);
  if (m->config.train.bias_update_rate > 0.0) {
    m->bias = moe_arena_tensor_2d(work, MOE_F32, d->layers, d->experts);
  }
}

static void create_scratch(moe_model *m, moe_memory *memory) {
  moe_block_env *env = &m->env;
  const moe_dims *d = &env->dims;
  moe_attention_shape shape = {env->batch, env->seq, d->heads, d->kv_heads, d->head_dim};
  int64_t attention = moe_attention_scratch(env->dev, shape, env->dtype);
  int64_t experts = moe_expert_scratch(env->dev, env->round_rows, d->hidden, d->ffn, env->dtype);
  int64_t bytes = attention > experts ? attention : experts;
  void *data = moe_arena_take(&memory->arena[MOE_MEM_SCRATCH], bytes);
  if (!measuring(memory)) moe_device_set_scratch(env->dev, data, bytes);
}

static moe_status create_host_arrays(moe_model *m) {
  const moe_dims *d = &m->env.dims;
  size_t layers = (size_t)d->layers, experts = (size_t)d->experts;
  m->blocks = calloc(layers, sizeof *m->blocks);
  m->stashes = calloc(layers, sizeof *m->stashes);
  m->load = calloc(layers * experts, sizeof *m->load);
  if (m->config.train.bias_update_rate > 0.0)
    m->bias_host = calloc(layers * experts, sizeof(float));
  bool bias_ok = m->bias_host || m->config.train.bias_update_rate <= 0.0;
  if (m->blocks && m->stashes && m->load && bias_ok) return MOE_OK;
  return moe_fail(MOE_NO_MEMORY, "out of memory: tables of %zu layers", layers);
}

static void create_env(moe_model *m) {
  moe_block_env *env = &m->env;
  env->dims = moe_dims_of(&m->config);
  env->config = &m->config;
  env->dev = m->options.dev;
  env->mesh = m->options.mesh;
  env->batch = m->options.batch;
  env->seq = m->options.seq;
  env->tokens = env->batch * env->seq;
  env->groups = m->config.train.aux_scope == MOE_AUX_SEQUENCE ? env->batch : 1;
  env->pad = moe_device_what(env->dev) == MOE_DEVICE_CUDA ? 128 : 1;
  env->dtype = moe_config_compute_dtype(&m->config);
}

static moe_status create_pinned(moe_model *m) {
  moe_block_env *env = &m->env;
  int64_t batch = 4 * env->tokens * moe_dtype_size(MOE_I32);
  m->stats_host = moe_device_alloc_host(env->dev, moe_tensor_bytes(m->stats));
  m->loss_host = moe_device_alloc_host(env->dev, moe_tensor_bytes(m->loss));
  m->staged = moe_device_alloc_host(env->dev, MOE_STAGED * batch);
  env->rows_host = moe_device_alloc_host(env->dev, (int64_t)sizeof *env->rows_host);
  if (m->stats_host && m->loss_host && m->staged && env->rows_host) return MOE_OK;
  return moe_fail(MOE_NO_MEMORY, "out of memory: what travels between host and device");
}

static moe_status create(moe_model *m, moe_memory *memory) {
  moe_block_env *env = &m->env;
  const moe_dims *d = &env->dims;
  MOE_TRY(moe_params_create(d, env->mesh->owned, &m->params));
  moe_dispatch_shape shape = {.tokens = env->tokens,
                              .hidden = d->hidden,
                              .top_k = d->top_k,
                              .dtype = env->dtype,
                              .exchange = m->config.parallel.exchange};
  MOE_TRY(moe_dispatcher_create(env->dev, env->mesh, shape, memory, &env->dispatcher));
  env->round_rows = choose_round_rows(env);
  MOE_TRY(create_host_arrays(m));
  create_batch(m, memory);
  MOE_TRY(moe_model_lay_out(m, memory));
  moe_work_create(env, memory, m->options.training);
  m->embed = moe_param_view(&m->params, m->weights, "model.embed_tokens.weight", -1, d->vocab);
  m->dembed = moe_param_view(&m->params, m->grads, "model.embed_tokens.weight", -1, d->vocab);
  m->head.gain = moe_param_view(&m->params, m->weights, "model.norm.weight", -1, d->hidden);
  m->head.weight = moe_param_view(&m->params, m->weights, "lm_head.weight", -1, d->vocab);
  m->head.dgain = moe_param_view(&m->params, m->grads, "model.norm.weight", -1, d->hidden);
  m->head.dweight = moe_param_view(&m->params, m->grads, "lm_head.weight", -1, d->vocab);
  moe_head_create(env, &memory->arena[MOE_MEM_WORK], &m->head);
  create_scratch(m, memory);
  if (measuring(memory)) return MOE_OK;
  MOE_TRY(create_pinned(m));
  return moe_rope_table_upload(m->env.dev, m->config.model.rope_base, m->config.model.rope_alpha,
                               m->env.rope_table);
}

moe_status moe_model_create(const moe_model_options *options, moe_memory *memory, moe_model **out) {
  moe_model *m = calloc(1, sizeof *m);
  if (!m) return moe_fail(MOE_NO_MEMORY, "out of memory: model");
  m->config = *options->config;
  m->options = *options;
  m->options.config = &m->config;
  create_env(m);
  moe_status status = create(m, memory);
  if (status != MOE_OK) {
    moe_model_destroy(m);
    m = NULL;
  }
  *out = m;
  return status;
}

void moe_model_destroy(moe_model *m) {
  if (!m) return;
  moe_pool_gather_release(&m->gather);
  moe_device_free_host(m->env.dev, m->stats_host);
  moe_device_free_host(m->env.dev, m->loss_host);
  moe_device_free_host(m->env.dev, m->staged);
  moe_device_free_host(m->env.dev, m->env.rows_host);
  for (int i = 0; i < MOE_STAGED; i++) moe_device_forget(m->env.dev, &m->uploaded[i]);
  moe_device_forget(m->env.dev, &m->env.rows_asked);
  for (int i = 0; i < m->stash_count; i++) moe_stash_destroy(&m->stashes[i]);
  if (moe_tensor_present(m->env.forced)) moe_device_free(m->env.dev, m->env.forced.data);
  moe_dispatcher_destroy(m->env.dispatcher);
  moe_params_destroy(&m->params);
  free(m->blocks);
  free(m->stashes);
  free(m->load);
  free(m->bias_host);
  free(m);
}

/* ---- what others need to see
 * --------------------------------------------------------------------- */

const moe_params *moe_model_params(const moe_model *m) {
  return &m->params;
}

moe_tensor moe_model_weights(const moe_model *m, moe_pool_kind pool) {
  return m->weights[pool];
}

moe_tensor moe_model_grads(const moe_model *m, moe_pool_kind pool) {
  return m->grads[pool];
}

moe_tensor moe_model_grad_squares(const moe_model *m) {
  bool as_made = moe_tensor_present(m->env.grad_squares);
  return as_made ? m->env.grad_squares : m->sums[MOE_POOL_EXPERT].squares;
}

moe_grad_pool *moe_model_grad_pools(moe_model *m) {
  return m->sums;
}

moe_pool_gather *moe_model_gather(moe_model *m, moe_pool_kind pool) {
  return pool == MOE_POOL_EXPERT && m->gather.dev ? &m->gather : NULL;
}

float *moe_model_router_bias(moe_model *m) {
  return m->bias_host;
}

moe_status moe_model_router_bias_changed(moe_model *m) {
  return moe_device_upload(m->env.dev, m->bias.data, m->bias_host, moe_tensor_bytes(m->bias));
}

/* Token t of this rank begins at expert t + rank, so that ranks' rows are alike too. */
moe_status moe_model_force_balance(moe_model *m) {
  moe_block_env *env = &m->env;
  int64_t k = env->dims.top_k, n = env->tokens * k, first = moe_comm_rank(m->options.mesh->world);
  int32_t *experts = malloc((size_t)n * sizeof *experts);
  if (!experts) return moe_fail(MOE_NO_MEMORY, "out of memory: balanced experts");
  for (int64_t i = 0; i < n; i++)
    experts[i] = (int32_t)((i / k + first + i % k * (env->dims.experts / k)) % env->dims.experts);
  if (!moe_tensor_present(env->forced))
    env->forced = moe_tensor_2d(moe_device_alloc(env->dev, n * 4), MOE_I32, env->tokens, k);
  moe_status status = moe_tensor_present(env->forced)
                          ? moe_device_upload(env->dev, env->forced.data, experts, n * 4)
                          : moe_fail(MOE_NO_MEMORY, "out of memory: balanced experts");
  if (status == MOE_OK) status = moe_device_sync(env->dev);
  free(experts);
  return status;
}

void moe_model_exchange_cost(moe_model *m, double *seconds, double *bytes) {
  moe_dispatch_cost(m->env.dispatcher, seconds, bytes);
}

const char *moe_model_exchange_name(const moe_model *m) {
  return moe_dispatch_exchange_name(m->env.dispatcher);
}

void moe_model_recompute(const moe_model *m, int64_t layers[MOE_RECOMPUTE_AUTO]) {
  for (int i = 0; i < MOE_RECOMPUTE_AUTO; i++) layers[i] = 0;
  for (int64_t l = 0; l < m->env.dims.layers; l++) layers[m->blocks[l].recompute]++;
}

/* Values to the device, in the type they have there. Waits. */
static moe_status store(moe_device *dev, moe_tensor to, const float *values) {
  void *converted = malloc((size_t)moe_tensor_bytes(to));
  if (!converted) return moe_fail(MOE_NO_MEMORY, "out of memory: values of a parameter");
  moe_convert(values, MOE_F32, converted, to.dtype, moe_tensor_count(to));
  moe_status status = moe_device_upload(dev, to.data, converted, moe_tensor_bytes(to));
  if (status == MOE_OK) status = moe_device_sync(dev);
  free(converted);
  return status;
}

/* The part of a pool's elements [at, at + count) that lies in `master`, which begins at the pool's
 * element master_begin; *skip: how many of the elements come before it. Absent if there is none. */
static moe_tensor master_part(moe_tensor master, int64_t master_begin, int64_t at, int64_t count,
                              int64_t *skip) {
  if (!moe_tensor_present(master)) return master;
  int64_t from = moe_max64(at, master_begin);
  int64_t to = moe_min64(at + count, master_begin + master.shape[0]);
  if (from >= to) return moe_tensor_none();
  *skip = from - at;
  return moe_tensor_rows(master, from - master_begin, to - from);
}

moe_status moe_model_write_param(moe_model *m, const moe_param *p, int64_t begin, int64_t count,
                                 const float *values, moe_tensor master, int64_t master_begin) {
  int64_t skip = 0, at = p->offset + begin;
  moe_tensor part = master_part(master, master_begin, at, count, &skip);
  if (moe_tensor_present(part)) MOE_TRY(store(m->env.dev, part, values + skip));
  return store(m->env.dev, moe_tensor_rows(m->weights[p->row->pool], at, count), values);
}

/* A draw costs less than reading it back would: the master's are made again. */
moe_status moe_model_init_pool(moe_model *m, moe_pool_kind pool, uint64_t seed, moe_tensor master,
                               int64_t master_begin) {
  double std = m->config.model.init_std;
  for (int i = 0; i < m->params.count; i++) {
    const moe_param *p = &m->params.list[i];
    if (p->row->pool != pool) continue;
    int64_t skip = 0;
    moe_tensor weights = moe_tensor_rows(m->weights[pool], p->offset, p->count);
    moe_tensor part = master_part(master, master_begin, p->offset, p->count, &skip);
    MOE_TRY(moe_param_init(m->env.dev, p, &m->env.dims, std, seed, 0, weights));
    if (moe_tensor_present(part))
      MOE_TRY(moe_param_init(m->env.dev, p, &m->env.dims, std, seed, skip, part));
  }
  return MOE_OK;
}
