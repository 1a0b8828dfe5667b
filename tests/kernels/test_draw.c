/* Normal draws: the bits of the host's moe_rng_normal_fill on every backend, wherever a stretch
 * begins and ends. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "tests/support/op_check.h"

/* What the operation must leave: draws of float, rounded by the scalar conversions. */
static void *expected_bits(moe_dtype act, uint64_t seed, uint64_t stream, int64_t begin,
                           int64_t count, float std) {
  float *draws = malloc((size_t)count * sizeof *draws);
  void *bits = malloc((size_t)count * sizeof *draws);
  moe_rng_normal_fill(seed, stream, begin, count, std, draws);
  moe_convert(draws, MOE_F32, bits, act, count);
  free(draws);
  return bits;
}

/* `shift`: elements before the first drawn one, so that it need not be aligned. */
static void draws_like_the_host(moe_device *dev, moe_dtype act, uint64_t seed, int64_t begin,
                                int64_t count, int64_t shift) {
  const uint64_t stream = moe_rng_stream("weights", 3, 5);
  const float std = 0.02f;
  int64_t size = moe_dtype_size(act), bytes = count * size;
  op_tensor out = op_output(dev, "out", act, OP_SHAPE(count + shift));
  op_ok(moe_draw_normal(dev, seed, stream, begin, std, moe_tensor_rows(out.t, shift, count)));
  char *got = malloc((size_t)bytes);
  op_ok(moe_device_download(dev, got, (char *)out.t.data + shift * size, bytes));
  op_ok(moe_device_sync(dev));
  char *want = expected_bits(act, seed, stream, begin, count, std);
  for (int64_t i = 0; i < count && memcmp(got, want, (size_t)bytes) != 0; i++)
    op_require(memcmp(got + i * size, want + i * size, (size_t)size) == 0,
               "seed %llu: draw %lld of %lld from %lld has other bits", (unsigned long long)seed,
               (long long)i, (long long)count, (long long)begin);
  free(got);
  free(want);
  for (int64_t i = 0; i < shift; i++) op_require(isnan(op_read(&out)[i]), "element %d", (int)i);
}

static void draws_anywhere(moe_device *dev, moe_dtype act) {
  const int64_t begins[] = {0, 1, 3, 8, 250, 256, 12345677, (1LL << 40) + 5};
  const int64_t counts[] = {1, 2, 7, 8, 255, 257, 4099};
  for (int b = 0; b < 8; b++)
    for (int c = 0; c < 7; c++) {
      draws_like_the_host(dev, act, 1234, begins[b], counts[c], 0);
      draws_like_the_host(dev, act, 1234, begins[b], counts[c], 3);
    }
}

Test(draw, has_the_bits_of_the_host_wherever_a_stretch_begins_and_ends) {
  op_each(draws_anywhere);
}

/* What goes with the draws in bf16. */
static void draws_lower_halves(moe_device *dev) {
  const int64_t begins[] = {0, 3, 8, 12345677}, counts[] = {1, 8, 257, 300003};
  for (int b = 0; b < 4; b++)
    for (int c = 0; c < 4; c++) draws_like_the_host(dev, MOE_LOW16, 1234, begins[b], counts[c], 0);
}

Test(draw, gives_the_halves_that_go_with_bf16_weights) {
  op_each_device(draws_lower_halves);
}

static void draws_many(moe_device *dev, moe_dtype act) {
  const uint64_t seeds[] = {0, 7, ~0ull};
  for (int i = 0; i < 3; i++) {
    draws_like_the_host(dev, act, seeds[i], 0, 3000003, 0);
    draws_like_the_host(dev, act, seeds[i], 1000001, 700001, 0);
  }
}

Test(draw, has_the_bits_of_the_host_over_millions_of_draws) {
  op_each(draws_many);
}

static void joins_stretches(moe_device *dev, moe_dtype act) {
  enum { COUNT = 40000, CUT = 12347 };
  op_tensor whole = op_output(dev, "whole", act, OP_SHAPE(COUNT));
  op_tensor parts = op_output(dev, "parts", act, OP_SHAPE(COUNT));
  op_ok(moe_draw_normal(dev, 5, 6, 9, 1.0f, whole.t));
  op_ok(moe_draw_normal(dev, 5, 6, 9, 1.0f, moe_tensor_rows(parts.t, 0, CUT)));
  op_ok(moe_draw_normal(dev, 5, 6, 9 + CUT, 1.0f, moe_tensor_rows(parts.t, CUT, COUNT - CUT)));
  op_equal(parts, op_read(&whole));
}

Test(draw, does_not_depend_on_how_a_stretch_is_cut) {
  op_each(joins_stretches);
}

static void draws_nothing(moe_device *dev, moe_dtype act) {
  op_tensor out = op_output(dev, "out", act, OP_SHAPE(8));
  op_ok(moe_draw_normal(dev, 1, 2, 0, 1.0f, moe_tensor_rows(out.t, 4, 0)));
  for (int i = 0; i < 8; i++) op_require(isnan(op_read(&out)[i]), "element %d was written", i);
  op_ok(moe_draw_normal(dev, 1, 2, 0, 0.0f, out.t));
  op_equal(out, op_doubles(8));
}

Test(draw, takes_no_elements_and_no_deviation) {
  op_each(draws_nothing);
}

static void refuses(moe_device *dev) {
  op_tensor out = op_output(dev, "out", MOE_F32, OP_SHAPE(8));
  op_tensor ints = op_output(dev, "ints", MOE_I32, OP_SHAPE(8));
  op_refuses(MOE_INVALID, "draw_normal: draws count from 0",
             moe_draw_normal(dev, 1, 2, -1, 1.0f, out.t));
  op_refuses(MOE_INVALID, "deviation", moe_draw_normal(dev, 1, 2, 0, -1.0f, out.t));
  op_refuses(MOE_INVALID, "deviation", moe_draw_normal(dev, 1, 2, 0, (float)NAN, out.t));
  op_refuses(MOE_INVALID, "draw_normal", moe_draw_normal(dev, 1, 2, 0, 1.0f, ints.t));
  op_refuses(MOE_INVALID, "draw_normal", moe_draw_normal(dev, 1, 2, 0, 1.0f, moe_tensor_none()));
}

Test(draw, refuses_what_it_cannot_draw) {
  op_each_device(refuses);
}
