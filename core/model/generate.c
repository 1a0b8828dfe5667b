/* The generator's passes: over layers, over a prompt, and one step of all slots.
 *
 * A pass adds n tokens to each of some slots. Everything it reads besides the weights is on the
 * device: tokens, positions, and how many tokens each slot holds. So a step, which feeds the token
 * that the step before drew at the length that it left, needs nothing from the host. */
#include "core/model/generate.h"

#include <string.h>

#include "core/model/generate_state.h"

typedef struct {
  int64_t first, slots, n;      /* n tokens for each of slots [first, first + slots) */
  moe_tensor tokens, positions; /* i32 [slots n] */
} pass;

static int64_t tokens_of(const pass *p) {
  return p->slots * p->n;
}

static moe_tensor rows(moe_tensor t, int64_t n) {
  return moe_tensor_rows(t, 0, n);
}

/* ---- a pass over the layers ------------------------------------------------------------------ */

/* The norm that begins a part of a layer: of x + residual, which becomes `sum`. */
static moe_norm norm_of(const moe_generator *g, int64_t t, moe_tensor x, moe_tensor residual,
                        moe_tensor gain, moe_tensor sum) {
  const moe_generator_work *w = &g->work;
  return (moe_norm){x, residual, gain, g->norm_eps, sum, rows(w->h, t), rows(w->rstd, t)};
}

/* delta = attention(norm). */
static moe_status attend(moe_generator *g, const pass *p, int64_t l, moe_norm norm) {
  moe_generator_work *w = &g->work;
  const moe_dims *d = &g->dims;
  moe_device *dev = g->options.dev;
  int64_t t = tokens_of(p);
  moe_attention_shape shape = {p->slots, p->n, d->heads, d->kv_heads, d->head_dim};
  moe_tensor qkv = rows(w->qkv, t), attended = rows(w->attended, t);
  moe_device_label(dev, "attention", l);
  MOE_TRY(moe_norm_gemm(dev, norm, g->layers[l].qkv, qkv));
  MOE_TRY(moe_attention_cached(dev, shape, qkv, p->positions, g->rope_table,
                               moe_kv_cache_slots(g->cache.keys, l, p->first, p->slots),
                               moe_kv_cache_slots(g->cache.values, l, p->first, p->slots),
                               moe_tensor_rows(g->lengths, p->first, p->slots), attended));
  return moe_gemm(dev, MOE_NT, attended, g->layers[l].o, 0.0f, rows(w->delta, t));
}

/* Few tokens: out is their sums or terms. */
static moe_status experts_few(moe_generator *g, int64_t t, const moe_layer_weights *layer,
                              moe_tensor out) {
  moe_generator_work *w = &g->work;
  return moe_experts_decode(g->options.dev, rows(w->h, t), rows(w->experts, t), rows(w->gates, t),
                            g->options.mesh->owned.begin, layer->w13, layer->w2,
                            rows(w->hidden, t * g->dims.top_k), out);
}

/* Many tokens: sort them by expert, so that each expert is one matrix product; ys and slot then say
 * what each choice gave. */
static moe_status experts_sorted(moe_generator *g, int64_t t, const moe_layer_weights *layer) {
  moe_generator_work *w = &g->work;
  moe_device *dev = g->options.dev;
  int64_t c = moe_generator_sorted_rows(g, t);
  moe_tensor pair = rows(w->pair, c), gates = rows(w->sorted_gates, c);
  moe_tensor xs = rows(w->xs, c), a = rows(w->a, c);
  MOE_TRY(moe_permute_plan(dev, rows(w->experts, t), g->pad, w->offsets, pair, rows(w->slot, t)));
  MOE_TRY(moe_gather_rows(dev, rows(w->h, t), pair, g->dims.top_k, xs));
  MOE_TRY(moe_gather_gates(dev, rows(w->gates, t), pair, gates));
  MOE_TRY(moe_expert_up(dev, xs, w->offsets, layer->w13, gates, MOE_GU_VALUES, rows(w->gu, c), a));
  return moe_expert_down(dev, a, w->offsets, layer->w2, rows(w->ys, c));
}

