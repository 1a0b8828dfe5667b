/* Where weights, gradients and what layers keep for backward lie.
 *
 * A layer's expert gradients live from its backward to the update, what it keeps of its experts
 * from its forward to its backward. So, unless other micro-batches add to them, gradients lie over
 * what the last layers keep, which backward has done with when it gets there
 * (docs/decisions/0010):
 *
 *     | kept by layer p | ... | by layer L - 2 | by layer L - 1 | own         |
 *       | gradients of layer 0 | of layer 1 | ...             | of layer L - 1 |
 *
 * The room of their own lets no layer's gradients reach what it or one before it keeps. */
#include "core/base/integers.h"
#include "core/model/model_state.h"

moe_comm *moe_model_pool_group(const moe_model *m, moe_pool_kind pool) {
  return pool == MOE_POOL_EXPERT ? m->options.mesh->replicas : m->options.mesh->world;
}

/* ---- what is recomputed and shared --------------------------------------------------------- */

/* Layers that recompute more than SwiGLU share a buffer. The last that uses it forward, which comes
 * first backward, finds there what it left: it shares, but does not recompute. */
int64_t moe_model_recomputing(const moe_config *c) {
  int64_t all = c->model.num_layers, asked = c->train.recompute_layers;
  if (c->train.recompute == MOE_RECOMPUTE_NONE) return 0;
  if (asked == 0) asked = all;
  return c->train.recompute == MOE_RECOMPUTE_SWIGLU ? asked : moe_min64(asked, all - 1);
}

/* So many layers, the first ones, share a gu, and a stash where whole blocks are recomputed. */
static int64_t sharing(const moe_model *m) {
  if (!m->options.training) return m->env.dims.layers;
  if (m->config.train.recompute <= MOE_RECOMPUTE_SWIGLU) return 0;
  return moe_model_recomputing(&m->config) + 1;
}

static int recompute_of(const moe_model *m, int64_t layer) {
  int mode = m->config.train.recompute;
  if (!m->options.training) return MOE_RECOMPUTE_BLOCK; /* one stash for all */
  if (layer < moe_model_recomputing(&m->config)) return mode;
  return mode <= MOE_RECOMPUTE_SWIGLU ? MOE_RECOMPUTE_NONE : MOE_RECOMPUTE_SWIGLU;
}

/* What a layer keeps of its experts' first round. */
static void take_kept(const moe_block_env *env, moe_block *b, moe_arena *arena) {
  b->gu = moe_arena_tensor_2d(arena, env->dtype, env->round_rows, 2 * env->dims.ffn);
  if (b->recompute != MOE_RECOMPUTE_NONE) return; /* those of others are in moe_work */
  b->xs = moe_arena_tensor_2d(arena, env->dtype, env->round_rows, env->dims.hidden);
  b->a = moe_arena_tensor_2d(arena, env->dtype, env->round_rows, env->dims.ffn);
  b->y = moe_arena_tensor_2d(arena, env->dtype, env->round_rows, env->dims.hidden);
}

/* ---- weights and gradients ----------------------------------------------------------------- */

static int64_t padded(const moe_model *m, moe_pool_kind pool) {
  return moe_pool_padded(m->params.pool_count[pool], moe_comm_size(moe_model_pool_group(m, pool)));
}

moe_range moe_model_experts_of(const moe_model *m, int64_t l) {
  moe_tensor pool = m->weights[MOE_POOL_EXPERT];
  int64_t size = moe_dtype_size(pool.dtype), end = moe_tensor_count(pool);
  const char *begin = pool.data, *next = begin + end * size;
  if (l + 1 < m->env.dims.layers) next = m->blocks[l + 1].w.w13.data;
  return (moe_range){((const char *)m->blocks[l].w.w13.data - begin) / size, (next - begin) / size};
}

/* Whether the experts' gradients may lie over other things: a step stores each of them once, and
 * between parameters, where nobody writes, there is nothing. */
