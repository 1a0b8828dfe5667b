/* Forward passes that stream their weights.
 *
 * The activations of a few dozen tokens are small, the weights are not: so a few rows of a matrix
 * are read into one buffer when their turn comes, used for all tokens of all passes, and forgotten
 * before they have left the cache. A layer's experts are shared out over a crew: each writes rows
 * of its own, so the bits do not depend on who took which. All other tensors are the caller's. */
#include <inttypes.h>
#include <string.h>

#include "checkpoint/crew.h"
#include "checkpoint/weights_stream.h"
#include "core/base/arena.h"
#include "core/base/integers.h"
#include "kernels/ops.h"

#define LAYER "model.layers.{L}."
#define EXPERT LAYER "block_sparse_moe.experts.{E}."

/* Elements read at a time, in whole rows, at least one: what stays in a core's cache. */
enum { PART = 192 << 10 };

/* Something that every pass has. */
typedef moe_tensor each[MOE_WEIGHTS_PASSES];

/* What a thread works with. */
typedef struct {
  moe_device *dev; /* of one thread */
  moe_weights_stream stream[2];
  float *part;    /* rows of the matrices in use */
  float *product; /* of tokens and a part */
  /* of an expert, whose rows are those of the tokens that chose it */
  each xs, gates, a; /* [T, D], [T], [T, F] */
  float *gu;         /* of tokens and parts of w1 and w3 */
} worker;

/* Shape legend: ops.h. T = batch * seq. */
typedef struct {
  moe_weights_gate gate;
  moe_dims dims;
  int64_t batch, seq, tokens;
  worker crew[MOE_CREW_MOST];
  int workers;
  int64_t layer;         /* whose experts run */
  moe_tensor positions;  /* [T] */
  moe_tensor stats;      /* [1, 2E + 1] */
  moe_tensor probs;      /* [T, E] */
  moe_tensor router_lse; /* [T] */
  moe_tensor lse;        /* [B, H, S] */
  moe_tensor rstd;       /* [T] */
  each gain;             /* [D] */
  each x, delta, h;      /* [T, D] */
  each qkv;              /* [T, (H+2G)d] */
  each attended;         /* [T, H d] */
  each table;            /* [S, d] */
  each router;           /* [E, D] */
  each experts, gates;   /* [T, K] */
  each offsets;          /* [E + 1] */
  each pair, slot;       /* [T K], [T, K] */
  each ys;               /* [T K, D] */
  each logits;           /* [T, V] */
} run;

/* Rows of a matrix in one part, where `matrices` of them are in use. */
static int64_t part_rows(int64_t rows, int64_t columns, int64_t matrices) {
  return moe_min64(rows, moe_max64(1, PART / matrices / columns));
}

/* ---- set-up: runs twice, to measure and to take (arena.h) --------------------------------------
 */

static void take_passes(run *r, moe_arena *arena) {
  const moe_dims *d = &r->dims;
  int64_t t = r->tokens, k = d->top_k, hidden = d->hidden, heads = d->heads * d->head_dim;
  for (int i = 0; i < r->gate.passes; i++) {
    r->gain[i] = moe_arena_tensor_1d(arena, MOE_F32, hidden);
    r->x[i] = moe_arena_tensor_2d(arena, MOE_F32, t, hidden);
    r->delta[i] = moe_arena_tensor_2d(arena, MOE_F32, t, hidden);
    r->h[i] = moe_arena_tensor_2d(arena, MOE_F32, t, hidden);
    r->qkv[i] = moe_arena_tensor_2d(arena, MOE_F32, t, heads + 2 * d->kv_heads * d->head_dim);
    r->attended[i] = moe_arena_tensor_2d(arena, MOE_F32, t, heads);
    r->table[i] = moe_arena_tensor_2d(arena, MOE_F32, r->seq, d->head_dim);
    r->router[i] = moe_arena_tensor_2d(arena, MOE_F32, d->experts, hidden);
    r->experts[i] = moe_arena_tensor_2d(arena, MOE_I32, t, k);
    r->gates[i] = moe_arena_tensor_2d(arena, MOE_F32, t, k);
    r->offsets[i] = moe_arena_tensor_1d(arena, MOE_I32, d->experts + 1);
    r->pair[i] = moe_arena_tensor_1d(arena, MOE_I32, t * k);
    r->slot[i] = moe_arena_tensor_2d(arena, MOE_I32, t, k);
    r->ys[i] = moe_arena_tensor_2d(arena, MOE_F32, t * k, hidden);
    r->logits[i] = moe_tensor_2d(r->gate.pass[i].logits, MOE_F32, t, d->vocab);
  }
  r->positions = moe_arena_tensor_1d(arena, MOE_I32, t);
  r->stats = moe_arena_tensor_2d(arena, MOE_F32, 1, 2 * d->experts + 1);
  r->probs = moe_arena_tensor_2d(arena, MOE_F32, t, d->experts);
  r->router_lse = moe_arena_tensor_1d(arena, MOE_F32, t);
  r->rstd = moe_arena_tensor_1d(arena, MOE_F32, t);
  r->lse = moe_arena_tensor_1d(arena, MOE_F32, t * d->heads);
  r->lse = moe_tensor_3d(r->lse.data, MOE_F32, r->batch, d->heads, r->seq);
}

