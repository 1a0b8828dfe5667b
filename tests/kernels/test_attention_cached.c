/* Attention over a cache against a float64 reference: what is stored, what is seen, and what is
 * left alone. */
#include <criterion/criterion.h>
#include <math.h>

#include "tests/support/op_check.h"

enum { MOST_BATCH = 4 };

typedef struct {
  moe_attention_shape s;
  int64_t room;
  int32_t lengths[MOST_BATCH];
} example;

typedef struct {
  example e;
  op_tensor qkv, keys, values, lengths, out;
  double *want_keys, *want_values, *want_out;
} setup;

/* The cache is filled for the tokens it holds and NaN after them: nothing there may be read. */
static op_tensor cache(moe_device *dev, const char *name, moe_dtype act, example e, double std) {
  int64_t width = e.s.kv_heads * e.s.head_dim;
  op_tensor x = op_random(dev, name, act, OP_SHAPE(e.s.batch, e.room, width), std);
  for (int64_t b = 0; b < e.s.batch; b++)
    for (int64_t i = (b * e.room + e.lengths[b]) * width; i < (b + 1) * e.room * width; i++)
      x.v[i] = NAN;
  return op_values(dev, name, act, OP_SHAPE(e.s.batch, e.room, width), x.v);
}

/* Row i of sequence b: out [H d] from the wanted cache. */
static void attend(const setup *u, int64_t b, int64_t i, double *out) {
  moe_attention_shape s = u->e.s;
  int64_t d = s.head_dim, width = s.kv_heads * d, seen = u->e.lengths[b] + i + 1;
  const double *row = u->qkv.v + (b * s.seq + i) * (s.heads + 2 * s.kv_heads) * d;
  double *p = op_doubles(seen);
  for (int64_t h = 0; h < s.heads; h++) {
    int64_t g = h / (s.heads / s.kv_heads), first = b * u->e.room * width + g * d;
    double top = -INFINITY, sum = 0.0;
    for (int64_t j = 0; j < seen; j++) {
      p[j] = op_dot(row + h * d, u->want_keys + first + j * width, d) / sqrt((double)d);
      top = fmax(top, p[j]);
    }
    for (int64_t j = 0; j < seen; j++) sum += p[j] = exp(p[j] - top);
    for (int64_t c = 0; c < d; c++) out[h * d + c] = 0.0;
    for (int64_t j = 0; j < seen; j++)
      for (int64_t c = 0; c < d; c++)
        out[h * d + c] += p[j] / sum * u->want_values[first + j * width + c];
  }
}

static void expect(setup *u) {
  moe_attention_shape s = u->e.s;
  int64_t width = s.kv_heads * s.head_dim, wide = s.heads * s.head_dim;
  for (int64_t t = 0; t < s.batch * s.seq; t++) {
    int64_t b = t / s.seq, i = t % s.seq, at = u->e.lengths[b] + i;
    if (at >= u->e.room) {
      for (int64_t c = 0; c < wide; c++) u->want_out[t * wide + c] = NAN; /* as it was */
      continue;
    }
    const double *key = u->qkv.v + t * (wide + 2 * width) + wide;
    for (int64_t c = 0; c < width; c++) {
      u->want_keys[(b * u->e.room + at) * width + c] = key[c];
      u->want_values[(b * u->e.room + at) * width + c] = key[width + c];
    }
    attend(u, b, i, u->want_out + t * wide);
  }
}

static double *copy(op_tensor x) {
  double *to = op_doubles(x.count);
  for (int64_t i = 0; i < x.count; i++) to[i] = x.v[i];
  return to;
}

static setup make(moe_device *dev, moe_dtype act, example e, double std) {
  moe_attention_shape s = e.s;
  int64_t t = s.batch * s.seq, d = s.head_dim;
  setup u = {.e = e};
  u.qkv = op_random(dev, "qkv", act, OP_SHAPE(t, (s.heads + 2 * s.kv_heads) * d), std);
  u.keys = cache(dev, "keys", act, e, std);
  u.values = cache(dev, "values", act, e, std);
  u.lengths = op_ints(dev, "lengths", OP_SHAPE(s.batch), e.lengths);
  u.out = op_output(dev, "out", act, OP_SHAPE(t, s.heads * d));
  op_scratch(dev, moe_attention_cached_scratch(dev, s, e.room, act));
  u.want_keys = copy(u.keys);
  u.want_values = copy(u.values);
  u.want_out = op_doubles(u.out.count);
  expect(&u);
  return u;
}

static void run(moe_device *dev, setup *u) {
  op_ok(moe_attention_cached(dev, u->e.s, u->qkv.t, moe_tensor_none(), moe_tensor_none(), u->keys.t,
                             u->values.t, u->lengths.t, u->out.t));
}

