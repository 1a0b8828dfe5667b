/* A table of the same operations that marks the stream round each call. */
#include "kernels/profile.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/backend.h"

enum { SPANS = 1 << 15, MAX_ROWS = 256 };
enum { COUNT_BYTES = (SPANS + 1) * 2 * (int)sizeof(uint64_t) };

typedef struct {
  const char *op, *label;
  double flops;
  moe_mark begin, end;
} span;

struct moe_profile {
  const moe_backend *inner;
  moe_backend timed;
  int64_t spans;
  uint64_t *clock, *counts; /* [SPANS + 1][2] of the device and the host; NULL: not counted */
  int open;                 /* depth: what runs inside a span is part of it */
  span span[SPANS];
};

/* Lanes beside MAIN are seen by what MAIN waits for them; where all lanes are one, as MAIN is. */
static bool sees(const moe_device *dev, const struct moe_profile *p) {
  if (!p || dev->recording || p->spans == SPANS) return false;
  return dev->lane == MOE_LANE_MAIN || !p->inner->wait_lane;
}

void moe_profile_begin(moe_device *dev, const char *op, double flops) {
  struct moe_profile *p = dev ? dev->profile : NULL;
  if (!sees(dev, p) || p->open++ > 0) return;
  span *s = &p->span[p->spans];
  *s = (span){.op = op, .label = dev->label ? dev->label : "", .flops = flops};
  if (p->clock) p->inner->count_cycles(dev, p->clock + 2 * p->spans);
  p->inner->mark(dev, &s->begin);
}

void moe_profile_end(moe_device *dev) {
  struct moe_profile *p = dev ? dev->profile : NULL;
  if (!sees(dev, p) || --p->open > 0) return;
  p->inner->mark(dev, &p->span[p->spans++].end);
}

static moe_status timed_graph_launch(moe_device *dev, moe_graph *graph) {
  moe_profile_begin(dev, "graph", 0.0);
  moe_status status = dev->profile->inner->graph_launch(dev, graph);
  moe_profile_end(dev);
  return status;
}

