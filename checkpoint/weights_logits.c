/* A forward pass that streams its weights.
 *
 * The activations of a few dozen tokens are small, the weights are not: so each tensor is read into
 * one buffer when its turn comes, used for all tokens, and forgotten. An expert's three matrices,
 * or a part of the embedding or head, are the most that is ever in memory. */
#include <inttypes.h>
#include <string.h>

#include "checkpoint/proof.h"
#include "core/base/arena.h"
#include "core/base/integers.h"
#include "kernels/ops.h"

#define LAYER "model.layers.{L}."
#define EXPERT LAYER "block_sparse_moe.experts.{E}."

/* Elements of the embedding and the head read at a time, in whole rows. */
enum { PART = 4 << 20 };

/* Shape legend: ops.h. T = batch * seq. */
typedef struct {
  moe_weights *w;
  const moe_weights_watch *watch;
  moe_device *dev;
  int64_t batch, seq, tokens;
  float *weight;           /* the tensors in use */
  moe_tensor gain;         /* [D] */
  moe_tensor x, delta, h;  /* [T, D] */
  moe_tensor rstd;         /* [T] */
  moe_tensor qkv;          /* [T, (H+2G)d] */
  moe_tensor attended;     /* [T, H d] */
  moe_tensor lse;          /* [B, H, S] */
  moe_tensor positions;    /* [T] */
  moe_tensor table;        /* [S, d] */
  moe_tensor bias;         /* [E], absent without one */
  moe_tensor probs;        /* [T, E] */
  moe_tensor router_lse;   /* [T] */
  moe_tensor experts;      /* [T, K] */
  moe_tensor gates;        /* [T, K] */
  moe_tensor stats;        /* [1, 2E + 1] */
  moe_tensor offsets;      /* [E + 1] */
  moe_tensor pair, slot;   /* [T K], [T, K] */
  moe_tensor xs, ys;       /* [T, D], [T K, D] */
  moe_tensor gu, a;        /* [T, 2F], [T, F] */
  moe_tensor sorted_gates; /* [T] */
  moe_tensor logits;       /* [T, rows of a part] */
} pass;

/* Rows of the embedding or head in one part. */
static int64_t part_rows(const moe_dims *d) {
  int64_t rows = moe_max64(1, PART / d->hidden);
  return moe_min64(rows, d->vocab);
}

static int64_t weight_room(const moe_dims *d) {
  int64_t attention = (d->heads + 2 * d->kv_heads) * d->head_dim * d->hidden;
  int64_t expert = 3 * d->ffn * d->hidden;
  return moe_max64(moe_max64(attention, expert),
                   moe_max64(part_rows(d) * d->hidden, d->experts * d->hidden));
}

/* ---- set-up: runs twice, to measure and to take (arena.h) --------------------------------------
 */