/* As op_equal and op_close, where NaN is wanted: NaN, as it was. */
static void same(op_tensor x, const double *want) {
  op_read(&x);
  for (int64_t i = 0; i < x.count; i++)
    op_require(x.v[i] == want[i] || (isnan(x.v[i]) && isnan(want[i])), "%s: element %lld is %g",
               x.name, (long long)i, x.v[i]);
}

static void close_where_computed(op_tensor x, const double *want, double tolerance) {
  double error = 0.0, norm = 0.0;
  op_read(&x);
  for (int64_t i = 0; i < x.count; i++) {
    op_require(isnan(x.v[i]) == isnan(want[i]), "%s: element %lld is %g, not %g", x.name,
               (long long)i, x.v[i], want[i]);
    if (isnan(want[i])) continue;
    error += (x.v[i] - want[i]) * (x.v[i] - want[i]);
    norm += want[i] * want[i];
  }
  op_require(sqrt(error) <= tolerance * sqrt(norm), "%s: relative error %g", x.name,
             sqrt(error / norm));
}

static void check(moe_device *dev, moe_dtype act, example e, double std) {
  setup u = make(dev, act, e, std);
  run(dev, &u);
  same(u.keys, u.want_keys);
  same(u.values, u.want_values);
  close_where_computed(u.out, u.want_out, 2.0 * op_tolerance(act));
}

static void check_all(moe_device *dev, moe_dtype act, const example *list, size_t count) {
  for (size_t i = 0; i < count; i++) check(dev, act, list[i], 1.0);
}
#define CHECK_ALL(dev, act, list) check_all(dev, act, list, sizeof(list) / sizeof(list)[0])

/* ---- tests ----------------------------------------------------------------------------------- */

static void one_token(moe_device *dev, moe_dtype act) {
  const example list[] = {
      {{1, 1, 12, 1, 64}, 40, {0}},          {{3, 1, 12, 1, 64}, 300, {299, 0, 64}},
      {{4, 1, 4, 1, 16}, 70, {3, 69, 1, 0}}, {{2, 1, 8, 2, 32}, 150, {17, 128}},
      {{1, 1, 6, 3, 128}, 33, {31}},         {{2, 1, 1, 1, 24}, 9, {8, 2}},
      {{1, 1, 5, 5, 17}, 20, {11}},          {{1, 1, 40, 1, 64}, 20, {11}}};
  CHECK_ALL(dev, act, list);
}
Test(attention_cached, adds_one_token_to_each_sequence) {
  op_each(one_token);
}

static void chunks(moe_device *dev, moe_dtype act) {
  const example list[] = {{{1, 100, 12, 1, 64}, 100, {0}},     {{2, 70, 4, 2, 64}, 400, {300, 5}},
                          {{2, 33, 12, 1, 16}, 64, {31, 0}},   {{1, 129, 2, 1, 128}, 300, {150}},
                          {{3, 2, 12, 1, 64}, 90, {64, 0, 7}}, {{1, 9, 3, 3, 20}, 30, {3}},
                          {{1, 65, 1, 1, 48}, 80, {11}}};
  CHECK_ALL(dev, act, list);
}
Test(attention_cached, adds_a_chunk_of_tokens_that_see_their_own_past) {
  op_each(chunks);
}

static void long_cache(moe_device *dev, moe_dtype act) {
  const example list[] = {{{1, 1, 4, 1, 16}, 40000, {33333}},
                          {{2, 1, 2, 1, 64}, 9000, {8999, 12}},
                          {{1, 5, 12, 1, 64}, 5000, {4100}}};
  CHECK_ALL(dev, act, list);
}
Test(attention_cached, merges_the_parts_of_a_long_cache) {
  op_each(long_cache);
}

static void full(moe_device *dev, moe_dtype act) {
  const example list[] = {{{3, 1, 4, 1, 16}, 8, {8, 7, 0}},
                          {{2, 6, 12, 1, 64}, 10, {7, 10}},
                          {{1, 100, 4, 1, 64}, 150, {90}},
                          {{1, 1, 4, 1, 64}, 1, {1}}};
  CHECK_ALL(dev, act, list);
}
Test(attention_cached, leaves_rows_beyond_the_room_alone) {
  op_each(full);
}

static void sharp_scores(moe_device *dev, moe_dtype act) {
  if (act != MOE_F32) return; /* exp magnifies the last bits of what is rounded */
  setup u = make(dev, act, (example){{1, 3, 4, 1, 64}, 700, {600}}, 8.0);
  run(dev, &u);
  close_where_computed(u.out, u.want_out, 2e-5);
}
Test(attention_cached, stays_exact_when_scores_are_hundreds) {
  op_each(sharp_scores);
}