/* delta = this rank's experts, which are all. */
static moe_status consult_alone(moe_generator *g, int64_t t, const moe_layer_weights *layer) {
  moe_generator_work *w = &g->work;
  moe_tensor delta = rows(w->delta, t), ys = rows(w->ys, moe_generator_sorted_rows(g, t));
  if (t <= g->few) return experts_few(g, t, layer, delta);
  MOE_TRY(experts_sorted(g, t, layer));
  return moe_combine_rows(g->options.dev, ys, rows(w->slot, t), 0, 0, delta);
}

/* delta = all ranks' experts, the same bits as one rank would make: a term comes from the one rank
 * that has its expert, the others add zeros to it, which is exact in any order, and every rank then
 * adds the terms in the order of choices. */
static moe_status consult_ranks(moe_generator *g, int64_t t, const moe_layer_weights *layer) {
  moe_generator_work *w = &g->work;
  const moe_mesh *mesh = g->options.mesh;
  moe_device *dev = g->options.dev;
  int64_t pairs = t * g->dims.top_k;
  moe_tensor terms = rows(t <= g->few ? w->few_terms : w->terms, pairs);
  if (t <= g->few) {
    MOE_TRY(experts_few(g, t, layer, terms));
  } else {
    moe_tensor slot = moe_tensor_1d(w->slot.data, MOE_I32, pairs);
    MOE_TRY(moe_localize_experts(dev, rows(w->experts, t), rows(w->gates, t), mesh->owned.begin,
                                 moe_range_size(mesh->owned)));
    MOE_TRY(experts_sorted(g, t, layer));
    MOE_TRY(moe_gather_rows(dev, rows(w->ys, moe_generator_sorted_rows(g, t)), slot, 1, terms));
  }
  MOE_TRY(moe_comm_all_reduce(mesh->experts, terms, MOE_SUM));
  return moe_sum_choices(dev, terms, rows(w->delta, t));
}

/* delta = experts(norm). */
static moe_status consult(moe_generator *g, int64_t t, int64_t l, moe_norm norm) {
  moe_generator_work *w = &g->work;
  moe_device *dev = g->options.dev;
  const moe_layer_weights *layer = &g->layers[l];
  moe_tensor bias = g->bias;
  if (moe_tensor_present(bias))
    bias = moe_tensor_1d(moe_tensor_rows(bias, l, 1).data, MOE_F32, g->dims.experts);
  moe_device_label(dev, "experts", l);
  MOE_TRY(moe_norm_router(dev, norm, layer->router, bias, rows(w->probs, t), rows(w->router_lse, t),
                          rows(w->experts, t), rows(w->gates, t), w->stats));
  return (g->options.mesh->ep > 1 ? consult_ranks : consult_alone)(g, t, layer);
}

/* Embedding and layers; leaves the residual stream in x and delta. */
static moe_status run_layers(moe_generator *g, const pass *p) {
  moe_generator_work *w = &g->work;
  moe_device *dev = g->options.dev;
  int64_t t = tokens_of(p);
  moe_tensor x = rows(w->x, t), sum = rows(w->sum, t), delta = moe_tensor_none();
  moe_device_label(dev, "embedding", -1);
  MOE_TRY(moe_embed(dev, p->tokens, g->embed, x));
  for (int64_t l = 0; l < g->dims.layers; l++) {
    const moe_layer_weights *layer = &g->layers[l];
    MOE_TRY(attend(g, p, l, norm_of(g, t, x, delta, layer->norm1, sum)));
    if (l == 0) sum = x; /* nothing was added */
    delta = rows(w->delta, t);
    MOE_TRY(consult(g, t, l, norm_of(g, t, sum, delta, layer->norm2, x)));
    sum = rows(w->sum, t);
  }
  return MOE_OK;
}

