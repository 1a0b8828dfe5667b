/* Attention against a float64 reference that stores the whole S x S matrix. */
#include <criterion/criterion.h>
#include <math.h>

#include "tests/support/op_check.h"

typedef struct {
  moe_attention_shape s;
  int64_t documents; /* about how many in a sequence; 0: no doc_start */
} example;

/* One case on the device, with its references. */
typedef struct {
  moe_attention_shape s;
  op_tensor qkv, doc, dout, out, lse, dqkv;
  double *want_out, *want_lse, *want_dqkv;
} setup;

static int64_t width_of(moe_attention_shape s) {
  return (s.heads + 2 * s.kv_heads) * s.head_dim;
}

/* doc_start of `count` documents of uneven lengths. */
static int32_t *make_documents(moe_attention_shape s, int64_t count) {
  int32_t *start = op_int32s(s.batch * s.seq);
  for (int64_t b = 0; b < s.batch; b++)
    for (int64_t i = 0, begin = 0; i < s.seq; i++) {
      if (op_pick("boundary", b * s.seq + i, s.seq) < count) begin = i;
      start[b * s.seq + i] = (int32_t)begin;
    }
  return start;
}

/* ---- reference ------------------------------------------------------------------------------- */

/* Probabilities of query i of head h (p [S], zero where not visible); returns lse. */
static double probabilities(moe_attention_shape s, const double *qkv, const double *doc, int64_t b,
                            int64_t h, int64_t i, double *p) {
  int64_t w = width_of(s), d = s.head_dim, g = h / (s.heads / s.kv_heads);
  const double *q = qkv + (b * s.seq + i) * w + h * d;
  int64_t begin = doc ? (int64_t)doc[b * s.seq + i] : 0;
  double top = -INFINITY, sum = 0.0;
  for (int64_t j = begin; j <= i; j++) {
    p[j] = op_dot(q, qkv + (b * s.seq + j) * w + (s.heads + g) * d, d) / sqrt((double)d);
    top = fmax(top, p[j]);
  }
  for (int64_t j = begin; j <= i; j++) sum += exp(p[j] - top);
  for (int64_t j = 0; j < s.seq; j++) p[j] = j < begin || j > i ? 0.0 : exp(p[j] - top - log(sum));
  return top + log(sum);
}

static void forward(moe_attention_shape s, const double *qkv, const double *doc, double *out,
                    double *lse) {
  int64_t w = width_of(s), d = s.head_dim;
  double *p = op_doubles(s.seq);
  for (int64_t n = 0; n < s.batch * s.heads * s.seq; n++) {
    int64_t b = n / s.seq / s.heads, h = n / s.seq % s.heads, i = n % s.seq;
    int64_t g = h / (s.heads / s.kv_heads);
    double *o = out + (b * s.seq + i) * s.heads * d + h * d;
    lse[n] = probabilities(s, qkv, doc, b, h, i, p);
    for (int64_t c = 0; c < d; c++) o[c] = 0.0;
    for (int64_t j = 0; j <= i; j++)
      for (int64_t c = 0; c < d; c++)
        o[c] += p[j] * qkv[(b * s.seq + j) * w + (s.heads + s.kv_heads + g) * d + c];
  }
}

static void backward(moe_attention_shape s, const double *qkv, const double *doc,
                     const double *dout, double *dqkv) {
  int64_t w = width_of(s), d = s.head_dim;
  double *p = op_doubles(s.seq), *dp = op_doubles(s.seq);
  for (int64_t n = 0; n < s.batch * s.heads * s.seq; n++) {
    int64_t b = n / s.seq / s.heads, h = n / s.seq % s.heads, i = n % s.seq;
    int64_t g = h / (s.heads / s.kv_heads), row = (b * s.seq + i) * w + h * d;
    const double *grad = dout + (b * s.seq + i) * s.heads * d + h * d;
    double sum = 0.0;
    probabilities(s, qkv, doc, b, h, i, p);
    for (int64_t j = 0; j <= i; j++) {
      dp[j] = op_dot(grad, qkv + (b * s.seq + j) * w + (s.heads + s.kv_heads + g) * d, d);
      sum += p[j] * dp[j];
    }
    for (int64_t j = 0; j <= i; j++) {
      int64_t key = (b * s.seq + j) * w + (s.heads + g) * d, value = key + s.kv_heads * d;
      double ds = p[j] * (dp[j] - sum) / sqrt((double)d);
      for (int64_t c = 0; c < d; c++) {
        dqkv[row + c] += ds * qkv[key + c];
        dqkv[key + c] += ds * qkv[row + c];
        dqkv[value + c] += p[j] * grad[c];
      }
    }
  }
}

/* ---- running --------------------------------------------------------------------------------- */

