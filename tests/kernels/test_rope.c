/* Rotary embedding: the table's formula, the rotation, its inverse, and what it must leave alone.
 */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>

#include "tests/support/op_check.h"

/* cos and sin of position * w_i, from the formula of ops.h. */
static double angle(double base, double alpha, int64_t d, int64_t position, int64_t i) {
  double scaled = d > 2 ? base * pow(alpha, (double)d / (double)(d - 2)) : base;
  return (double)position * pow(scaled, -2.0 * (double)i / (double)d);
}

Test(rope, table_holds_cosines_then_sines_of_the_scaled_frequencies) {
  const int64_t heads[] = {2, 6, 16, 64};
  const double alphas[] = {1.0, 8.0, 0.5};
  for (int c = 0; c < 12; c++) {
    int64_t d = heads[c / 3], positions = 300;
    float *table = malloc((size_t)(positions * d) * sizeof *table);
    moe_rope_table_fill(10000.0, alphas[c % 3], positions, d, table);
    for (int64_t p = 0; p < positions; p++)
      for (int64_t i = 0; i < d / 2; i++) {
        double w = angle(10000.0, alphas[c % 3], d, p, i);
        cr_assert_float_eq(table[p * d + i], cos(w), 1e-7);
        cr_assert_float_eq(table[p * d + d / 2 + i], sin(w), 1e-7);
      }
    free(table);
  }
}

/* Values worked out by hand with 30 digits: base 10000, alpha 8, d 4: b' = 10000 * 8^2 = 640000, so
 * w_1 = 1/800. */
Test(rope, table_scales_the_base_by_alpha_to_the_d_over_d_minus_2) {
  float table[4 * 801];
  moe_rope_table_fill(10000.0, 8.0, 801, 4, table);
  cr_assert_float_eq(table[4 * 800 + 1], 0.54030230586813977, 1e-7); /* cos 1 */
  cr_assert_float_eq(table[4 * 800 + 3], 0.84147098480789651, 1e-7); /* sin 1 */
}

Test(rope, table_is_exact_to_float_at_far_positions) {
  enum { FAR = 262144, D = 2 };
  float *table = malloc((size_t)FAR * D * sizeof *table);
  moe_rope_table_fill(10000.0, 8.0, FAR, D, table);
  for (int64_t p = FAR - 100; p < FAR; p++) {
    cr_assert_eq(table[p * D], (float)cos((double)p));
    cr_assert_eq(table[p * D + 1], (float)sin((double)p));
  }
  free(table);
}

/* ---- the rotation ---------------------------------------------------------------------- */

typedef struct {
  int64_t tokens, heads, kv_heads, d;
} sizes;

enum { POSITIONS = 500 };

static op_tensor table_of(moe_device *dev, int64_t d) {
  float *table = malloc((size_t)(POSITIONS * d) * sizeof *table);
  double *values = op_doubles(POSITIONS * d);
  moe_rope_table_fill(10000.0, 2.0, POSITIONS, d, table);
  for (int64_t i = 0; i < POSITIONS * d; i++) values[i] = (double)table[i];
  free(table);
  return op_values(dev, "table", MOE_F32, OP_SHAPE(POSITIONS, d), values);
}

static op_tensor positions_of(moe_device *dev, int64_t tokens) {
  int32_t *positions = op_int32s(tokens);
  for (int64_t t = 0; t < tokens; t++) positions[t] = (int32_t)op_pick("position", t, POSITIONS);
  return op_ints(dev, "positions", OP_SHAPE(tokens), positions);
}

static op_tensor qkv_of(moe_device *dev, moe_dtype act, sizes s) {
  return op_random(dev, "qkv", act, OP_SHAPE(s.tokens, (s.heads + 2 * s.kv_heads) * s.d), 1.0);
}