#define TIMED(slot, flops, args)                      \
  moe_profile_begin(dev, #slot, flops);               \
  moe_status status = dev->profile->inner->slot args; \
  moe_profile_end(dev);                               \
  return status

static double attention_flops(moe_attention_shape s, double products) {
  double pairs = 0.5 * (double)(s.batch * s.heads) * (double)s.seq * (double)s.seq;
  return products * 2.0 * pairs * (double)s.head_dim;
}

static moe_status timed_zero(moe_device *dev, moe_tensor x) {
  TIMED(zero, 0.0, (dev, x));
}
static moe_status timed_copy(moe_device *dev, moe_tensor dst, moe_tensor src) {
  TIMED(copy, 0.0, (dev, dst, src));
}
static moe_status timed_add(moe_device *dev, moe_tensor y, moe_tensor x) {
  TIMED(add, 0.0, (dev, y, x));
}
static moe_status timed_sum_rows(moe_device *dev, moe_tensor x, int64_t own, moe_tensor out,
                                 moe_tensor squares) {
  TIMED(sum_rows, 0.0, (dev, x, own, out, squares));
}
static moe_status timed_scale(moe_device *dev, moe_tensor x, float s) {
  TIMED(scale, 0.0, (dev, x, s));
}
static moe_status timed_sum_squares(moe_device *dev, moe_tensor x, moe_tensor out) {
  TIMED(sum_squares, 0.0, (dev, x, out));
}
static moe_status timed_embed(moe_device *dev, moe_tensor tokens, moe_tensor weight,
                              moe_tensor out) {
  TIMED(embed, 0.0, (dev, tokens, weight, out));
}
static moe_status timed_embed_backward(moe_device *dev, moe_tensor tokens, moe_tensor dout,
                                       moe_tensor dweight) {
  TIMED(embed_backward, 0.0, (dev, tokens, dout, dweight));
}
static moe_status timed_rms_norm(moe_device *dev, moe_tensor x, moe_tensor residual,
                                 moe_tensor gain, double eps, moe_tensor sum, moe_tensor out,
                                 moe_tensor rstd) {
  TIMED(rms_norm, 0.0, (dev, x, residual, gain, eps, sum, out, rstd));
}
static moe_status timed_rms_norm_backward(moe_device *dev, moe_tensor dout, moe_tensor x,
                                          moe_tensor gain, moe_tensor rstd, moe_tensor dx,
                                          moe_tensor dgain) {
  TIMED(rms_norm_backward, 0.0, (dev, dout, x, gain, rstd, dx, dgain));
}
static moe_status timed_gemm(moe_device *dev, moe_gemm_form form, moe_tensor a, moe_tensor b,
                             float beta, moe_tensor c) {
  TIMED(gemm,
        2.0 * (double)moe_tensor_count(c) * (double)(form == MOE_TN ? a.shape[0] : a.shape[1]),
        (dev, form, a, b, beta, c));
}
static moe_status timed_rope(moe_device *dev, moe_tensor qkv, moe_tensor positions,
                             moe_tensor table, int64_t heads, int64_t kv_heads, int direction) {
  TIMED(rope, 0.0, (dev, qkv, positions, table, heads, kv_heads, direction));
}
static moe_status timed_attention(moe_device *dev, moe_attention_shape shape, moe_tensor qkv,
                                  moe_tensor doc_start, moe_tensor out, moe_tensor lse) {
  TIMED(attention, attention_flops(shape, 2.0), (dev, shape, qkv, doc_start, out, lse));
}
static moe_status timed_attention_backward(moe_device *dev, moe_attention_shape shape,
                                           moe_tensor dout, moe_tensor qkv, moe_tensor doc_start,
                                           moe_tensor out, moe_tensor lse, moe_tensor dqkv) {
  TIMED(attention_backward, attention_flops(shape, 5.0),
        (dev, shape, dout, qkv, doc_start, out, lse, dqkv));
}
static moe_status timed_attention_cached(moe_device *dev, moe_attention_shape shape, moe_tensor qkv,
                                         moe_tensor positions, moe_tensor table, moe_tensor keys,
                                         moe_tensor values, moe_tensor lengths, moe_tensor out) {
  TIMED(attention_cached, 0.0, (dev, shape, qkv, positions, table, keys, values, lengths, out));
}
static moe_status timed_router(moe_device *dev, moe_tensor x, moe_tensor weight, moe_tensor bias,
                               moe_tensor probs, moe_tensor lse, moe_tensor experts,
                               moe_tensor gates, moe_tensor stats) {
  TIMED(router, 0.0, (dev, x, weight, bias, probs, lse, experts, gates, stats));
}
static moe_status timed_norm_router(moe_device *dev, moe_norm norm, moe_tensor weight,
                                    moe_tensor bias, moe_tensor probs, moe_tensor lse,
                                    moe_tensor experts, moe_tensor gates, moe_tensor stats,
                                    bool *done) {
  TIMED(norm_router, 0.0, (dev, norm, weight, bias, probs, lse, experts, gates, stats, done));
}
static moe_status timed_router_drop(moe_device *dev, moe_tensor probs, int64_t capacity,
                                    moe_tensor experts, moe_tensor gates, moe_tensor dropped) {
  TIMED(router_drop, 0.0, (dev, probs, capacity, experts, gates, dropped));
}
static moe_status timed_router_backward(moe_device *dev, moe_tensor dgates, moe_tensor x,
                                        moe_tensor weight, moe_tensor probs, moe_tensor lse,
                                        moe_tensor experts, moe_tensor gates, moe_tensor load,
                                        float aux_scale, float z_scale, moe_tensor dlogits,
                                        moe_tensor dx, moe_tensor dweight) {
  TIMED(router_backward, 0.0,
        (dev, dgates, x, weight, probs, lse, experts, gates, load, aux_scale, z_scale, dlogits, dx,
         dweight));
}
static moe_status timed_router_norm_backward(moe_device *dev, moe_tensor dgates, moe_tensor x,
                                             moe_tensor weight, moe_tensor probs, moe_tensor lse,
                                             moe_tensor experts, moe_tensor gates, moe_tensor load,
                                             float aux_scale, float z_scale, moe_tensor dlogits,
                                             moe_tensor dweight, moe_norm_gradient norm,
                                             bool *done) {
  TIMED(router_norm_backward, 0.0,
        (dev, dgates, x, weight, probs, lse, experts, gates, load, aux_scale, z_scale, dlogits,
         dweight, norm, done));
}
static moe_status timed_permute_plan(moe_device *dev, moe_tensor experts, int64_t pad,
                                     moe_tensor offsets, moe_tensor pair, moe_tensor slot) {
  TIMED(permute_plan, 0.0, (dev, experts, pad, offsets, pair, slot));
}
static moe_status timed_permute_window(moe_device *dev, moe_tensor offsets, int64_t begin,
                                       int64_t rows, moe_tensor out) {
  TIMED(permute_window, 0.0, (dev, offsets, begin, rows, out));
}
static moe_status timed_gather_rows(moe_device *dev, moe_tensor src, moe_tensor pair, int64_t group,
                                    moe_tensor out) {
  TIMED(gather_rows, 0.0, (dev, src, pair, group, out));
}
static moe_status timed_gather_gates(moe_device *dev, moe_tensor values, moe_tensor pair,
                                     moe_tensor out) {
  TIMED(gather_gates, 0.0, (dev, values, pair, out));
}
static moe_status timed_combine_rows(moe_device *dev, moe_tensor src, moe_tensor slot,
                                     int64_t begin, int beta, moe_tensor out) {
  TIMED(combine_rows, 0.0, (dev, src, slot, begin, beta, out));
}
static moe_status timed_combine_norm(moe_device *dev, moe_tensor src, moe_tensor slot,
                                     moe_norm norm, bool *done) {
  TIMED(combine_norm, 0.0, (dev, src, slot, norm, done));
}
static moe_status timed_combine_gates(moe_device *dev, moe_tensor src, moe_tensor slot,
                                      int64_t begin, int beta, moe_tensor out) {
  TIMED(combine_gates, 0.0, (dev, src, slot, begin, beta, out));
}
static moe_status timed_localize_experts(moe_device *dev, moe_tensor experts, moe_tensor gates,
                                         int64_t begin, int64_t count) {
  TIMED(localize_experts, 0.0, (dev, experts, gates, begin, count));
}
static moe_status timed_expert_up(moe_device *dev, moe_tensor x, moe_tensor offsets, moe_tensor w13,
                                  moe_tensor gates, moe_gu_kind kind, moe_tensor gu, moe_tensor a) {
  TIMED(expert_up, 2.0 * (double)moe_tensor_count(x) * (double)gu.shape[1],
        (dev, x, offsets, w13, gates, kind, gu, a));
}
static moe_status timed_expert_down(moe_device *dev, moe_tensor a, moe_tensor offsets,
                                    moe_tensor w2, moe_tensor y) {
  TIMED(expert_down, 2.0 * (double)moe_tensor_count(a) * (double)y.shape[1],
        (dev, a, offsets, w2, y));
}
static moe_status timed_expert_down_backward(moe_device *dev, moe_tensor dy, moe_tensor offsets,
                                             moe_tensor w2, moe_tensor gates, moe_gu_kind kind,
                                             moe_tensor gu, moe_tensor a, moe_tensor dgates) {
  TIMED(expert_down_backward, 2.0 * (double)moe_tensor_count(dy) * (double)a.shape[1],
        (dev, dy, offsets, w2, gates, kind, gu, a, dgates));
}
static moe_status timed_gates_backward(moe_device *dev, moe_tensor dy, moe_tensor y,
                                       moe_tensor slot, moe_tensor gates, moe_tensor dgates) {
  TIMED(gates_backward, 0.0, (dev, dy, y, slot, gates, dgates));
}
static moe_status timed_gather_backward(moe_device *dev, moe_tensor dy, moe_tensor pair,
                                        moe_tensor y, moe_tensor slot, moe_tensor gates,
                                        moe_tensor out, moe_tensor dgates, bool *done) {
  TIMED(gather_backward, 0.0, (dev, dy, pair, y, slot, gates, out, dgates, done));
}
static moe_status timed_expert_up_backward(moe_device *dev, moe_tensor dgu, moe_tensor offsets,
                                           moe_tensor w13, moe_tensor dx) {
  TIMED(expert_up_backward, 2.0 * (double)moe_tensor_count(dgu) * (double)dx.shape[1],
        (dev, dgu, offsets, w13, dx));
}
static moe_status timed_expert_weight_grad(moe_device *dev, moe_tensor left, moe_tensor right,
                                           moe_tensor offsets, int accumulate, moe_tensor dw,
                                           moe_tensor squares) {
  TIMED(expert_weight_grad, 2.0 * (double)moe_tensor_count(left) * (double)right.shape[1],
        (dev, left, right, offsets, accumulate, dw, squares));
}
static moe_status timed_experts_decode(moe_device *dev, moe_tensor x, moe_tensor experts,
                                       moe_tensor gates, int64_t first, moe_tensor w13,
                                       moe_tensor w2, moe_tensor hidden, moe_tensor out) {
  TIMED(experts_decode, 6.0 * (double)moe_tensor_count(hidden) * (double)x.shape[1],
        (dev, x, experts, gates, first, w13, w2, hidden, out));
}
static moe_status timed_sum_choices(moe_device *dev, moe_tensor terms, moe_tensor out) {
  TIMED(sum_choices, 0.0, (dev, terms, out));
}
static moe_status timed_cross_entropy(moe_device *dev, moe_tensor logits, moe_tensor targets,
                                      float scale, int with_grad, moe_tensor loss,
                                      moe_tensor row_loss) {
  TIMED(cross_entropy, 0.0, (dev, logits, targets, scale, with_grad, loss, row_loss));
}
static moe_status timed_clip_scale(moe_device *dev, moe_tensor sum_squares, double max_norm,
                                   double unscale, moe_tensor scale) {
  TIMED(clip_scale, 0.0, (dev, sum_squares, max_norm, unscale, scale));
}
static moe_status timed_adamw(moe_device *dev, moe_adamw_args args, moe_tensor now, moe_tensor grad,
                              moe_tensor scale, moe_tensor master, moe_tensor m, moe_tensor v,
                              moe_tensor weight) {
  TIMED(adamw, 0.0, (dev, args, now, grad, scale, master, m, v, weight));
}
static moe_status timed_sample(moe_device *dev, moe_tensor logits, moe_sample_args args,
                               moe_tensor streams, moe_tensor positions, moe_tensor token) {
  TIMED(sample, 0.0, (dev, logits, args, streams, positions, token));
}
static moe_status timed_advance(moe_device *dev, moe_tensor counts, moe_tensor by) {
  TIMED(advance, 0.0, (dev, counts, by));
}

static void wrap(moe_backend *table) {
  if (table->graph_launch != NULL) table->graph_launch = timed_graph_launch;
  table->zero = timed_zero;
  table->copy = timed_copy;
  table->add = timed_add;
  table->sum_rows = timed_sum_rows;
  table->scale = timed_scale;
  table->sum_squares = timed_sum_squares;
  table->embed = timed_embed;
  table->embed_backward = timed_embed_backward;
  table->rms_norm = timed_rms_norm;
  table->rms_norm_backward = timed_rms_norm_backward;
  table->gemm = timed_gemm;
  table->norm_gemm = NULL; /* each part for itself */
  if (table->norm_router != NULL) table->norm_router = timed_norm_router;
  table->rope = timed_rope;
  table->attention = timed_attention;
  table->attention_backward = timed_attention_backward;
  table->attention_cached = timed_attention_cached;
  table->router = timed_router;
  table->router_drop = timed_router_drop;
  table->router_backward = timed_router_backward;
  if (table->router_norm_backward != NULL) table->router_norm_backward = timed_router_norm_backward;
  table->permute_plan = timed_permute_plan;
  table->permute_window = timed_permute_window;
  table->gather_rows = timed_gather_rows;
  table->gather_gates = timed_gather_gates;
  table->combine_rows = timed_combine_rows;
  if (table->combine_norm != NULL) table->combine_norm = timed_combine_norm;
  table->combine_gates = timed_combine_gates;
  table->localize_experts = timed_localize_experts;
  table->expert_up = timed_expert_up;
  table->expert_down = timed_expert_down;
  table->expert_down_backward = timed_expert_down_backward;
  table->gates_backward = timed_gates_backward;
  if (table->gather_backward != NULL) table->gather_backward = timed_gather_backward;
  table->expert_up_backward = timed_expert_up_backward;
  table->expert_weight_grad = timed_expert_weight_grad;
  table->experts_decode = timed_experts_decode;
  table->sum_choices = timed_sum_choices;
  table->cross_entropy = timed_cross_entropy;
  table->clip_scale = timed_clip_scale;
  table->adamw = timed_adamw;
  table->sample = timed_sample;
  table->advance = timed_advance;
}

static void destroy(moe_device *dev, struct moe_profile *p) {
  if (p->clock) p->inner->free(dev, p->clock);
  free(p->counts);
  free(p);
}

moe_status moe_profile_start(moe_device *dev, bool clocks) {
  struct moe_profile *p = calloc(1, sizeof *p);
  if (!p) return moe_fail(MOE_NO_MEMORY, "out of memory: profile");
  p->inner = dev->backend;
  if (clocks && p->inner->count_cycles) {
    p->clock = p->inner->alloc(dev, COUNT_BYTES);
    p->counts = calloc(1, COUNT_BYTES);
    if (!p->clock || !p->counts) {
      destroy(dev, p);
      return moe_fail(MOE_NO_MEMORY, "out of memory: clocks of a profile");
    }
  }
  p->timed = *dev->backend;
  wrap(&p->timed);
  dev->profile = p;
  dev->backend = &p->timed;
  return MOE_OK;
}

bool moe_profile_is_on(const moe_device *dev) {
  return dev->profile != NULL;
}

/* What was counted from the begin of span i to that of the next, unless either was missed. */
static void add_cycles(const struct moe_profile *p, int64_t i, moe_profile_row *row) {
  if (!p->counts) return;
  const uint64_t *from = p->counts + 2 * i, *to = from + 2;
  if (from[1] == 0 || to[1] <= from[1]) return;
  row->cycles += (double)(to[0] - from[0]);
  row->cycle_seconds += 1e-9 * (double)(to[1] - from[1]);
}

/* Add span i to the row of its name. */
static int add_span(const struct moe_profile *p, int64_t at, moe_profile_row *rows, int count,
                    double seconds) {
  const span *s = &p->span[at];
  int i = 0;
  while (i < count && (strcmp(rows[i].op, s->op) != 0 || strcmp(rows[i].label, s->label) != 0)) i++;
  if (i == MAX_ROWS) return count;
  if (i == count) rows[count++] = (moe_profile_row){.op = s->op, .label = s->label};
  rows[i].calls++;
  rows[i].seconds += seconds;
  rows[i].flops += s->flops;
  add_cycles(p, at, &rows[i]);
  return count;
}

static int by_seconds(const void *a, const void *b) {
  double x = ((const moe_profile_row *)a)->seconds, y = ((const moe_profile_row *)b)->seconds;
  return (x < y) - (x > y);
}

static moe_status fetch_counts(moe_device *dev, struct moe_profile *p) {
  if (p->clock) {
    p->inner->count_cycles(dev, p->clock + 2 * p->spans);
    MOE_TRY(moe_device_download(dev, p->counts, p->clock, COUNT_BYTES));
  }
  return moe_device_sync(dev);
}

moe_status moe_profile_stop(moe_device *dev, moe_profile_row *rows, int room, int *count) {
  struct moe_profile *p = dev->profile;
  moe_profile_row all[MAX_ROWS];
  int found = 0;
  moe_status status = fetch_counts(dev, p);
  for (int64_t i = 0; i < p->spans && status == MOE_OK; i++) {
    const span *s = &p->span[i];
    found = add_span(p, i, all, found, p->inner->between(dev, &s->begin, &s->end));
  }
  for (int64_t i = 0; i < p->spans; i++) {
    p->inner->forget(dev, &p->span[i].begin);
    p->inner->forget(dev, &p->span[i].end);
  }
  qsort(all, (size_t)found, sizeof *all, by_seconds);
  *count = found < room ? found : room;
  memcpy(rows, all, (size_t)*count * sizeof *rows);
  dev->backend = p->inner;
  dev->profile = NULL;
  destroy(dev, p);
  return status;
}