static setup make(moe_device *dev, moe_dtype act, example e, double std) {
  moe_attention_shape s = e.s;
  int64_t t = s.batch * s.seq, wide = s.heads * s.head_dim;
  setup u = {.s = s};
  u.qkv = op_random(dev, "qkv", act, OP_SHAPE(t, width_of(s)), std);
  u.dout = op_random(dev, "dout", act, OP_SHAPE(t, wide), 1.0);
  u.out = op_output(dev, "out", act, OP_SHAPE(t, wide));
  u.lse = op_output(dev, "lse", MOE_F32, OP_SHAPE(s.batch, s.heads, s.seq));
  u.dqkv = op_output(dev, "dqkv", act, OP_SHAPE(t, width_of(s)));
  u.doc = (op_tensor){.t = moe_tensor_none()};
  if (e.documents > 0)
    u.doc = op_ints(dev, "doc_start", OP_SHAPE(t), make_documents(s, e.documents));
  op_scratch(dev, moe_attention_scratch(dev, s, act));
  u.want_out = op_doubles(t * wide);
  u.want_lse = op_doubles(s.batch * s.heads * s.seq);
  u.want_dqkv = op_doubles(t * width_of(s));
  forward(s, u.qkv.v, u.doc.v, u.want_out, u.want_lse);
  backward(s, u.qkv.v, u.doc.v, u.dout.v, u.want_dqkv);
  return u;
}

static void run(moe_device *dev, setup *u) {
  op_ok(moe_attention(dev, u->s, u->qkv.t, u->doc.t, u->out.t, u->lse.t));
  op_ok(moe_attention_backward(dev, u->s, u->dout.t, u->qkv.t, u->doc.t, u->out.t, u->lse.t,
                               u->dqkv.t));
}

static void check(moe_device *dev, moe_dtype act, example e, double std) {
  setup u = make(dev, act, e, std);
  run(dev, &u);
  double tolerance = op_tolerance(act);
  op_close(u.out, u.want_out, 2.0 * tolerance);
  op_close(u.lse, u.want_lse, act == MOE_F32 ? 1e-6 : tolerance);
  op_close(u.dqkv, u.want_dqkv, 4.0 * tolerance); /* out comes back rounded */
}

static void check_all(moe_device *dev, moe_dtype act, const example *list, size_t count) {
  for (size_t i = 0; i < count; i++) check(dev, act, list[i], 1.0);
}
#define CHECK_ALL(dev, act, list) check_all(dev, act, list, sizeof(list) / sizeof(list)[0])

/* ---- tests ----------------------------------------------------------------------------------- */

/* Of the last there is so much that one of a GPU's blocks takes several heads. */
static void many_shapes(moe_device *dev, moe_dtype act) {
  const example list[] = {
      {{1, 1, 1, 1, 8}, 0},     {{2, 2, 4, 1, 16}, 0},    {{1, 7, 12, 1, 8}, 0},
      {{2, 65, 2, 2, 16}, 0},   {{1, 64, 4, 1, 64}, 0},   {{2, 100, 8, 2, 64}, 0},
      {{1, 129, 4, 2, 128}, 0}, {{1, 200, 12, 1, 64}, 0}, {{1, 3, 300, 1, 8}, 0},
      {{2, 390, 6, 2, 64}, 0},  {{1, 256, 12, 1, 64}, 0}, {{70, 130, 4, 1, 64}, 0}};
  CHECK_ALL(dev, act, list);
}
Test(attention, matches_float64_for_odd_shapes_and_all_head_groupings) {
  op_each(many_shapes);
}

static void long_rows(moe_device *dev, moe_dtype act) {
  const example list[] = {{{1, 257, 1, 1, 8}, 0}, {{1, 600, 4, 1, 16}, 0}};
  CHECK_ALL(dev, act, list);
}
Test(attention, carries_the_running_softmax_over_several_key_blocks) {
  op_each(long_rows);
}

static void documents(moe_device *dev, moe_dtype act) {
  const example list[] = {{{2, 50, 4, 1, 16}, 3},  {{1, 200, 4, 2, 8}, 100},
                          {{1, 600, 2, 1, 16}, 2}, {{2, 5, 1, 1, 64}, 5},
                          {{2, 420, 4, 1, 64}, 4}, {{70, 130, 4, 1, 64}, 2}};
  CHECK_ALL(dev, act, list);
}
Test(attention, stops_at_document_boundaries) {
  op_each(documents);
}

static void sharp_scores(moe_device *dev, moe_dtype act) {
  if (act != MOE_F32) return; /* the reference has no rounding of `out` to follow */
  setup u = make(dev, act, (example){{1, 300, 4, 1, 64}, 0}, 8.0);
  run(dev, &u);
  op_close(u.out, u.want_out, 2e-5); /* scores of some hundreds: exp magnifies their last bits */
  op_close(u.lse, u.want_lse, 1e-6);
  op_close(u.dqkv, u.want_dqkv, 1e-4);
}
Test(attention, stays_exact_when_scores_are_hundreds) {
  op_each(sharp_scores);
}

