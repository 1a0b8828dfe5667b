/* Setting a generator up: weights without gradients, the cache, and buffers for one pass. */
#include <stdlib.h>
#include <string.h>

#include "core/base/integers.h"
#include "core/model/generate_state.h"

static bool measuring(const moe_memory *memory) {
  return memory->arena[MOE_MEM_WEIGHTS].measuring;
}

int64_t moe_generator_sorted_rows(const moe_generator *g, int64_t tokens) {
  int64_t owned = moe_range_size(g->params.experts);
  int64_t rows = tokens * moe_min64(g->dims.top_k, owned) + owned * (g->pad - 1);
  return moe_round_up64(rows, g->pad);
}

static moe_status check_sizes(const moe_generator *g) {
  const moe_generator_options *o = &g->options;
  if (o->batch < 1 || o->room < 1 || o->chunk < 1)
    return moe_fail(MOE_INVALID, "generator of %lld slots, %lld positions, %lld tokens a pass",
                    (long long)o->batch, (long long)o->room, (long long)o->chunk);
  double cache = moe_kv_cache_bytes(&g->dims, o->batch, o->room, g->dtype);
  double widest = (double)moe_max64(g->dims.vocab, 3 * g->dims.ffn + 2 * g->dims.hidden);
  double work = (double)g->most_tokens * (double)g->dims.top_k * widest * 4.0;
  if (cache + work < 1e15) return MOE_OK;
  return moe_fail(MOE_NO_MEMORY,
                  "the key/value cache of %lld texts of %lld tokens needs %.3g bytes, a pass of "
                  "%lld tokens up to %.3g: generate fewer or shorter texts at a time",
                  (long long)o->batch, (long long)o->room, cache, (long long)g->most_tokens, work);
}

static moe_status create_weights(moe_generator *g, moe_memory *memory) {
  moe_arena *arena = &memory->arena[MOE_MEM_WEIGHTS];
  const moe_dims *d = &g->dims;
  MOE_TRY(moe_params_create(d, g->options.mesh->owned, &g->params));
  for (int i = 0; i < MOE_POOLS; i++) {
    moe_dtype dtype = moe_pool_dtype((moe_pool_kind)i, g->dtype);
    g->pools[i] = moe_arena_tensor_1d(arena, dtype, g->params.pool_count[i]);
  }
  g->layers = calloc((size_t)d->layers, sizeof *g->layers);
  g->length = calloc((size_t)g->options.batch, sizeof *g->length);
  if (!g->layers || !g->length)
    return moe_fail(MOE_NO_MEMORY, "out of memory: tables of %lld layers", (long long)d->layers);
  for (int64_t l = 0; l < d->layers; l++) g->layers[l] = moe_layer_views(&g->params, g->pools, l);
#define VIEW(name, rows) moe_param_view(&g->params, g->pools, name, -1, rows)
  g->embed = VIEW("model.embed_tokens.weight", d->vocab);
  g->gain = VIEW("model.norm.weight", d->hidden);
  g->head = VIEW("lm_head.weight", d->vocab);
#undef VIEW
  if (g->options.router_bias) g->bias = moe_arena_tensor_2d(arena, MOE_F32, d->layers, d->experts);
  return MOE_OK;
}

/* Rows of logits made at a time: those of a step, and as many as fit in 64 MiB. */
static int64_t logit_rows(const moe_generator *g) {
  int64_t fit = (64LL << 20) / (g->dims.vocab * 4);
  return moe_max64(g->options.batch, moe_min64(g->most_tokens, moe_max64(fit, 1)));
}