static void take_worker(const run *r, worker *w, moe_arena *arena) {
  const moe_dims *d = &r->dims;
  int64_t t = r->tokens, heads = d->heads * d->head_dim, f32 = (int64_t)sizeof(float);
  int64_t narrow = moe_min64(moe_min64(d->hidden, d->ffn), heads);
  int64_t wide = moe_max64(moe_max64(2 * d->hidden, d->ffn), heads);
  int64_t most = moe_max64(moe_max64(d->vocab, d->ffn), moe_max64(d->hidden, heads));
  w->part = moe_arena_take(arena, moe_max64(PART, wide) * f32);
  w->product = moe_arena_take(arena, t * part_rows(most, narrow, 1) * f32);
  w->gu = moe_arena_take(arena, t * 2 * part_rows(d->ffn, d->hidden, 2) * f32);
  for (int i = 0; i < r->gate.passes; i++) {
    w->xs[i] = moe_arena_tensor_2d(arena, MOE_F32, t, d->hidden);
    w->gates[i] = moe_arena_tensor_1d(arena, MOE_F32, t);
    w->a[i] = moe_arena_tensor_2d(arena, MOE_F32, t, d->ffn);
  }
  moe_attention_shape shape = {r->batch, r->seq, d->heads, d->kv_heads, d->head_dim};
  int64_t scratch = moe_max64(moe_attention_scratch(w->dev, shape, MOE_F32),
                              moe_expert_scratch(w->dev, t, d->hidden, d->ffn, MOE_F32));
  void *room = moe_arena_take(arena, scratch);
  if (!arena->measuring) moe_device_set_scratch(w->dev, room, scratch);
}

static void take_buffers(run *r, moe_arena *arena) {
  take_passes(r, arena);
  for (int i = 0; i < r->workers; i++) take_worker(r, &r->crew[i], arena);
}

static void fill_constants(run *r) {
  int32_t *position = r->positions.data;
  for (int64_t t = 0; t < r->tokens; t++) position[t] = (int32_t)(t % r->seq);
  for (int i = 0; i < r->gate.passes; i++) {
    const moe_weights *w = r->gate.pass[i].weights;
    moe_rope_table_fill(w->rope_base, w->rope_alpha, r->seq, r->dims.head_dim, r->table[i].data);
  }
}

/* ---- products with what streams by -------------------------------------------------------------
 */

static void put_columns(const float *from, int64_t rows, int64_t columns, moe_tensor to,
                        int64_t column) {
  float *at = (float *)to.data + column;
  for (int64_t i = 0; i < rows; i++)
    memcpy(at + i * to.shape[1], from + i * columns, (size_t)columns * sizeof *from);
}