static void take_buffers(pass *p, moe_arena *arena) {
  const moe_dims *d = &p->w->dims;
  int64_t t = p->tokens, k = d->top_k, hidden = d->hidden;
  int64_t heads = d->heads * d->head_dim, all_heads = heads + 2 * d->kv_heads * d->head_dim;
  p->weight = moe_arena_take(arena, weight_room(d) * (int64_t)sizeof(float));
  p->gain = moe_arena_tensor_1d(arena, MOE_F32, hidden);
  p->x = moe_arena_tensor_2d(arena, MOE_F32, t, hidden);
  p->delta = moe_arena_tensor_2d(arena, MOE_F32, t, hidden);
  p->h = moe_arena_tensor_2d(arena, MOE_F32, t, hidden);
  p->rstd = moe_arena_tensor_1d(arena, MOE_F32, t);
  p->qkv = moe_arena_tensor_2d(arena, MOE_F32, t, all_heads);
  p->attended = moe_arena_tensor_2d(arena, MOE_F32, t, heads);
  p->lse = moe_arena_tensor_1d(arena, MOE_F32, t * d->heads);
  p->lse = moe_tensor_3d(p->lse.data, MOE_F32, p->batch, d->heads, p->seq);
  p->positions = moe_arena_tensor_1d(arena, MOE_I32, t);
  p->table = moe_arena_tensor_2d(arena, MOE_F32, p->seq, d->head_dim);
  p->probs = moe_arena_tensor_2d(arena, MOE_F32, t, d->experts);
  p->router_lse = moe_arena_tensor_1d(arena, MOE_F32, t);
  p->experts = moe_arena_tensor_2d(arena, MOE_I32, t, k);
  p->gates = moe_arena_tensor_2d(arena, MOE_F32, t, k);
  p->stats = moe_arena_tensor_2d(arena, MOE_F32, 1, 2 * d->experts + 1);
  p->offsets = moe_arena_tensor_1d(arena, MOE_I32, d->experts + 1);
  p->pair = moe_arena_tensor_1d(arena, MOE_I32, t * k);
  p->slot = moe_arena_tensor_2d(arena, MOE_I32, t, k);
  p->xs = moe_arena_tensor_2d(arena, MOE_F32, t, hidden);
  p->ys = moe_arena_tensor_2d(arena, MOE_F32, t * k, hidden);
  p->gu = moe_arena_tensor_2d(arena, MOE_F32, t, 2 * d->ffn);
  p->a = moe_arena_tensor_2d(arena, MOE_F32, t, d->ffn);
  p->sorted_gates = moe_arena_tensor_1d(arena, MOE_F32, t);
  p->logits = moe_arena_tensor_2d(arena, MOE_F32, t, part_rows(d));
  moe_attention_shape shape = {p->batch, p->seq, d->heads, d->kv_heads, d->head_dim};
  int64_t scratch = moe_max64(moe_attention_scratch(p->dev, shape, MOE_F32),
                              moe_expert_scratch(p->dev, t, hidden, d->ffn, MOE_F32));
  void *room = moe_arena_take(arena, scratch);
  if (!arena->measuring) moe_device_set_scratch(p->dev, room, scratch);
}

static void fill_constants(pass *p) {
  int32_t *position = p->positions.data;
  for (int64_t t = 0; t < p->tokens; t++) position[t] = (int32_t)(t % p->seq);
  moe_rope_table_fill(p->w->rope_base, p->w->rope_alpha, p->seq, p->w->dims.head_dim,
                      p->table.data);
}

/* ---- reading -----------------------------------------------------------------------------------
 */

static moe_status load_range(pass *p, const moe_param *tensor, int64_t begin, int64_t count,
                             float *out) {
  const moe_weights_watch *watch = p->watch;
  if (watch && watch->stop && *watch->stop)
    return moe_fail(MOE_STOPPED, "%s: stopped on request", p->w->name);
  MOE_TRY(moe_weights_read(p->w, tensor, begin, count, out));
  return watch && watch->seen ? watch->seen(watch->context, tensor, begin, count, out) : MOE_OK;
}

/* A whole tensor, named by the table's pattern; *out is advanced past it. */
static moe_status load(pass *p, const char *pattern, int64_t layer, int64_t expert, float **out) {
  const moe_param *tensor = moe_params_at(&p->w->params, pattern, layer, expert);
  if (!tensor) return moe_fail(MOE_INVALID, "%s: no parameter %s", p->w->name, pattern);
  MOE_TRY(load_range(p, tensor, 0, tensor->count, *out));
  *out += tensor->count;
  return MOE_OK;
}

static moe_status load_gain(pass *p, const char *pattern, int64_t layer) {
  float *at = p->gain.data;
  return load(p, pattern, layer, -1, &at);
}

/* ---- the model ---------------------------------------------------------------------------------
 */

static moe_status embed(pass *p, const int32_t *tokens) {
  const moe_param *e = moe_params_at(&p->w->params, "model.embed_tokens.weight", -1, -1);
  int64_t hidden = p->w->dims.hidden, vocab = p->w->dims.vocab, step = part_rows(&p->w->dims);
  for (int64_t row = 0; row < vocab; row += step) {
    int64_t rows = vocab - row < step ? vocab - row : step;
    MOE_TRY(load_range(p, e, row * hidden, rows * hidden, p->weight));
    for (int64_t t = 0; t < p->tokens; t++)
      if (tokens[t] >= row && tokens[t] < row + rows)
        memcpy((float *)p->x.data + t * hidden, p->weight + (tokens[t] - row) * hidden,
               (size_t)hidden * sizeof(float));
  }
  return MOE_OK;
}