/* Logits of rows [begin, begin + count) of the pass. */
static moe_status make_logits(moe_generator *g, int64_t begin, int64_t count, moe_tensor *logits) {
  moe_generator_work *w = &g->work;
  moe_device *dev = g->options.dev;
  moe_tensor x = moe_tensor_rows(w->x, begin, count), h = moe_tensor_rows(w->h, begin, count);
  *logits = rows(w->logits, count);
  moe_device_label(dev, "head", -1);
  MOE_TRY(moe_rms_norm(dev, x, moe_tensor_rows(w->delta, begin, count), g->gain, g->norm_eps, x, h,
                       moe_tensor_rows(w->rstd, begin, count)));
  return moe_gemm(dev, MOE_NT, h, g->head, 0.0f, *logits);
}

/* ---- tokens from the host -------------------------------------------------------------------- */

/* What feed, score and start want of the passes over their tokens. */
typedef struct {
  const int32_t *tokens, *targets; /* [slots, n]; targets NULL unless scored */
  float *logits;                   /* [slots, n, V] or NULL */
} reading;

static moe_status check_tokens(const moe_generator *g, int64_t first, int64_t slots,
                               const int32_t *tokens, int64_t n) {
  if (first < 0 || slots < 1 || first + slots > g->options.batch || n < 1)
    return moe_fail(MOE_INVALID, "generator: %lld tokens for slots %lld to %lld of %lld",
                    (long long)n, (long long)first, (long long)(first + slots - 1),
                    (long long)g->options.batch);
  for (int64_t s = first; s < first + slots; s++) {
    if (g->length[s] != g->length[first])
      return moe_fail(MOE_INVALID, "generator: slots of different lengths in one pass");
  }
  if (g->length[first] + n > g->options.room)
    return moe_fail(MOE_INVALID, "generator: %lld tokens after %lld exceed the room of %lld",
                    (long long)n, (long long)g->length[first], (long long)g->options.room);
  for (int64_t i = 0; i < slots * n; i++) {
    if (tokens[i] < 0 || tokens[i] >= g->dims.vocab)
      return moe_fail(MOE_INVALID,
                      "token %d is outside the model's vocabulary of %lld: is it the right "
                      "tokenizer?",
                      tokens[i], (long long)g->dims.vocab);
  }
  return MOE_OK;
}

static moe_status upload_i32(moe_generator *g, moe_tensor to, const int32_t *from) {
  return moe_device_upload(g->options.dev, to.data, from, moe_tensor_bytes(to));
}

/* Bring tokens [at, at + p->n) of each of the n tokens of every slot to the device, with their
 * positions and targets. */
static moe_status stage(moe_generator *g, pass *p, const reading *r, int64_t at, int64_t n) {
  int32_t *tokens = g->staged, *positions = tokens + g->most_tokens;
  int32_t *targets = positions + g->most_tokens;
  int64_t t = tokens_of(p), start = g->length[p->first];
  for (int64_t s = 0; s < p->slots; s++) {
    for (int64_t i = 0; i < p->n; i++) {
      int64_t to = s * p->n + i, from = s * n + at + i;
      tokens[to] = r->tokens[from];
      positions[to] = (int32_t)(start + i);
      if (r->targets) targets[to] = r->targets[from];
    }
  }
  p->tokens = rows(g->work.tokens, t);
  p->positions = rows(g->work.positions, t);
  MOE_TRY(upload_i32(g, p->tokens, tokens));
  MOE_TRY(upload_i32(g, p->positions, positions));
  if (r->targets) MOE_TRY(upload_i32(g, rows(g->work.targets, t), targets));
  return MOE_OK;
}

/* The slots now hold `length` tokens. */
static moe_status set_lengths(moe_generator *g, int64_t first, int64_t slots, int64_t length) {
  int32_t *cell = &g->cells[MOE_CELL_LENGTH];
  MOE_TRY(moe_device_sync(g->options.dev)); /* the cell may be on its way */
  *cell = (int32_t)length;
  for (int64_t s = first; s < first + slots; s++) {
    MOE_TRY(upload_i32(g, moe_tensor_rows(g->lengths, s, 1), cell));
    g->length[s] = length;
  }
  return MOE_OK;
}