/* y[:, column ..] = x W^T for each pass; an x may have no rows. */
static moe_status multiply(run *r, worker *k, const char *pattern, int64_t layer, int64_t expert,
                           const moe_tensor *x, const moe_tensor *y, int64_t column) {
  moe_weights_stream *s = k->stream;
  MOE_TRY(moe_weights_stream_begin(&r->gate, s, pattern, layer, expert));
  int64_t rows = s->param->shape[0], columns = s->param->shape[1];
  for (int64_t row = 0, n; row < rows; row += n) {
    n = moe_min64(rows - row, part_rows(rows, columns, 1));
    moe_tensor part = moe_tensor_2d(k->part, MOE_F32, n, columns);
    for (int i = 0; i < r->gate.passes; i++) {
      moe_tensor product = moe_tensor_2d(k->product, MOE_F32, x[i].shape[0], n);
      MOE_TRY(moe_weights_stream_next(&r->gate, s, i, n * columns, k->part));
      if (x[i].shape[0] == 0) continue;
      MOE_TRY(moe_gemm(k->dev, MOE_NT, x[i], part, 0.0f, product));
      put_columns(k->product, x[i].shape[0], n, y[i], column + row);
    }
  }
  return MOE_OK;
}

/* A whole tensor, each pass its own, of its size. */
static moe_status load(run *r, const char *pattern, int64_t layer, const moe_tensor *to) {
  worker *k = &r->crew[0];
  moe_weights_stream *s = k->stream;
  MOE_TRY(moe_weights_stream_begin(&r->gate, s, pattern, layer, -1));
  int64_t count = moe_tensor_count(to[0]);
  for (int64_t at = 0, n; at < count; at += n) {
    n = moe_min64(count - at, PART);
    for (int i = 0; i < r->gate.passes; i++) {
      MOE_TRY(moe_weights_stream_next(&r->gate, s, i, n, k->part));
      memcpy((float *)to[i].data + at, k->part, (size_t)n * sizeof(float));
    }
  }
  return MOE_OK;
}

/* ---- the model ---------------------------------------------------------------------------------
 */

static moe_status embed(run *r, const int32_t *tokens) {
  moe_weights_stream *s = r->crew[0].stream;
  const float *part = r->crew[0].part;
  int64_t hidden = r->dims.hidden, vocab = r->dims.vocab;
  MOE_TRY(moe_weights_stream_begin(&r->gate, s, "model.embed_tokens.weight", -1, -1));
  for (int64_t row = 0, n; row < vocab; row += n) {
    n = moe_min64(vocab - row, part_rows(vocab, hidden, 1));
    for (int i = 0; i < r->gate.passes; i++) {
      MOE_TRY(moe_weights_stream_next(&r->gate, s, i, n * hidden, r->crew[0].part));
      for (int64_t t = 0; t < r->tokens; t++)
        if (tokens[t] >= row && tokens[t] < row + n)
          memcpy((float *)r->x[i].data + t * hidden, part + (tokens[t] - row) * hidden,
                 (size_t)hidden * sizeof *part);
    }
  }
  return MOE_OK;
}

/* x += delta; h = norm(x) */
static moe_status norm(run *r, const char *pattern, int64_t layer, bool add) {
  MOE_TRY(load(r, pattern, layer, r->gain));
  for (int i = 0; i < r->gate.passes; i++)
    MOE_TRY(moe_rms_norm(r->crew[0].dev, r->x[i], add ? r->delta[i] : moe_tensor_none(), r->gain[i],
                         r->gate.pass[i].weights->norm_eps, r->x[i], r->h[i], r->rstd));
  return MOE_OK;
}

/* h -> delta */
static moe_status attend(run *r, int64_t layer) {
  const moe_dims *d = &r->dims;
  worker *k = &r->crew[0];
  moe_attention_shape shape = {r->batch, r->seq, d->heads, d->kv_heads, d->head_dim};
  int64_t keys = d->heads * d->head_dim, values = keys + d->kv_heads * d->head_dim;
  MOE_TRY(multiply(r, k, LAYER "self_attn.q_proj.weight", layer, -1, r->h, r->qkv, 0));
  MOE_TRY(multiply(r, k, LAYER "self_attn.k_proj.weight", layer, -1, r->h, r->qkv, keys));
  MOE_TRY(multiply(r, k, LAYER "self_attn.v_proj.weight", layer, -1, r->h, r->qkv, values));
  for (int i = 0; i < r->gate.passes; i++) {
    MOE_TRY(moe_rope(k->dev, r->qkv[i], r->positions, r->table[i], d->heads, d->kv_heads, 1));
    MOE_TRY(moe_attention(k->dev, shape, r->qkv[i], moe_tensor_none(), r->attended[i], r->lse));
  }
  return multiply(r, k, LAYER "self_attn.o_proj.weight", layer, -1, r->attended, r->delta, 0);
}