static void create_work(moe_generator *g, moe_arena *arena) {
  moe_generator_work *w = &g->work;
  const moe_dims *d = &g->dims;
  moe_dtype act = g->dtype;
  int64_t m = g->most_tokens, c = moe_generator_sorted_rows(g, m);
  w->tokens = moe_arena_tensor_1d(arena, MOE_I32, m);
  w->positions = moe_arena_tensor_1d(arena, MOE_I32, m);
  w->targets = moe_arena_tensor_1d(arena, MOE_I32, m);
  w->x = moe_arena_tensor_2d(arena, act, m, d->hidden);
  w->sum = moe_arena_tensor_2d(arena, act, m, d->hidden);
  w->h = moe_arena_tensor_2d(arena, act, m, d->hidden);
  w->delta = moe_arena_tensor_2d(arena, act, m, d->hidden);
  w->rstd = moe_arena_tensor_1d(arena, MOE_F32, m);
  w->qkv = moe_arena_tensor_2d(arena, act, m, (d->heads + 2 * d->kv_heads) * d->head_dim);
  w->attended = moe_arena_tensor_2d(arena, act, m, d->heads * d->head_dim);
  w->probs = moe_arena_tensor_2d(arena, MOE_F32, m, d->experts);
  w->router_lse = moe_arena_tensor_1d(arena, MOE_F32, m);
  w->experts = moe_arena_tensor_2d(arena, MOE_I32, m, d->top_k);
  w->gates = moe_arena_tensor_2d(arena, MOE_F32, m, d->top_k);
  w->stats = moe_arena_tensor_2d(arena, MOE_F32, 1, 2 * d->experts + 1);
  w->offsets = moe_arena_tensor_1d(arena, MOE_I32, moe_range_size(g->params.experts) + 1);
  w->pair = moe_arena_tensor_1d(arena, MOE_I32, c);
  w->slot = moe_arena_tensor_2d(arena, MOE_I32, m, d->top_k);
  w->xs = moe_arena_tensor_2d(arena, act, c, d->hidden);
  w->ys = moe_arena_tensor_2d(arena, act, c, d->hidden);
  w->gu = moe_arena_tensor_2d(arena, act, c, 2 * d->ffn);
  w->a = moe_arena_tensor_2d(arena, act, c, d->ffn);
  w->sorted_gates = moe_arena_tensor_1d(arena, MOE_F32, c);
  w->hidden = moe_arena_tensor_2d(arena, act, g->few * d->top_k, d->ffn);
  w->few_terms = w->terms = moe_tensor_none();
  if (g->options.mesh->ep > 1) {
    w->few_terms = moe_arena_tensor_2d(arena, MOE_F32, g->few * d->top_k, d->hidden);
    w->terms = moe_arena_tensor_2d(arena, act, m * d->top_k, d->hidden);
  }
  w->logits = moe_arena_tensor_2d(arena, MOE_F32, logit_rows(g), d->vocab);
  w->loss = moe_arena_tensor_1d(arena, MOE_F64, 2);
  g->token = moe_arena_tensor_1d(arena, MOE_I32, g->options.batch);
  g->lengths = moe_arena_tensor_1d(arena, MOE_I32, g->options.batch);
  g->streams = moe_arena_tensor_1d(arena, MOE_I32, g->options.batch);
  g->running = moe_arena_tensor_1d(arena, MOE_I32, g->options.batch);
  /* One row more than positions: a slot that is full may still take part in a step. */
  g->rope_table = moe_arena_tensor_2d(arena, MOE_F32, g->options.room + 1, d->head_dim);
}

/* Attention divides its work by its size, so a small pass may ask for more than a large one: every
 * number of slots and of tokens for each is asked about. */
static int64_t attention_scratch(const moe_generator *g) {
  const moe_dims *d = &g->dims;
  int64_t most = 0;
  for (int64_t slots = 1; slots <= g->options.batch; slots++) {
    for (int64_t n = 1; n <= g->most_tokens / slots; n++) {
      moe_attention_shape s = {slots, n, d->heads, d->kv_heads, d->head_dim};
      int64_t bytes = moe_attention_cached_scratch(g->options.dev, s, g->options.room, g->dtype);
      most = moe_max64(most, bytes);
    }
  }
  return most;
}