/* Fed token by token or in chunks, the cache gives what attention over the whole gives. */
static void whole(moe_device *dev, moe_dtype act) {
  enum { TOKENS = 50 };
  moe_attention_shape s = {1, TOKENS, 12, 1, 64};
  int64_t wide = s.heads * s.head_dim, width = s.head_dim, all = wide + 2 * width;
  op_tensor qkv = op_random(dev, "qkv", act, OP_SHAPE(TOKENS, all), 1.0);
  op_tensor want = op_output(dev, "want", act, OP_SHAPE(TOKENS, wide));
  op_tensor lse = op_output(dev, "lse", MOE_F32, OP_SHAPE(1, s.heads, TOKENS));
  op_tensor keys = op_output(dev, "keys", act, OP_SHAPE(1, TOKENS, width));
  op_tensor values = op_output(dev, "values", act, OP_SHAPE(1, TOKENS, width));
  op_tensor out = op_output(dev, "out", act, OP_SHAPE(TOKENS, wide));
  op_scratch(dev, moe_attention_scratch(dev, s, act));
  op_ok(moe_attention(dev, s, qkv.t, moe_tensor_none(), want.t, lse.t));
  op_read(&want);
  for (int64_t at = 0, n = 17; at < TOKENS; at += n, n = 1) {
    moe_attention_shape step = {1, n, s.heads, s.kv_heads, s.head_dim};
    op_tensor length = op_ints(dev, "length", OP_SHAPE(1), (int32_t[]){(int32_t)at});
    op_scratch(dev, moe_attention_cached_scratch(dev, step, TOKENS, act));
    op_ok(moe_attention_cached(dev, step, moe_tensor_rows(qkv.t, at, n), moe_tensor_none(),
                               moe_tensor_none(), keys.t, values.t, length.t,
                               moe_tensor_rows(out.t, at, n)));
  }
  op_close(out, want.v, 2.0 * op_tolerance(act));
}
Test(attention_cached, agrees_with_attention_over_the_whole_sequence) {
  op_each(whole);
}

static void bits(moe_device *dev) {
  static double first[12 * 64];
  setup u = make(dev, MOE_BF16, (example){{1, 1, 12, 1, 64}, 9000, {8500}}, 1.0);
  run(dev, &u);
  op_read(&u.out);
  for (int64_t i = 0; i < u.out.count; i++) {
    op_require(first[i] == 0.0 || first[i] == u.out.v[i], "element %lld differs", (long long)i);
    first[i] = u.out.v[i];
  }
}
Test(attention_cached, gives_the_same_bits_with_any_number_of_threads) {
  for (int threads = 1; threads <= 4; threads++) op_with_threads(threads, bits);
}

static void twice(moe_device *dev, moe_dtype act) {
  setup u = make(dev, act, (example){{2, 3, 12, 1, 64}, 5000, {4000, 20}}, 1.0);
  run(dev, &u);
  op_tensor out = op_clone(dev, u.out);
  run(dev, &u);
  op_equal(u.out, out.v);
}
Test(attention_cached, gives_the_same_bits_again) {
  op_each(twice);
}

static void refusals(moe_device *dev) {
  static float block[64];
  moe_attention_shape s = {1, 2, 2, 1, 4};
  moe_tensor qkv = moe_tensor_2d(block, MOE_F32, 2, 16), out = moe_tensor_2d(block, MOE_F32, 2, 8);
  moe_tensor keys = moe_tensor_3d(block, MOE_F32, 1, 3, 4), odd = keys;
  moe_tensor lengths = moe_tensor_1d(block, MOE_I32, 1);
  odd.shape[1] = 4;
  op_refuses(MOE_INVALID, "values is fp32 [1, 4, 4]: it must be fp32 [1, 3, 4]",
             moe_attention_cached(dev, s, qkv, moe_tensor_none(), moe_tensor_none(), keys, odd,
                                  lengths, out));
  op_refuses(MOE_INVALID, "lengths is fp32 [1]",
             moe_attention_cached(dev, s, qkv, moe_tensor_none(), moe_tensor_none(), keys, keys,
                                  moe_tensor_1d(block, MOE_F32, 1), out));
  s.kv_heads = 0;
  op_refuses(MOE_INVALID, "heads must be a multiple of kv_heads",
             moe_attention_cached(dev, s, qkv, moe_tensor_none(), moe_tensor_none(), keys, keys,
                                  lengths, out));
}
Test(attention_cached, refuses_wrong_operands) {
  op_each_device(refusals);
}