/* h -> experts, gates, and where each expert's rows lie */
static moe_status route(run *r, int64_t layer) {
  const moe_dims *d = &r->dims;
  moe_device *dev = r->crew[0].dev;
  MOE_TRY(load(r, LAYER "block_sparse_moe.gate.weight", layer, r->router));
  for (int i = 0; i < r->gate.passes; i++) {
    float *biases = r->gate.pass[i].weights->router_bias;
    moe_tensor bias = moe_tensor_none();
    if (biases) bias = moe_tensor_1d(biases + layer * d->experts, MOE_F32, d->experts);
    MOE_TRY(moe_router(dev, r->h[i], r->router[i], bias, r->probs, r->router_lse, r->experts[i],
                       r->gates[i], r->stats));
    MOE_TRY(moe_permute_plan(dev, r->experts[i], 1, r->offsets[i], r->pair[i], r->slot[i]));
  }
  return MOE_OK;
}

/* The rows of h that chose expert e -> xs and their gates; y: where their results are to go. The
 * CPU's memory is ours to look at. */
static moe_status gather(run *r, worker *k, int64_t e, moe_tensor *xs, moe_tensor *y) {
  const moe_dims *d = &r->dims;
  for (int i = 0; i < r->gate.passes; i++) {
    const int32_t *offsets = r->offsets[i].data;
    int64_t begin = offsets[e], rows = offsets[e + 1] - begin;
    moe_tensor pair = moe_tensor_rows(r->pair[i], begin, rows);
    xs[i] = moe_tensor_rows(k->xs[i], 0, rows);
    y[i] = moe_tensor_rows(r->ys[i], begin, rows);
    if (r->gate.pass[i].used) r->gate.pass[i].used[r->layer * d->experts + e] = rows;
    if (rows == 0) continue;
    MOE_TRY(moe_gather_rows(k->dev, r->h[i], pair, d->top_k, xs[i]));
    MOE_TRY(moe_gather_gates(k->dev, r->gates[i], pair, moe_tensor_rows(k->gates[i], 0, rows)));
  }
  return MOE_OK;
}

/* xs -> columns [column, column + n) of a, with n rows of w1 and as many of w3 */
static moe_status activate(const run *r, worker *k, moe_tensor xs, int i, int64_t column,
                           int64_t n) {
  int64_t rows = xs.shape[0];
  int32_t window[2] = {0, (int32_t)rows};
  if (rows == 0) return MOE_OK;
  MOE_TRY(moe_expert_up(k->dev, xs, moe_tensor_1d(window, MOE_I32, 2),
                        moe_tensor_3d(k->part, MOE_F32, 1, 2 * n, r->dims.hidden),
                        moe_tensor_rows(k->gates[i], 0, rows), MOE_GU_VALUES,
                        moe_tensor_2d(k->gu, MOE_F32, rows, 2 * n),
                        moe_tensor_2d(k->product, MOE_F32, rows, n)));
  put_columns(k->product, rows, n, k->a[i], column);
  return MOE_OK;
}

static moe_status run_expert(void *context, int number, int64_t e) {
  run *r = context;
  worker *k = &r->crew[number];
  int64_t ffn = r->dims.ffn, hidden = r->dims.hidden, layer = r->layer;
  each xs, a, y;
  moe_cpu_enter(k->dev);
  MOE_TRY(gather(r, k, e, xs, y));
  MOE_TRY(moe_weights_stream_begin(&r->gate, &k->stream[0], EXPERT "w1.weight", layer, e));
  MOE_TRY(moe_weights_stream_begin(&r->gate, &k->stream[1], EXPERT "w3.weight", layer, e));
  for (int64_t row = 0, n; row < ffn; row += n) {
    n = moe_min64(ffn - row, part_rows(ffn, hidden, 2));
    for (int i = 0; i < r->gate.passes; i++) {
      for (int m = 0; m < 2; m++)
        MOE_TRY(moe_weights_stream_next(&r->gate, &k->stream[m], i, n * hidden,
                                        k->part + m * n * hidden));
      MOE_TRY(activate(r, k, xs[i], i, row, n));
    }
  }
  for (int i = 0; i < r->gate.passes; i++) a[i] = moe_tensor_rows(k->a[i], 0, xs[i].shape[0]);
  return multiply(r, k, EXPERT "w2.weight", layer, e, a, y, 0);
}