/* The largest of what any operation of any pass asks for. */
static void create_scratch(moe_generator *g, moe_memory *memory) {
  moe_device *dev = g->options.dev;
  int64_t rows = moe_generator_sorted_rows(g, g->most_tokens);
  int64_t experts = moe_expert_scratch(dev, rows, g->dims.hidden, g->dims.ffn, g->dtype);
  int64_t bytes = moe_max64(experts, attention_scratch(g));
  void *data = moe_arena_take(&memory->arena[MOE_MEM_SCRATCH], bytes);
  if (!measuring(memory)) moe_device_set_scratch(dev, data, bytes);
}

static moe_status create_host(moe_generator *g) {
  int64_t words = 3 * g->most_tokens, drawn = MOE_STEPS_KEPT * g->options.batch;
  g->staged = moe_device_alloc_host(g->options.dev, words * 4);
  g->drawn = moe_device_alloc_host(g->options.dev, drawn * 4);
  g->cells = moe_device_alloc_host(g->options.dev, MOE_CELLS * 4);
  if (!g->staged || !g->drawn || !g->cells)
    return moe_fail(MOE_NO_MEMORY, "out of memory: %lld tokens on their way", (long long)words);
  memset(g->cells, 0, MOE_CELLS * 4);
  return MOE_OK;
}

static moe_status create(moe_generator *g, moe_memory *memory) {
  MOE_TRY(check_sizes(g));
  MOE_TRY(create_weights(g, memory));
  g->cache = moe_kv_cache_create(&memory->arena[MOE_MEM_CACHE], &g->dims, g->options.batch,
                                 g->options.room, g->dtype);
  create_work(g, &memory->arena[MOE_MEM_WORK]);
  create_scratch(g, memory);
  if (measuring(memory)) return MOE_OK;
  MOE_TRY(create_host(g));
  MOE_TRY(moe_generator_clear(g, 0, g->options.batch));
  const moe_config *c = g->options.config;
  return moe_rope_table_upload(g->options.dev, c->model.rope_base, c->model.rope_alpha,
                               g->rope_table);
}

moe_status moe_generator_create(const moe_generator_options *options, moe_memory *memory,
                                moe_generator **out) {
  enum { FEW = 32 }; /* tokens for which moe_experts_decode reads an expert once */
  moe_generator *g = calloc(1, sizeof *g);
  *out = NULL;
  if (!g) return moe_fail(MOE_NO_MEMORY, "out of memory: generator");
  g->options = *options;
  g->dims = moe_dims_of(options->config);
  g->norm_eps = options->config->model.norm_eps;
  g->dtype = moe_config_compute_dtype(options->config);
  g->most_tokens = moe_max64(options->chunk, options->batch);
  g->few = moe_max64(FEW, options->batch);
  g->pad = moe_device_what(options->dev) == MOE_DEVICE_CUDA ? 128 : 1;
  moe_status status = create(g, memory);
  g->options.config = NULL; /* the caller's */
  if (status == MOE_OK)
    *out = g;
  else
    moe_generator_destroy(g);
  return status;
}

void moe_generator_destroy(moe_generator *g) {
  if (!g) return;
  moe_device *dev = g->options.dev;
  moe_graph_destroy(dev, g->graph);
  for (int i = 0; i < MOE_STEPS_KEPT; i++) moe_device_forget(dev, &g->done[i]);
  moe_device_free_host(dev, g->staged);
  moe_device_free_host(dev, g->drawn);
  moe_device_free_host(dev, g->cells);
  moe_params_destroy(&g->params);
  free(g->layers);
  free(g->length);
  free(g);
}

int64_t moe_generator_batch(const moe_generator *g) {
  return g->options.batch;
}

const moe_params *moe_generator_params(const moe_generator *g) {
  return &g->params;
}

const moe_tensor *moe_generator_pools(const moe_generator *g) {
  return g->pools;
}

moe_status moe_generator_set_router_bias(moe_generator *g, const float *bias) {
  if (!moe_tensor_present(g->bias))
    return moe_fail(MOE_INVALID, "generator was set up without a selection bias");
  MOE_TRY(moe_device_upload(g->options.dev, g->bias.data, bias, moe_tensor_bytes(g->bias)));
  return moe_device_sync(g->options.dev);
}
