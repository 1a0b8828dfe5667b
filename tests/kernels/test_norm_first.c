/* Operations that begin with a norm, in one kernel where there is one, against the two operations
 * that they are made of; and rotation inside attention likewise. */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "tests/support/op_check.h"

static const double eps = 1e-5;

typedef struct {
  op_tensor x, residual, gain, sum, out, rstd;
} normed;

/* residual: whether there is one. Each call makes the same numbers and outputs of its own. */
static normed make_norm(moe_device *dev, moe_dtype act, int64_t rows, int64_t width,
                        bool residual) {
  normed n = {.x = op_random(dev, "x", act, OP_SHAPE(rows, width), 2.0)};
  if (residual) n.residual = op_random(dev, "residual", act, OP_SHAPE(rows, width), 1.0);
  n.gain = op_random(dev, "gain", MOE_F32, OP_SHAPE(width), 1.0);
  n.sum = op_output(dev, "sum", act, OP_SHAPE(rows, width));
  n.out = op_output(dev, "out", act, OP_SHAPE(rows, width));
  n.rstd = op_output(dev, "rstd", MOE_F32, OP_SHAPE(rows));
  return n;
}

static moe_norm arguments(const normed *n) {
  return (moe_norm){n->x.t, n->residual.t, n->gain.t, eps, n->sum.t, n->out.t, n->rstd.t};
}

static void do_norm(moe_device *dev, const normed *n) {
  op_ok(moe_rms_norm_of(dev, arguments(n)));
}

/* Few rows and many, words and odd ends, as wide as a warp holds and wider. */
static const int64_t sizes[][3] = {/* rows, width, columns or experts */
                                   {1, 768, 90}, {1, 1024, 16}, {3, 8, 7},   {8, 96, 33},
                                   {9, 776, 40}, {32, 64, 64},  {33, 64, 8}, {2, 1032, 16},
                                   {5, 17, 9},   {1, 256, 1}};
enum { SIZES = sizeof sizes / sizeof *sizes };

static void product(moe_device *dev, moe_dtype act, const int64_t *size, bool residual,
                    moe_dtype to) {
  normed one = make_norm(dev, act, size[0], size[1], residual);
  normed two = make_norm(dev, act, size[0], size[1], residual);
  op_tensor b = op_random(dev, "b", act, OP_SHAPE(size[2], size[1]), 0.1);
  op_tensor c = op_output(dev, "c", to, OP_SHAPE(size[0], size[2]));
  op_tensor want = op_output(dev, "want", to, OP_SHAPE(size[0], size[2]));
  do_norm(dev, &two);
  op_ok(moe_gemm(dev, MOE_NT, two.out.t, b.t, 0.0f, want.t));
  op_ok(moe_norm_gemm(dev, arguments(&one), b.t, c.t));
  op_close(c, op_read(&want), 2.0 * op_tolerance(act));
  if (residual) op_equal(one.sum, op_read(&two.sum));
}

static void products(moe_device *dev, moe_dtype act) {
  for (int i = 0; i < SIZES; i++)
    for (int kind = 0; kind < 4; kind++)
      product(dev, act, sizes[i], kind & 1, kind & 2 ? MOE_F32 : act);
}
Test(norm_first, a_product_of_norms_is_the_norm_and_the_product) {
  op_each(products);
}

typedef struct {
  op_tensor probs, lse, experts, gates, stats;
} routed;

static routed make_routed(moe_device *dev, int64_t rows, int64_t count, int64_t k) {
  return (routed){op_output(dev, "probs", MOE_F32, OP_SHAPE(rows, count)),
                  op_output(dev, "lse", MOE_F32, OP_SHAPE(rows)),
                  op_output(dev, "experts", MOE_I32, OP_SHAPE(rows, k)),
                  op_output(dev, "gates", MOE_F32, OP_SHAPE(rows, k)),
                  op_output(dev, "stats", MOE_F32, OP_SHAPE(1, 2 * count + 1))};
}