/* x += attention(norm(x)); then delta = experts(norm(x)), which the next norm adds. */
static moe_status run_layer(run *r, int64_t layer) {
  MOE_TRY(norm(r, LAYER "input_layernorm.weight", layer, layer > 0));
  MOE_TRY(attend(r, layer));
  MOE_TRY(norm(r, LAYER "post_attention_layernorm.weight", layer, true));
  MOE_TRY(route(r, layer));
  r->layer = layer;
  MOE_TRY(moe_crew_work(r->workers, r->dims.experts, run_expert, r));
  for (int i = 0; i < r->gate.passes; i++)
    MOE_TRY(moe_combine_rows(r->crew[0].dev, r->ys[i], r->slot[i], 0, 0, r->delta[i]));
  return MOE_OK;
}

static moe_status run_model(run *r, const int32_t *tokens) {
  fill_constants(r);
  MOE_TRY(embed(r, tokens));
  for (int64_t l = 0; l < r->dims.layers; l++) MOE_TRY(run_layer(r, l));
  MOE_TRY(norm(r, "model.norm.weight", -1, true));
  return multiply(r, &r->crew[0], "lm_head.weight", -1, -1, r->h, r->logits, 0);
}

/* ---- all of it ---------------------------------------------------------------------------------
 */

static moe_status check(const run *r, const int32_t *tokens) {
  const moe_weights *w = r->gate.pass[0].weights;
  if (r->batch < 1 || r->seq < 1 || r->batch > (1 << 20) / r->seq)
    return moe_fail(MOE_INVALID, "%s: %" PRId64 " sequences of %" PRId64 " tokens", w->name,
                    r->batch, r->seq);
  for (int64_t i = 0; i < r->tokens; i++)
    if (tokens[i] < 0 || tokens[i] >= w->dims.vocab)
      return moe_fail(MOE_INVALID, "%s: token %d is outside its vocabulary of %" PRId64, w->name,
                      tokens[i], w->dims.vocab);
  for (int i = 1; i < r->gate.passes; i++)
    if (memcmp(&r->gate.pass[i].weights->dims, &w->dims, sizeof w->dims) != 0)
      return moe_fail(MOE_INVALID, "%s: has other sizes than %s", r->gate.pass[i].weights->name,
                      w->name);
  return MOE_OK;
}

/* Threads are the crew's alone: a device that had its own would have them wait, spinning, while
 * others read. */
static moe_status open_crew(run *r) {
  moe_device_options options = {.kind = MOE_DEVICE_CPU, .threads = 1};
  int64_t most = moe_min64(moe_crew_cores(), r->dims.experts);
  do MOE_TRY(moe_device_open(&options, &r->crew[r->workers].dev));
  while (++r->workers < most);
  return MOE_OK;
}

static void close_crew(run *r) {
  for (int i = 0; i < r->workers; i++) {
    for (int m = 0; m < 2; m++) moe_weights_stream_release(&r->crew[i].stream[m]);
    moe_device_close(r->crew[i].dev);
  }
}

moe_status moe_weights_logits(const moe_weights_pass *pass, int passes, const int32_t *tokens,
                              int64_t batch, int64_t seq, const moe_weights_watch *watch) {
  run r = {.gate = {.pass = pass, .passes = passes, .watch = watch},
           .dims = pass[0].weights->dims,
           .batch = batch,
           .seq = seq,
           .tokens = batch * seq};
  moe_arena arena = {.measuring = true};
  moe_status status;
  MOE_TRY(check(&r, tokens));
  MOE_TRY_OR(status, done, open_crew(&r));
  take_buffers(&r, &arena);
  arena = (moe_arena){.size = arena.used};
  arena.base = moe_device_alloc(r.crew[0].dev, arena.size);
  if (!arena.base) {
    status = moe_fail(MOE_NO_MEMORY, "%s: no memory for a forward pass: %" PRId64 " bytes",
                      pass[0].weights->name, arena.size);
    goto done;
  }
  take_buffers(&r, &arena);
  status = run_model(&r, tokens);
done:
  if (r.workers > 0) moe_device_free(r.crew[0].dev, arena.base);
  close_crew(&r);
  return status;
}
