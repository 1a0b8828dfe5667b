/* zero, fill, copy, add, sum_rows, scale, sum_squares, embed and its gradient. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "tests/support/op_check.h"

static const int64_t lengths[] = {1, 3, 17, 127, 129, 70001};
enum { LENGTHS = sizeof lengths / sizeof *lengths };

static void zeroes(moe_device *dev, moe_dtype act) {
  for (int i = 0; i < LENGTHS; i++) {
    op_tensor x = op_output(dev, "x", act, OP_SHAPE(lengths[i]));
    op_ok(moe_zero(dev, x.t));
    op_equal(x, op_doubles(x.count));
  }
}

Test(elementwise, zero_clears_every_element_and_nothing_else) {
  op_each(zeroes);
}

static void fills(moe_device *dev, moe_dtype act) {
  for (int i = 0; i < LENGTHS; i++) {
    op_tensor x = op_output(dev, "x", act, OP_SHAPE(lengths[i]));
    double *reference = op_doubles(x.count);
    for (int64_t j = 0; j < x.count; j++) reference[j] = op_round(act, (double)0.3f);
    op_ok(moe_fill(dev, x.t, 0.3f));
    op_equal(x, reference);
  }
}

Test(elementwise, fill_rounds_the_value_into_every_element_and_nothing_else) {
  op_each(fills);
}

static void copies(moe_device *dev, moe_dtype act) {
  const moe_dtype others[] = {MOE_F32, MOE_BF16, MOE_F16};
  for (int i = 0; i < LENGTHS; i++)
    for (int o = 0; o < 3; o++) {
      op_tensor src = op_random(dev, "src", act, OP_SHAPE(lengths[i]), 3.0);
      op_tensor dst = op_output(dev, "dst", others[o], OP_SHAPE(lengths[i]));
      op_ok(moe_copy(dev, dst.t, src.t));
      double *reference = op_doubles(src.count);
      for (int64_t j = 0; j < src.count; j++) reference[j] = op_round(others[o], src.v[j]);
      op_equal(dst, reference);
    }
}

Test(elementwise, copy_converts_by_rounding_to_nearest_even) {
  op_each(copies);
}

/* Powers of two with every mantissa tail that matters, infinities, the smallest and the largest. */
static void copies_extremes(moe_device *dev, moe_dtype act) {
  if (act == MOE_F32) return;
  enum { N = 1 << 13 };
  double *values = op_doubles(N), *reference = op_doubles(N);
  for (int64_t i = 0; i < N; i++) {
    double mantissa = 1.0 + (double)(i % 64) / 64.0 * pow(2.0, -(double)(i % 11));
    values[i] = (double)(float)((i & 1 ? -1.0 : 1.0) * ldexp(mantissa, (int)(i / 32) - 128));
  }
  values[0] = INFINITY, values[1] = -INFINITY, values[2] = 65519.99, values[3] = 65520.0;
  values[4] = 0.0, values[5] = ldexp(1.0, -25), values[6] = ldexp(1.0, -24);
  values[7] = 3.3895313892515355e38, values[8] = 1.00390625, values[9] = 1.01171875;
  op_tensor src = op_values(dev, "src", MOE_F32, OP_SHAPE(N), values);
  op_tensor dst = op_output(dev, "dst", act, OP_SHAPE(N));
  for (int64_t i = 0; i < N; i++) reference[i] = op_round(act, src.v[i]);
  op_ok(moe_copy(dev, dst.t, src.t));
  op_equal(dst, reference);
}

Test(elementwise, copy_is_right_at_the_ends_of_the_range) {
  op_each(copies_extremes);
}

static void copies_nan(moe_device *dev, moe_dtype act) {
  op_tensor src = op_output(dev, "src", MOE_F32, OP_SHAPE(19));
  op_tensor dst = op_filled(dev, "dst", act, OP_SHAPE(19), 1.0);
  op_ok(moe_copy(dev, dst.t, src.t));
  op_read(&dst);
  for (int i = 0; i < 19; i++) op_require(isnan(dst.v[i]), "element %d is %g", i, dst.v[i]);
}

Test(elementwise, copy_keeps_nans) {
  op_each(copies_nan);
}