/* h -> delta */
static moe_status attend(pass *p, int64_t layer) {
  const moe_dims *d = &p->w->dims;
  moe_attention_shape shape = {p->batch, p->seq, d->heads, d->kv_heads, d->head_dim};
  float *at = p->weight;
  MOE_TRY(load(p, LAYER "self_attn.q_proj.weight", layer, -1, &at));
  MOE_TRY(load(p, LAYER "self_attn.k_proj.weight", layer, -1, &at));
  MOE_TRY(load(p, LAYER "self_attn.v_proj.weight", layer, -1, &at));
  moe_tensor qkv = moe_tensor_2d(p->weight, MOE_F32, p->qkv.shape[1], d->hidden);
  MOE_TRY(moe_gemm(p->dev, MOE_NT, p->h, qkv, 0.0f, p->qkv));
  MOE_TRY(moe_rope(p->dev, p->qkv, p->positions, p->table, d->heads, d->kv_heads, 1));
  MOE_TRY(moe_attention(p->dev, shape, p->qkv, moe_tensor_none(), p->attended, p->lse));
  at = p->weight;
  MOE_TRY(load(p, LAYER "self_attn.o_proj.weight", layer, -1, &at));
  moe_tensor o = moe_tensor_2d(p->weight, MOE_F32, d->hidden, p->attended.shape[1]);
  return moe_gemm(p->dev, MOE_NT, p->attended, o, 0.0f, p->delta);
}

/* h -> experts, gates, and where each expert's rows lie */
static moe_status route(pass *p, int64_t layer) {
  const moe_dims *d = &p->w->dims;
  float *at = p->weight;
  MOE_TRY(load(p, LAYER "block_sparse_moe.gate.weight", layer, -1, &at));
  moe_tensor weight = moe_tensor_2d(p->weight, MOE_F32, d->experts, d->hidden);
  moe_tensor bias = moe_tensor_none();
  if (p->w->router_bias)
    bias = moe_tensor_1d(p->w->router_bias + layer * d->experts, MOE_F32, d->experts);
  MOE_TRY(moe_router(p->dev, p->h, weight, bias, p->probs, p->router_lse, p->experts, p->gates,
                     p->stats));
  return moe_permute_plan(p->dev, p->experts, 1, p->offsets, p->pair, p->slot);
}

/* The rows of h that chose expert e -> their rows of ys. The CPU's memory is ours to look at. */
static moe_status run_expert(pass *p, int64_t layer, int64_t e) {
  const moe_dims *d = &p->w->dims;
  const int32_t *offsets = p->offsets.data;
  int64_t begin = offsets[e], rows = offsets[e + 1] - begin;
  float *at = p->weight;
  MOE_TRY(load(p, EXPERT "w1.weight", layer, e, &at));
  MOE_TRY(load(p, EXPERT "w3.weight", layer, e, &at));
  MOE_TRY(load(p, EXPERT "w2.weight", layer, e, &at));
  if (p->watch && p->watch->used) p->watch->used[layer * d->experts + e] = rows;
  if (rows == 0) return MOE_OK;
  int32_t window[2] = {0, (int32_t)rows};
  moe_tensor all = moe_tensor_1d(window, MOE_I32, 2);
  moe_tensor w13 = moe_tensor_3d(p->weight, MOE_F32, 1, 2 * d->ffn, d->hidden);
  moe_tensor w2 = moe_tensor_3d(p->weight + 2 * d->ffn * d->hidden, MOE_F32, 1, d->hidden, d->ffn);
  moe_tensor pair = moe_tensor_rows(p->pair, begin, rows), xs = moe_tensor_rows(p->xs, 0, rows);
  moe_tensor gates = moe_tensor_rows(p->sorted_gates, 0, rows);
  moe_tensor a = moe_tensor_rows(p->a, 0, rows);
  MOE_TRY(moe_gather_rows(p->dev, p->h, pair, d->top_k, xs));
  MOE_TRY(moe_gather_gates(p->dev, p->gates, pair, gates));
  MOE_TRY(moe_expert_up(p->dev, xs, all, w13, gates, moe_tensor_rows(p->gu, 0, rows), a));
  return moe_expert_down(p->dev, a, all, w2, moe_tensor_rows(p->ys, begin, rows));
}