/* Cross-entropy, or logits to the host, of the pass that has just run. */
static moe_status use_pass(moe_generator *g, const pass *p, const reading *r, int64_t at,
                           int64_t n) {
  moe_generator_work *w = &g->work;
  moe_device *dev = g->options.dev;
  int64_t t = tokens_of(p), most = w->logits.shape[0], vocab = g->dims.vocab;
  for (int64_t begin = 0, count; begin < t; begin += count) {
    moe_tensor logits;
    int64_t slot = begin / p->n, i = begin % p->n; /* a piece stays within one slot */
    count = p->n - i < most ? p->n - i : most;
    MOE_TRY(make_logits(g, begin, count, &logits));
    if (r->targets)
      MOE_TRY(moe_cross_entropy(dev, logits, moe_tensor_rows(w->targets, begin, count), 0.0f, 0,
                                w->loss, moe_tensor_none()));
    if (r->logits)
      MOE_TRY(moe_device_download(dev, r->logits + (slot * n + at + i) * vocab, logits.data,
                                  moe_tensor_bytes(logits)));
  }
  return MOE_OK;
}

/* All n tokens of the slots, in passes of what fits. last: the final pass as it ran. */
static moe_status read_tokens(moe_generator *g, int64_t first, int64_t slots, int64_t n,
                              const reading *r, pass *last) {
  MOE_TRY(check_tokens(g, first, slots, r->tokens, n));
  int64_t most = g->most_tokens / slots, length = g->length[first];
  for (int64_t at = 0; at < n; at += last->n) {
    *last = (pass){.first = first, .slots = slots, .n = n - at < most ? n - at : most};
    MOE_TRY(set_lengths(g, first, slots, length + at));
    MOE_TRY(stage(g, last, r, at, n));
    MOE_TRY(run_layers(g, last));
    if (r->targets || r->logits) MOE_TRY(use_pass(g, last, r, at, n));
  }
  return set_lengths(g, first, slots, length + n);
}

moe_status moe_generator_clear(moe_generator *g, int64_t first, int64_t count) {
  const int32_t *zero = &g->cells[MOE_CELL_ZERO];
  for (int64_t s = first; s < first + count; s++) {
    MOE_TRY(upload_i32(g, moe_tensor_rows(g->token, s, 1), zero));
    MOE_TRY(upload_i32(g, moe_tensor_rows(g->lengths, s, 1), zero));
    MOE_TRY(upload_i32(g, moe_tensor_rows(g->running, s, 1), zero));
    g->length[s] = 0;
  }
  return MOE_OK;
}

moe_status moe_generator_feed(moe_generator *g, int64_t first, int64_t count, const int32_t *tokens,
                              int64_t n, float *logits) {
  pass last = {0};
  reading r = {.tokens = tokens};
  r.logits = logits;
  MOE_TRY(read_tokens(g, first, count, n, &r, &last));
  return moe_device_sync(g->options.dev);
}

moe_status moe_generator_score(moe_generator *g, int64_t first, int64_t count,
                               const int32_t *tokens, const int32_t *targets, int64_t n,
                               double loss[2]) {
  pass last = {0};
  double sums[2];
  reading r = {.tokens = tokens, .targets = targets};
  MOE_TRY(moe_zero(g->options.dev, g->work.loss));
  MOE_TRY(read_tokens(g, first, count, n, &r, &last));
  MOE_TRY(moe_device_download(g->options.dev, sums, g->work.loss.data, (int64_t)sizeof sums));
  MOE_TRY(moe_device_sync(g->options.dev));
  loss[0] += sums[0];
  loss[1] += sums[1];
  return MOE_OK;
}

/* ---- drawing --------------------------------------------------------------------------------- */

/* token = a draw from logits; rank 0's, lest ranks on unlike processors, whose sums may differ in
 * the last bit, part. */