static void adds(moe_device *dev, moe_dtype act) {
  const moe_dtype others[] = {act, MOE_F32};
  for (int i = 0; i < LENGTHS; i++)
    for (int o = 0; o < 4; o++) {
      op_tensor x = op_random(dev, "x", others[o & 1], OP_SHAPE(lengths[i]), 1.0);
      op_tensor y = op_random(dev, "y", others[o >> 1], OP_SHAPE(lengths[i]), 1.0);
      double *reference = op_doubles(x.count);
      for (int64_t j = 0; j < x.count; j++) {
        float sum = (float)x.v[j] + (float)y.v[j];
        reference[j] = op_round(y.t.dtype, (double)sum);
      }
      op_ok(moe_add(dev, y.t, x.t));
      op_equal(y, reference);
    }
}

Test(elementwise, add_rounds_the_float_sum_once) {
  op_each(adds);
}

/* Each row in turn is what out holds before, and -1: none is. Squares are added to, by every second
 * call: the kernel's own state must survive both. */
static void sums_rows(moe_device *dev, moe_dtype act) {
  const int64_t counts[] = {1, 2, 5};
  for (int i = 0; i < LENGTHS; i++)
    for (int c = 0; c < 3; c++)
      for (int64_t own = -1; own < counts[c]; own++) {
        int64_t n = lengths[i];
        op_tensor x = op_random(dev, "x", act, OP_SHAPE(counts[c], n), 1000.0);
        op_tensor out = op_random(dev, "out", act, OP_SHAPE(n), 1000.0);
        double *reference = op_doubles(n);
        for (int64_t j = 0; j < n; j++) {
          float sum = 0.0f;
          for (int64_t r = 0; r < counts[c]; r++)
            sum += (float)(r == own ? out.v[j] : x.v[r * n + j]);
          reference[j] = op_round(act, (double)sum);
        }
        op_tensor squares = op_filled(dev, "squares", MOE_F64, OP_SHAPE(1), 0.5);
        bool asks = (i + c + own) % 2 != 0;
        op_ok(moe_sum_rows(dev, x.t, own, out.t, asks ? squares.t : moe_tensor_none()));
        op_equal(out, reference);
        double sum = 0.5 + (asks ? op_dot(reference, reference, n) : 0.0);
        op_close(squares, &sum, 1e-12);
      }
}

Test(elementwise, sum_rows_adds_in_float_in_the_order_of_rows_and_rounds_once) {
  op_each(sums_rows);
}

static void scales(moe_device *dev, moe_dtype act) {
  for (int i = 0; i < LENGTHS; i++) {
    op_tensor x = op_random(dev, "x", act, OP_SHAPE(lengths[i]), 1.0);
    double *reference = op_doubles(x.count);
    for (int64_t j = 0; j < x.count; j++)
      reference[j] = op_round(act, (double)((float)x.v[j] * 0.3f));
    op_ok(moe_scale(dev, x.t, 0.3f));
    op_equal(x, reference);
  }
}

Test(elementwise, scale_rounds_the_float_product_once) {
  op_each(scales);
}

static void sums_squares(moe_device *dev, moe_dtype act) {
  for (int i = 0; i < LENGTHS; i++) {
    op_tensor x = op_random(dev, "x", act, OP_SHAPE(lengths[i]), 100.0);
    op_tensor out = op_filled(dev, "out", MOE_F64, OP_SHAPE(1), 0.5);
    double reference = 0.5 + op_dot(x.v, x.v, x.count);
    op_ok(moe_sum_squares(dev, x.t, out.t));
    op_close(out, &reference, 1e-12);
  }
}

Test(elementwise, sum_squares_adds_in_float64) {
  op_each(sums_squares);
}

static void finds_non_finite(moe_device *dev, moe_dtype act) {
  const double bad[] = {(double)NAN, (double)INFINITY};
  for (int i = 0; i < 2; i++) {
    double *values = op_doubles(70001);
    values[69999] = bad[i];
    op_tensor x = op_values(dev, "x", act, OP_SHAPE(70001), values);
    op_tensor out = op_filled(dev, "out", MOE_F64, OP_SHAPE(1), 0.0);
    op_ok(moe_sum_squares(dev, x.t, out.t));
    op_require(!isfinite(op_read(&out)[0]), "%g was lost", bad[i]);
  }
}

Test(elementwise, sum_squares_passes_on_a_nan_or_infinity) {
  op_each(finds_non_finite);
}