static bool may_overlie(const moe_model *m) {
  int64_t count = 0;
  for (int i = 0; i < m->params.count; i++)
    if (m->params.list[i].row->pool == MOE_POOL_EXPERT) count += m->params.list[i].count;
  return m->options.micro_batches == 1 && count == m->params.pool_count[MOE_POOL_EXPERT];
}

/* Memory that gradients share with what layers from `first` on keep. */
typedef struct {
  int64_t first;
  int64_t kept, own; /* bytes: of those layers, and then of gradients alone */
} overlay;

/* From the last layer on down, until gradients of `bytes` bytes have room enough. */
static overlay plan_overlay(const moe_model *m, int64_t bytes, int64_t element) {
  overlay o = {.first = m->env.dims.layers};
  int64_t least = may_overlie(m) ? sharing(m) : o.first;
  while (o.first > least && o.kept + o.own < bytes) {
    moe_block b = m->blocks[--o.first];
    moe_arena count = {.measuring = true};
    int64_t made = bytes - moe_model_experts_of(m, o.first).begin * element;
    o.own = moe_max64(o.own, moe_round_up64(made - o.kept, MOE_ARENA_ALIGN));
    take_kept(&m->env, &b, &count);
    o.kept += count.used;
  }
  o.own = moe_max64(o.own, bytes - o.kept);
  return o;
}

/* The sums of a pool's gradients over its ranks. Staging lies with the gradients, because what
 * travels together shares one piece of memory with the other ranks (engine.c). */
static moe_grad_pool sums_of(const moe_model *m, moe_pool_kind pool, moe_memory *memory,
                             moe_arena *with) {
  const moe_mesh *mesh = m->options.mesh;
  moe_grad_pool sums = {.grads = m->grads[pool],
                        .group = moe_model_pool_group(m, pool),
                        .shard = m->config.parallel.zero1,
                        .beside =
                            pool == MOE_POOL_EXPERT ? mesh->replicas_beside : mesh->world_beside};
  if (!sums.shard || !sums.beside) return sums;
  moe_dtype dtype = sums.grads.dtype;
  int64_t n = moe_pool_staging(sums.grads.shape[0], moe_comm_size(sums.beside), dtype);
  sums.staging = moe_arena_tensor_1d(with, dtype, n);
  sums.squares = moe_arena_tensor_1d(&memory->arena[MOE_MEM_WORK], MOE_F64, 1);
  return sums;
}

/* Gradients of all pools; of the experts' the memory below them, for layers from *first on. */
static moe_arena create_grads(moe_model *m, moe_memory *memory, int64_t *first) {
  moe_arena *plain = &memory->arena[MOE_MEM_GRADIENTS];
  for (int i = 0; i < MOE_POOLS; i++) {
    moe_pool_kind pool = (moe_pool_kind)i;
    if (pool == MOE_POOL_EXPERT) continue;
    m->grads[i] = moe_arena_tensor_1d(plain, MOE_F32, padded(m, pool));
    m->sums[i] = sums_of(m, pool, memory, plain);
  }
  moe_tensor grads =
      moe_tensor_1d(NULL, moe_config_grad_dtype(&m->config), padded(m, MOE_POOL_EXPERT));
  int64_t bytes = moe_round_up64(moe_tensor_bytes(grads), MOE_ARENA_ALIGN);
  overlay o = plan_overlay(m, bytes, moe_dtype_size(grads.dtype));
  moe_arena *arena = o.kept > 0 ? &memory->arena[MOE_MEM_OVERLAID] : plain;
  char *base = moe_arena_take(arena, o.kept + o.own);
  grads.data = base + o.kept + o.own - bytes;
  m->grads[MOE_POOL_EXPERT] = grads;
  m->sums[MOE_POOL_EXPERT] = sums_of(m, MOE_POOL_EXPERT, memory, arena);
  *first = o.first;
  return (moe_arena){.base = base, .size = o.kept, .measuring = arena->measuring};
}