static void rotate(sizes s, const double *positions, double sign, const double *x, double *out) {
  int64_t width = (s.heads + 2 * s.kv_heads) * s.d, half = s.d / 2;
  for (int64_t t = 0; t < s.tokens; t++)
    for (int64_t i = 0; i < width; i++) {
      int64_t head = i / s.d, at = i % s.d, pair = at % half;
      const double *v = x + t * width + head * s.d;
      double w = angle(10000.0, 2.0, s.d, (int64_t)positions[t], pair) * sign;
      double turned = at < half ? v[pair] * cos(w) - v[pair + half] * sin(w)
                                : v[pair + half] * cos(w) + v[pair] * sin(w);
      out[t * width + i] = head < s.heads + s.kv_heads ? turned : v[at];
    }
}

static void check(moe_device *dev, moe_dtype act, sizes s) {
  op_tensor positions = positions_of(dev, s.tokens), table = table_of(dev, s.d);
  for (int direction = -1; direction <= 1; direction += 2) {
    op_tensor qkv = qkv_of(dev, act, s);
    double *reference = op_doubles(qkv.count);
    rotate(s, positions.v, (double)direction, qkv.v, reference);
    op_ok(moe_rope(dev, qkv.t, positions.t, table.t, s.heads, s.kv_heads, direction));
    op_close(qkv, reference, op_tolerance(act));
  }
}

static void rotates(moe_device *dev, moe_dtype act) {
  check(dev, act, (sizes){1, 1, 1, 2});
  check(dev, act, (sizes){3, 2, 1, 6});
  check(dev, act, (sizes){17, 4, 2, 16});
  check(dev, act, (sizes){129, 6, 3, 34});
  check(dev, act, (sizes){3, 1, 1, 1022});
  check(dev, act, (sizes){127, 12, 1, 64});
}

Test(rope, rotates_queries_and_keys_by_their_positions_both_ways) {
  op_each(rotates);
}

static void restores(moe_device *dev, moe_dtype act) {
  sizes s = {17, 4, 2, 16};
  op_tensor positions = positions_of(dev, s.tokens), table = table_of(dev, s.d);
  op_tensor qkv = qkv_of(dev, act, s), before = op_clone(dev, qkv);
  op_ok(moe_rope(dev, qkv.t, positions.t, table.t, s.heads, s.kv_heads, 1));
  op_ok(moe_rope(dev, qkv.t, positions.t, table.t, s.heads, s.kv_heads, -1));
  op_close(qkv, before.v, 2.0 * op_tolerance(act));
}

Test(rope, the_inverse_rotation_restores_what_was_there) {
  op_each(restores);
}

static void leaves_values(moe_device *dev, moe_dtype act) {
  sizes s = {9, 2, 1, 8};
  op_tensor positions = positions_of(dev, s.tokens), table = table_of(dev, s.d);
  op_tensor qkv = qkv_of(dev, act, s), before = op_clone(dev, qkv);
  op_ok(moe_rope(dev, qkv.t, positions.t, table.t, s.heads, s.kv_heads, 1));
  op_read(&qkv);
  for (int64_t i = 0; i < qkv.count; i++)
    if (i % 32 >= 24) op_require(qkv.v[i] == before.v[i], "value element %lld", (long long)i);
}

Test(rope, leaves_the_value_heads_alone) {
  op_each(leaves_values);
}

static void refuses_positions(moe_device *dev) {
  if (!moe_device_is_host(dev)) return; /* kernels cannot refuse: the loader has checked */
  op_tensor table = table_of(dev, 4);
  op_tensor qkv = op_random(dev, "qkv", MOE_F32, OP_SHAPE(2, 12), 1.0);
  op_tensor positions = op_ints(dev, "positions", OP_SHAPE(2), (int32_t[]){0, POSITIONS});
  op_refuses(MOE_INVALID, "position 500 of token 1",
             moe_rope(dev, qkv.t, positions.t, table.t, 1, 1, 1));
}

Test(rope, refuses_positions_past_the_table) {
  op_each_device(refuses_positions);
}