/* The first keys score hundreds above what a query saw near itself, and more than 2^127 apart. */
static void towering_keys(moe_device *dev, moe_dtype act) {
  moe_attention_shape s = {1, 400, 4, 2, 64};
  setup u = make(dev, act, (example){s, 0}, 1.0);
  for (int64_t row = 0; row < 100; row++)
    for (int64_t c = 0; c < s.kv_heads * s.head_dim; c++)
      u.qkv.v[row * width_of(s) + s.heads * s.head_dim + c] *= 64.0;
  u.qkv = op_values(dev, "qkv", act, OP_SHAPE(s.seq, width_of(s)), u.qkv.v);
  forward(s, u.qkv.v, NULL, u.want_out, u.want_lse);
  op_ok(moe_attention(dev, s, u.qkv.t, u.doc.t, u.out.t, u.lse.t));
  op_close(u.out, u.want_out, act == MOE_F32 ? 2e-5 : 2.0 * op_tolerance(act));
  op_close(u.lse, u.want_lse, act == MOE_F32 ? 1e-6 : op_tolerance(act));
}
Test(attention, follows_scores_that_tower_over_those_before) {
  op_each(towering_keys);
}

/* A query that is not a number, among others that are. */
static void bad_query(moe_device *dev, moe_dtype act) {
  moe_attention_shape s = {1, 300, 2, 1, 64};
  setup u = make(dev, act, (example){s, 0}, 1.0);
  int64_t wide = s.heads * s.head_dim, bad = 137;
  for (int64_t c = 0; c < s.head_dim; c++) u.qkv.v[bad * width_of(s) + c] = NAN;
  u.qkv = op_values(dev, "qkv", act, OP_SHAPE(s.seq, width_of(s)), u.qkv.v);
  op_ok(moe_attention(dev, s, u.qkv.t, u.doc.t, u.out.t, u.lse.t));
  op_read(&u.out);
  for (int64_t i = 0; i < u.out.count; i++)
    op_require(isnan(u.out.v[i]) == (i / wide == bad && i % wide < s.head_dim), "out[%lld] is %g",
               (long long)i, u.out.v[i]);
}
Test(attention, shows_what_is_not_a_number_and_goes_on) {
  op_each(bad_query);
}

/* sum of dout * out, as a function of qkv. */
static double loss(const double *qkv, void *context) {
  const setup *u = context;
  forward(u->s, qkv, u->doc.v, u->want_out, u->want_lse);
  return op_dot(u->want_out, u->dout.v, u->out.count);
}

static void differences(moe_device *dev, moe_dtype act) {
  if (act != MOE_F32) return;
  setup u = make(dev, act, (example){{1, 9, 4, 2, 8}, 2}, 1.0);
  double *qkv = op_doubles(u.qkv.count), *want = op_doubles(u.qkv.count);
  for (int64_t i = 0; i < u.qkv.count; i++) qkv[i] = u.qkv.v[i];
  run(dev, &u);
  op_differences(loss, &u, qkv, u.qkv.count, want);
  op_close(u.dqkv, want, 2e-6);
}
Test(attention, gradient_agrees_with_central_differences) {
  op_each(differences);
}

static void any_threads(moe_device *dev) {
  check(dev, MOE_F32, (example){{1, 150, 12, 1, 16}, 2}, 1.0);
  check(dev, MOE_F32, (example){{3, 20, 4, 2, 8}, 0}, 1.0);
}
Test(attention, shares_one_head_group_among_threads) {
  for (int threads = 1; threads <= 5; threads++) op_with_threads(threads, any_threads);
}

static void twice(moe_device *dev, moe_dtype act) {
  setup u = make(dev, act, (example){{1, 300, 4, 1, 32}, 3}, 1.0);
  run(dev, &u);
  op_tensor out = op_clone(dev, u.out), dqkv = op_clone(dev, u.dqkv);
  run(dev, &u);
  op_equal(u.out, out.v);
  op_equal(u.dqkv, dqkv.v);
}
Test(attention, gives_the_same_bits_again) {
  op_each(twice);
}

static void nothing(moe_device *dev, moe_dtype act) {
  check(dev, act, (example){{0, 5, 4, 1, 8}, 0}, 1.0);
  check(dev, act, (example){{2, 0, 4, 1, 8}, 0}, 1.0);
}
Test(attention, accepts_an_empty_batch) {
  op_each(nothing);
}

static void no_scratch(moe_device *dev, moe_dtype act) {
  setup u = make(dev, act, (example){{1, 64, 4, 1, 64}, 0}, 1.0);
  int64_t needed = moe_attention_scratch(dev, u.s, act);
  if (needed <= 16) return;
  op_scratch(dev, 16);
  op_refuses(
      MOE_NO_MEMORY, "attention",
      moe_attention_backward(dev, u.s, u.dout.t, u.qkv.t, u.doc.t, u.out.t, u.lse.t, u.dqkv.t));
}
Test(attention, names_itself_when_scratch_is_too_small) {
  op_each(no_scratch);
}