static void create_gather_and_squares(moe_model *m, moe_memory *memory) {
  const moe_grad_pool *experts = &m->sums[MOE_POOL_EXPERT];
  if (moe_tensor_present(experts->staging))
    m->gather = moe_pool_gather_of(m->env.dev, experts, m->weights[MOE_POOL_EXPERT]);
  bool alone = moe_comm_size(moe_model_pool_group(m, MOE_POOL_EXPERT)) == 1;
  if (m->options.training && m->options.micro_batches == 1 && alone)
    m->env.grad_squares = moe_arena_tensor_1d(&memory->arena[MOE_MEM_WORK], MOE_F64, 1);
  m->sums[MOE_POOL_EXPERT].counted = moe_tensor_present(m->env.grad_squares);
}

/* ---- blocks -------------------------------------------------------------------------------- */

/* Where layer l's router writes its statistics: a row is [L, groups (2E + 1)], then dropped [L]. */
static void point_stats(moe_model *m, int64_t l) {
  int64_t layers = m->env.dims.layers, experts = m->env.dims.experts;
  int64_t width = moe_model_stats_width(m);
  float *base = (float *)moe_tensor_rows(m->stats, m->options.micro_batches - 1, 1).data;
  m->blocks[l].stats = moe_tensor_2d(base + l * width, MOE_F32, m->env.groups, 2 * experts + 1);
  m->blocks[l].dropped = moe_tensor_1d(base + layers * width + l, MOE_F32, 1);
}

/* The stash of blocks[l], and what it keeps beside it: its own, or those of the first layer. */
static moe_status create_block(moe_model *m, int64_t l, moe_memory *memory, moe_arena *kept) {
  moe_block *b = &m->blocks[l], *first = &m->blocks[0];
  bool shares = l > 0 && l < sharing(m);
  if (shares)
    b->gu = first->gu;
  else
    take_kept(&m->env, b, kept);
  if (shares && first->recompute == MOE_RECOMPUTE_BLOCK) {
    b->stash = first->stash;
    return MOE_OK;
  }
  b->stash = &m->stashes[m->stash_count++];
  return moe_stash_create(&m->env, memory, b->stash);
}

/* Layers from first_overlaid on keep in `overlaid` what they keep of their experts. */
static moe_status create_blocks(moe_model *m, moe_memory *memory, moe_arena *overlaid,
                                int64_t first_overlaid) {
  moe_block_env *env = &m->env;
  moe_arena *arena = &memory->arena[MOE_MEM_STASH];
  for (int64_t l = 0; l < env->dims.layers; l++) {
    moe_block *b = &m->blocks[l];
    b->g = moe_layer_views(&m->params, m->grads, l);
    bool own_x = m->options.training || l == 0;
    b->x = own_x ? moe_arena_tensor_2d(arena, env->dtype, env->tokens, env->dims.hidden)
                 : m->blocks[0].x;
    MOE_TRY(create_block(m, l, memory, l < first_overlaid ? arena : overlaid));
    point_stats(m, l);
    if (moe_tensor_present(m->bias))
      b->bias = moe_tensor_1d(moe_tensor_rows(m->bias, l, 1).data, MOE_F32, env->dims.experts);
  }
  return MOE_OK;
}

moe_status moe_model_lay_out(moe_model *m, moe_memory *memory) {
  moe_arena overlaid = {.measuring = true};
  int64_t first_overlaid = m->env.dims.layers;
  for (int i = 0; i < MOE_POOLS; i++) {
    moe_dtype dtype = moe_pool_dtype((moe_pool_kind)i, m->env.dtype);
    m->weights[i] =
        moe_arena_tensor_1d(&memory->arena[MOE_MEM_WEIGHTS], dtype, padded(m, (moe_pool_kind)i));
  }
  for (int64_t l = 0; l < m->env.dims.layers; l++) {
    m->blocks[l].index = l;
    m->blocks[l].recompute = recompute_of(m, l);
    m->blocks[l].w = moe_layer_views(&m->params, m->weights, l);
  }
  if (m->options.training) overlaid = create_grads(m, memory, &first_overlaid);
  create_gather_and_squares(m, memory);
  return create_blocks(m, memory, &overlaid, first_overlaid);
}