/* x += attention(norm(x)); then delta = experts(norm(x)), which the next norm adds. */
static moe_status run_layer(pass *p, int64_t layer) {
  double eps = p->w->norm_eps;
  moe_tensor delta = layer > 0 ? p->delta : moe_tensor_none();
  MOE_TRY(load_gain(p, LAYER "input_layernorm.weight", layer));
  MOE_TRY(moe_rms_norm(p->dev, p->x, delta, p->gain, eps, p->x, p->h, p->rstd));
  MOE_TRY(attend(p, layer));
  MOE_TRY(load_gain(p, LAYER "post_attention_layernorm.weight", layer));
  MOE_TRY(moe_rms_norm(p->dev, p->x, p->delta, p->gain, eps, p->x, p->h, p->rstd));
  MOE_TRY(route(p, layer));
  for (int64_t e = 0; e < p->w->dims.experts; e++) MOE_TRY(run_expert(p, layer, e));
  return moe_combine_rows(p->dev, p->ys, p->slot, 0, 0, p->delta);
}

static moe_status head(pass *p, float *logits) {
  const moe_param *e = moe_params_at(&p->w->params, "lm_head.weight", -1, -1);
  int64_t hidden = p->w->dims.hidden, vocab = p->w->dims.vocab, step = part_rows(&p->w->dims);
  MOE_TRY(load_gain(p, "model.norm.weight", -1));
  MOE_TRY(moe_rms_norm(p->dev, p->x, p->delta, p->gain, p->w->norm_eps, p->x, p->h, p->rstd));
  for (int64_t row = 0; row < vocab; row += step) {
    int64_t rows = vocab - row < step ? vocab - row : step;
    MOE_TRY(load_range(p, e, row * hidden, rows * hidden, p->weight));
    moe_tensor part = moe_tensor_as_2d(p->logits, p->tokens, rows);
    MOE_TRY(moe_gemm(p->dev, MOE_NT, p->h, moe_tensor_2d(p->weight, MOE_F32, rows, hidden), 0.0f,
                     part));
    for (int64_t t = 0; t < p->tokens; t++)
      memcpy(logits + t * vocab + row, (float *)part.data + t * rows, (size_t)rows * sizeof(float));
  }
  return MOE_OK;
}

static moe_status run(pass *p, const int32_t *tokens, float *logits) {
  fill_constants(p);
  MOE_TRY(embed(p, tokens));
  for (int64_t l = 0; l < p->w->dims.layers; l++) MOE_TRY(run_layer(p, l));
  return head(p, logits);
}

static moe_status check_tokens(const moe_weights *w, const int32_t *tokens, int64_t batch,
                               int64_t seq) {
  if (batch < 1 || seq < 1 || batch > (1 << 20) / seq)
    return moe_fail(MOE_INVALID, "%s: %" PRId64 " sequences of %" PRId64 " tokens", w->name, batch,
                    seq);
  for (int64_t i = 0; i < batch * seq; i++)
    if (tokens[i] < 0 || tokens[i] >= w->dims.vocab)
      return moe_fail(MOE_INVALID, "%s: token %d is outside its vocabulary of %" PRId64, w->name,
                      tokens[i], w->dims.vocab);
  return MOE_OK;
}

moe_status moe_weights_logits(moe_weights *w, const int32_t *tokens, int64_t batch, int64_t seq,
                              const moe_weights_watch *watch, float *logits) {
  MOE_TRY(check_tokens(w, tokens, batch, seq));
  pass p = {.w = w, .watch = watch, .batch = batch, .seq = seq, .tokens = batch * seq};
  moe_device_options options = {.kind = MOE_DEVICE_CPU};
  moe_arena arena = {.measuring = true};
  moe_status status;
  MOE_TRY(moe_device_open(&options, &p.dev));
  take_buffers(&p, &arena);
  arena = (moe_arena){.size = arena.used};
  arena.base = moe_device_alloc(p.dev, arena.size);
  if (!arena.base) {
    status = moe_fail(MOE_NO_MEMORY, "%s: no memory for a forward pass: %" PRId64 " bytes", w->name,
                      arena.size);
    goto done;
  }
  take_buffers(&p, &arena);
  status = run(&p, tokens, logits);
done:
  moe_device_free(p.dev, arena.base);
  moe_device_close(p.dev);
  return status;
}