static moe_status draw(moe_generator *g, moe_tensor logits, moe_tensor streams,
                       moe_tensor positions, moe_tensor token) {
  const moe_mesh *mesh = g->options.mesh;
  MOE_TRY(moe_sample(g->options.dev, logits, g->options.sample, streams, positions, token));
  return mesh->ep > 1 ? moe_comm_broadcast(mesh->experts, token, 0) : MOE_OK;
}

moe_status moe_generator_start(moe_generator *g, int64_t slot, const int32_t *prompt, int64_t n,
                               int32_t stream, int32_t *first) {
  moe_device *dev = g->options.dev;
  moe_tensor token = moe_tensor_rows(g->token, slot, 1), logits;
  moe_tensor streams = moe_tensor_rows(g->streams, slot, 1);
  pass last = {0};
  reading r = {.tokens = prompt};
  MOE_TRY(read_tokens(g, slot, 1, n, &r, &last));
  g->cells[MOE_CELL_STREAM] = stream;
  g->cells[MOE_CELL_RUNNING] = 1;
  MOE_TRY(upload_i32(g, streams, &g->cells[MOE_CELL_STREAM]));
  MOE_TRY(upload_i32(g, moe_tensor_rows(g->running, slot, 1), &g->cells[MOE_CELL_RUNNING]));
  MOE_TRY(make_logits(g, last.n - 1, 1, &logits));
  MOE_TRY(draw(g, logits, streams, moe_tensor_rows(last.positions, last.n - 1, 1), token));
  MOE_TRY(moe_device_download(dev, first, token.data, (int64_t)sizeof *first));
  return moe_device_sync(dev);
}

/* Feed every slot the token it drew last, and draw the next. */
static moe_status queue_step(moe_generator *g) {
  moe_tensor logits;
  pass p = {.slots = g->options.batch, .n = 1, .tokens = g->token, .positions = g->lengths};
  MOE_TRY(run_layers(g, &p));
  MOE_TRY(make_logits(g, 0, p.slots, &logits));
  MOE_TRY(draw(g, logits, g->streams, g->lengths, g->token));
  return moe_advance(g->options.dev, g->lengths, g->running);
}

/* The first step runs as it is, so that libraries have chosen their algorithms; the second is
 * recorded. */
static moe_status record_step(moe_generator *g) {
  moe_device *dev = g->options.dev;
  MOE_TRY(moe_device_graph_begin(dev));
  moe_status recorded = queue_step(g);
  moe_status ended = moe_device_graph_end(dev, &g->graph);
  if (recorded != MOE_OK || ended == MOE_OK) return recorded;
  return moe_fail(ended, "the step cannot be recorded: %s (--eager runs it as it is)",
                  moe_error_message());
}

moe_status moe_generator_step(moe_generator *g) {
  moe_device *dev = g->options.dev;
  int kept = (int)(g->steps % MOE_STEPS_KEPT);
  bool records = moe_device_has_graphs(dev) && !g->options.eager;
  if (records && g->steps == 1) MOE_TRY(record_step(g));
  MOE_TRY(g->graph ? moe_device_graph_launch(dev, g->graph) : queue_step(g));
  MOE_TRY(moe_device_download(dev, g->drawn + kept * g->options.batch, g->token.data,
                              moe_tensor_bytes(g->token)));
  moe_device_mark(dev, &g->done[kept]);
  g->steps++;
  return MOE_OK;
}

moe_status moe_generator_tokens(moe_generator *g, int age, const int32_t **tokens) {
  int64_t step = g->steps - 1 - age;
  if (age < 0 || age >= MOE_STEPS_KEPT || step < 0)
    return moe_fail(MOE_INVALID, "generator: the tokens of a step that is not kept");
  int kept = (int)(step % MOE_STEPS_KEPT);
  *tokens = g->drawn + kept * g->options.batch;
  return moe_device_wait(g->options.dev, &g->done[kept]);
}

bool moe_generator_is_ahead(const moe_generator *g) {
  return !moe_device_is_host(g->options.dev);
}