/* over: the sum takes the place of x, as in generation. */
static void route(moe_device *dev, moe_dtype act, const int64_t *size, bool residual, bool over) {
  int64_t rows = size[0], width = size[1], count = size[2], k = count < 4 ? count : 4;
  normed one = make_norm(dev, act, rows, width, residual);
  normed two = make_norm(dev, act, rows, width, residual);
  if (over) one.sum = one.x;
  op_tensor weight = op_random(dev, "weight", MOE_F32, OP_SHAPE(count, width), 0.2);
  op_tensor bias = op_random(dev, "bias", MOE_F32, OP_SHAPE(count), 0.05);
  routed r = make_routed(dev, rows, count, k), want = make_routed(dev, rows, count, k);
  do_norm(dev, &two);
  op_ok(moe_router(dev, two.out.t, weight.t, bias.t, want.probs.t, want.lse.t, want.experts.t,
                   want.gates.t, want.stats.t));
  op_ok(moe_norm_router(dev, arguments(&one), weight.t, bias.t, r.probs.t, r.lse.t, r.experts.t,
                        r.gates.t, r.stats.t));
  op_close(one.out, op_read(&two.out), op_tolerance(act));
  if (residual) op_equal(one.sum, op_read(&two.sum));
  op_equal(r.experts, op_read(&want.experts));
  op_close(r.probs, op_read(&want.probs), 2.0 * op_tolerance(act));
  op_close(r.lse, op_read(&want.lse), 2.0 * op_tolerance(act));
  op_close(r.gates, op_read(&want.gates), 2.0 * op_tolerance(act));
  op_close(r.stats, op_read(&want.stats), 2.0 * op_tolerance(act));
}

static void routes(moe_device *dev, moe_dtype act) {
  for (int i = 0; i < SIZES; i++)
    for (int kind = 0; kind < 4; kind++) route(dev, act, sizes[i], kind & 1, kind & 2);
}
Test(norm_first, routing_of_norms_is_the_norm_and_the_router) {
  op_each(routes);
}

static void in_place(moe_device *dev) {
  normed n = make_norm(dev, MOE_F32, 2, 8, true);
  op_tensor b = op_random(dev, "b", MOE_F32, OP_SHAPE(4, 8), 1.0);
  op_tensor c = op_output(dev, "c", MOE_F32, OP_SHAPE(2, 4));
  n.sum = n.x;
  op_refuses(MOE_INVALID, "norm_gemm: sum must be neither x nor residual",
             moe_norm_gemm(dev, arguments(&n), b.t, c.t));
}
Test(norm_first, a_product_of_norms_refuses_a_sum_that_others_still_read) {
  op_each_device(in_place);
}

/* ---- rotation -------------------------------------------------------------------------------- */

typedef struct {
  op_tensor qkv, keys, values, out;
} attended;

typedef struct {
  moe_attention_shape s;
  int64_t room;
  int32_t lengths[3];
} example;

static attended make_attended(moe_device *dev, moe_dtype act, example e) {
  moe_attention_shape s = e.s;
  int64_t width = s.kv_heads * s.head_dim, t = s.batch * s.seq;
  int64_t all = s.heads * s.head_dim + 2 * width;
  return (attended){op_random(dev, "qkv", act, OP_SHAPE(t, all), 1.0),
                    op_random(dev, "keys", act, OP_SHAPE(s.batch, e.room, width), 1.0),
                    op_random(dev, "values", act, OP_SHAPE(s.batch, e.room, width), 1.0),
                    op_filled(dev, "out", act, OP_SHAPE(t, s.heads * s.head_dim), 3.0)};
}

static op_tensor table_of(moe_device *dev, int64_t rows, int64_t d) {
  double *angles = op_doubles(rows * d);
  float *table = malloc((size_t)(rows * d) * sizeof *table);
  moe_rope_table_fill(10000.0, 8.0, rows, d, table);
  for (int64_t i = 0; i < rows * d; i++) angles[i] = (double)table[i];
  free(table);
  return op_values(dev, "table", MOE_F32, OP_SHAPE(rows, d), angles);
}

static op_tensor positions_of(moe_device *dev, example e) {
  int64_t t = e.s.batch * e.s.seq;
  int32_t *at = op_int32s(t);
  for (int64_t i = 0; i < t; i++) at[i] = e.lengths[i / e.s.seq] + (int32_t)(i % e.s.seq);
  return op_ints(dev, "positions", OP_SHAPE(t), at);
}

static void rotate(moe_device *dev, moe_dtype act, example e) {
  moe_attention_shape s = e.s;
  attended one = make_attended(dev, act, e), two = make_attended(dev, act, e);
  op_tensor turns = table_of(dev, e.room + s.seq, s.head_dim), positions = positions_of(dev, e);
  op_tensor lengths = op_ints(dev, "lengths", OP_SHAPE(s.batch), e.lengths);
  moe_tensor none = moe_tensor_none();
  op_scratch(dev, moe_attention_cached_scratch(dev, s, e.room, act));
  op_ok(moe_rope(dev, two.qkv.t, positions.t, turns.t, s.heads, s.kv_heads, 1));
  op_ok(moe_attention_cached(dev, s, two.qkv.t, none, none, two.keys.t, two.values.t, lengths.t,
                             two.out.t));
  op_ok(moe_attention_cached(dev, s, one.qkv.t, positions.t, turns.t, one.keys.t, one.values.t,
                             lengths.t, one.out.t));
  op_close(one.out, op_read(&two.out), 2.0 * op_tolerance(act));
  op_close(one.keys, op_read(&two.keys), 0.1 * op_tolerance(act));
  op_equal(one.values, op_read(&two.values));
}