/* ---- embedding ------------------------------------------------------------------------- */

static op_tensor tokens_of(moe_device *dev, int64_t count, int64_t vocabulary) {
  int32_t *ids = op_int32s(count);
  for (int64_t t = 0; t < count; t++) ids[t] = (int32_t)op_pick("tokens", t, vocabulary);
  return op_ints(dev, "tokens", OP_SHAPE(count), ids);
}

static void embeds(moe_device *dev, moe_dtype act) {
  const int64_t counts[] = {1, 17, 129}, widths[] = {1, 3, 127, 130};
  for (int c = 0; c < 3; c++)
    for (int w = 0; w < 4; w++) {
      int64_t width = widths[w];
      op_tensor tokens = tokens_of(dev, counts[c], 11);
      op_tensor weight = op_random(dev, "weight", act, OP_SHAPE(11, width), 1.0);
      op_tensor out = op_output(dev, "out", act, OP_SHAPE(counts[c], width));
      double *reference = op_doubles(out.count);
      for (int64_t i = 0; i < out.count; i++)
        reference[i] = weight.v[(int64_t)tokens.v[i / width] * width + i % width];
      op_ok(moe_embed(dev, tokens.t, weight.t, out.t));
      op_equal(out, reference);
    }
}

Test(elementwise, embed_copies_the_rows_of_the_tokens) {
  op_each(embeds);
}

static void embeds_backward(moe_device *dev, moe_dtype act) {
  const int64_t widths[] = {1, 3, 127, 130};
  for (int w = 0; w < 4; w++) {
    int64_t width = widths[w], count = 301;
    op_tensor tokens = tokens_of(dev, count, 13);
    op_tensor dout = op_random(dev, "dout", act, OP_SHAPE(count, width), 1.0);
    op_tensor dweight = op_random(dev, "dweight", MOE_F32, OP_SHAPE(13, width), 1.0);
    double *reference = op_doubles(dweight.count);
    memcpy(reference, dweight.v, (size_t)dweight.count * sizeof *reference);
    for (int64_t i = 0; i < dout.count; i++)
      reference[(int64_t)tokens.v[i / width] * width + i % width] += dout.v[i];
    op_ok(moe_embed_backward(dev, tokens.t, dout.t, dweight.t));
    op_close(dweight, reference, 1e-6);
  }
}

Test(elementwise, embed_backward_adds_every_occurrence_of_a_token) {
  op_each(embeds_backward);
}

static void embeds_in_order(moe_device *dev) {
  enum { COUNT = 2000, WIDTH = 70 };
  op_tensor tokens = tokens_of(dev, COUNT, 3);
  op_tensor dout = op_random(dev, "dout", MOE_F32, OP_SHAPE(COUNT, WIDTH), 1.0);
  op_tensor first = op_filled(dev, "first", MOE_F32, OP_SHAPE(3, WIDTH), 0.0);
  op_tensor second = op_filled(dev, "second", MOE_F32, OP_SHAPE(3, WIDTH), 0.0);
  op_ok(moe_embed_backward(dev, tokens.t, dout.t, first.t));
  op_ok(moe_embed_backward(dev, tokens.t, dout.t, second.t));
  op_equal(first, op_read(&second));
}

Test(elementwise, embed_backward_gives_the_same_bits_every_time) {
  op_each_device(embeds_in_order);
}

static void refuses_tokens(moe_device *dev) {
  if (!moe_device_is_host(dev)) return; /* kernels cannot refuse: the loader has checked */
  op_tensor weight = op_random(dev, "weight", MOE_F32, OP_SHAPE(11, 4), 1.0);
  op_tensor out = op_output(dev, "out", MOE_F32, OP_SHAPE(2, 4));
  op_tensor tokens = op_ints(dev, "tokens", OP_SHAPE(2), (int32_t[]){3, 11});
  op_refuses(MOE_INVALID, "token 11 at position 1", moe_embed(dev, tokens.t, weight.t, out.t));
  tokens = op_ints(dev, "tokens", OP_SHAPE(2), (int32_t[]){-1, 0});
  op_refuses(MOE_INVALID, "token -1 at position 0", moe_embed(dev, tokens.t, weight.t, out.t));
}

Test(elementwise, embed_refuses_tokens_outside_the_vocabulary) {
  op_each_device(refuses_tokens);
}