/* One token and several; caches that are empty, long, and full: the last is not touched. */
static void rotations(moe_device *dev, moe_dtype act) {
  const example list[] = {
      {{1, 1, 12, 1, 64}, 1090, {1024}},    {{3, 1, 12, 1, 64}, 300, {0, 299, 128}},
      {{2, 1, 8, 2, 128}, 200, {150, 200}}, {{2, 1, 20, 1, 64}, 400, {63, 64}},
      {{1, 1, 6, 2, 80}, 90, {70}},         {{2, 3, 12, 1, 64}, 130, {127, 5}},
      {{1, 1, 12, 1, 64}, 20000, {19000}},  {{1, 40, 4, 2, 32}, 90, {30}}};
  for (size_t i = 0; i < sizeof list / sizeof *list; i++) rotate(dev, act, list[i]);
}
Test(norm_first, attention_rotates_as_rope_does) {
  op_each(rotations);
}

/* Lengths that are still being written when attention could begin: the place of the largest of many
 * logits. */
static void late_lengths(moe_device *dev, moe_dtype act) {
  enum { MANY = 1 << 18 };
  const example e = {{2, 1, 12, 1, 64}, 300, {40, 299}};
  const int32_t before[] = {290, 3};
  moe_attention_shape s = e.s;
  attended one = make_attended(dev, act, e), two = make_attended(dev, act, e);
  op_tensor turns = table_of(dev, e.room, s.head_dim), at = positions_of(dev, e);
  op_tensor late = op_ints(dev, "lengths", OP_SHAPE(s.batch), before);
  op_tensor streams = op_ints(dev, "streams", OP_SHAPE(s.batch), before);
  double *v = op_doubles(s.batch * MANY);
  for (int64_t i = 0; i < s.batch * MANY; i++) v[i] = i % MANY == e.lengths[i / MANY];
  op_tensor logits = op_values(dev, "logits", MOE_F32, OP_SHAPE(s.batch, MANY), v);
  op_scratch(dev, moe_attention_cached_scratch(dev, s, e.room, act));
  op_ok(moe_attention_cached(dev, s, two.qkv.t, at.t, turns.t, two.keys.t, two.values.t, at.t,
                             two.out.t));
  op_ok(moe_device_sync(dev));
  op_ok(moe_sample(dev, logits.t, (moe_sample_args){.top_p = 1.0f}, streams.t, streams.t, late.t));
  op_ok(moe_attention_cached(dev, s, one.qkv.t, late.t, turns.t, one.keys.t, one.values.t, late.t,
                             one.out.t));
  op_equal(late, op_read(&at));
  op_equal(one.out, op_read(&two.out));
  op_equal(one.keys, op_read(&two.keys));
  op_equal(one.values, op_read(&two.values));
}
Test(norm_first, attention_takes_lengths_from_the_operation_before) {
  op_each(late_lengths);
}

static void odd_tables(moe_device *dev) {
  static float block[256];
  moe_attention_shape s = {1, 1, 2, 1, 8};
  moe_tensor qkv = moe_tensor_2d(block, MOE_F32, 1, 32),
             keys = moe_tensor_3d(block, MOE_F32, 1, 4, 8);
  moe_tensor one = moe_tensor_1d(block, MOE_I32, 1), out = moe_tensor_2d(block, MOE_F32, 1, 16);
  moe_tensor two = moe_tensor_1d(block, MOE_I32, 2), table = moe_tensor_2d(block, MOE_F32, 5, 8);
  op_refuses(MOE_INVALID, "attention_cached: positions is",
             moe_attention_cached(dev, s, qkv, two, table, keys, keys, one, out));
  op_refuses(MOE_INVALID, "attention_cached: table is",
             moe_attention_cached(dev, s, qkv, one, moe_tensor_2d(block, MOE_F32, 5, 6), keys, keys,
                                  one, out));
}
Test(norm_first, attention_refuses_a_table_of_other_heads) {
  op_each_device(odd_tables);
}
