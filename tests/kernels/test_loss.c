/* Cross-entropy: the loss to float accuracy, the gradient against central differences. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "tests/support/op_check.h"

static const float scale = 0.37f;

static double row_loss_of(const double *x, int64_t width, int64_t target) {
  double most = x[0], sum = 0.0;
  for (int64_t j = 1; j < width; j++) most = fmax(most, x[j]);
  for (int64_t j = 0; j < width; j++) sum += exp(x[j] - most);
  return most - x[target] + log(sum);
}

/* One target in four is -1; the first is not. */
static op_tensor targets_of(moe_device *dev, int64_t rows, int64_t width) {
  int32_t *targets = op_int32s(rows);
  for (int64_t i = 0; i < rows; i++)
    targets[i] = i % 4 == 3 ? -1 : (int32_t)op_pick("target", i, width);
  return op_ints(dev, "targets", OP_SHAPE(rows), targets);
}

/* The loss before `rows` of logits, with row losses and sums; what is in loss already is kept. */
static void check_loss(moe_device *dev, moe_dtype act, int64_t rows, int64_t width, double spread) {
  op_tensor logits = op_random(dev, "logits", act, OP_SHAPE(rows, width), spread);
  op_tensor targets = targets_of(dev, rows, width), before = op_clone(dev, logits);
  op_tensor loss = op_values(dev, "loss", MOE_F64, OP_SHAPE(2), (double[]){2.5, 7.0});
  op_tensor each = op_output(dev, "row_loss", MOE_F32, OP_SHAPE(rows));
  double *reference = op_doubles(rows), sums[2] = {2.5, 7.0};
  for (int64_t i = 0; i < rows; i++) {
    if (targets.v[i] < 0.0) continue;
    reference[i] = row_loss_of(logits.v + i * width, width, (int64_t)targets.v[i]);
    sums[0] += reference[i];
    sums[1] += 1.0;
  }
  op_ok(moe_cross_entropy(dev, logits.t, targets.t, scale, 0, loss.t, each.t));
  op_close(loss, sums, 1e-7);
  op_close(each, reference, 2e-7);
  op_equal(logits, before.v);
}

static void losses(moe_device *dev, moe_dtype act) {
  const int64_t rows[] = {1, 3, 17, 131}, widths[] = {1, 3, 127, 1025, 3000};
  for (int i = 0; i < 20; i++) check_loss(dev, act, rows[i / 5], widths[i % 5], 3.0);
}

Test(loss, agrees_with_float64_to_one_part_in_ten_million) {
  op_each(losses);
}

/* Logits far from zero, and a target that is nearly certain: -log p of 1e-4 must keep its digits.
 */
static void hard_rows(moe_device *dev) {
  enum { ROWS = 4, WIDTH = 300 };
  double *values = op_doubles(ROWS * WIDTH), reference[ROWS];
  for (int64_t i = 0; i < ROWS * WIDTH; i++) values[i] = (double)op_pick("logit", i, 1000) / 250.0;
  for (int64_t j = 0; j < WIDTH; j++) values[j] += 3e4, values[WIDTH + j] -= 3e4;
  values[2 * WIDTH + 5] = 18.0;
  for (int64_t j = 0; j < WIDTH; j++) values[3 * WIDTH + j] *= 200.0;
  op_tensor logits = op_values(dev, "logits", MOE_F32, OP_SHAPE(ROWS, WIDTH), values);
  op_tensor targets = op_ints(dev, "targets", OP_SHAPE(ROWS), (int32_t[]){5, 5, 5, 5});
  op_tensor loss = op_filled(dev, "loss", MOE_F64, OP_SHAPE(2), 0.0);
  op_tensor each = op_output(dev, "row_loss", MOE_F32, OP_SHAPE(ROWS));
  for (int64_t i = 0; i < ROWS; i++) reference[i] = row_loss_of(logits.v + i * WIDTH, WIDTH, 5);
  op_ok(moe_cross_entropy(dev, logits.t, targets.t, scale, 0, loss.t, each.t));
  op_read(&each);
  for (int64_t i = 0; i < ROWS; i++)
    op_require(fabs(each.v[i] - reference[i]) <= 5e-7 * reference[i], "row %lld: %.9g, not %.9g",
               (long long)i, each.v[i], reference[i]);
}

Test(loss, keeps_its_digits_for_huge_logits_and_sure_targets) {
  op_each_device(hard_rows);
}

/* ---- gradient -------------------------------------------------------------------------- */

typedef struct {
  int64_t rows, width;
  const double *targets;
} problem;

static double scaled_loss(const double *x, void *context) {
  const problem *p = context;
  double sum = 0.0;
  for (int64_t i = 0; i < p->rows; i++)
    if (p->targets[i] >= 0.0)
      sum += row_loss_of(x + i * p->width, p->width, (int64_t)p->targets[i]);
  return (double)scale * sum;
}

static void check_gradient(moe_device *dev, moe_dtype act, int64_t rows, int64_t width) {
  op_tensor logits = op_random(dev, "logits", act, OP_SHAPE(rows, width), 2.0);
  op_tensor targets = targets_of(dev, rows, width);
  op_tensor loss = op_filled(dev, "loss", MOE_F64, OP_SHAPE(2), 0.0);
  problem p = {rows, width, targets.v};
  double *reference = op_doubles(logits.count), sum = scaled_loss(logits.v, &p) / (double)scale;
  op_differences(scaled_loss, &p, logits.v, logits.count, reference);
  op_ok(moe_cross_entropy(dev, logits.t, targets.t, scale, 1, loss.t, moe_tensor_none()));
  op_close(logits, reference, op_tolerance(act));
  op_require(fabs(op_read(&loss)[0] - sum) <= 1e-7 * sum, "loss %.9g, not %.9g", loss.v[0], sum);
}

static void gradients(moe_device *dev, moe_dtype act) {
  check_gradient(dev, act, 1, 3);
  check_gradient(dev, act, 3, 17);
  check_gradient(dev, act, 5, 129);
  check_gradient(dev, act, 17, 33);
}

Test(loss, gradient_is_the_central_difference_times_scale) {
  op_each(gradients);
}

static void ignores(moe_device *dev, moe_dtype act) {
  op_tensor logits = op_output(dev, "logits", act, OP_SHAPE(2, 9)); /* NaN: must not be read */
  op_tensor targets = op_ints(dev, "targets", OP_SHAPE(2), (int32_t[]){-1, -1});
  op_tensor loss = op_filled(dev, "loss", MOE_F64, OP_SHAPE(2), 0.0);
  op_ok(moe_cross_entropy(dev, logits.t, targets.t, scale, 1, loss.t, moe_tensor_none()));
  op_equal(logits, op_doubles(18));
  op_equal(loss, op_doubles(2));
}

Test(loss, a_target_of_minus_one_counts_nothing) {
  op_each(ignores);
}

static void shows_nan(moe_device *dev, moe_dtype act) {
  for (int bad = 0; bad < 70; bad += 23) {
    double *values = op_doubles(70);
    values[bad] = (double)NAN;
    op_tensor logits = op_values(dev, "logits", act, OP_SHAPE(1, 70), values);
    op_tensor targets = op_ints(dev, "targets", OP_SHAPE(1), (int32_t[]){1});
    op_tensor loss = op_filled(dev, "loss", MOE_F64, OP_SHAPE(2), 0.0);
    op_ok(moe_cross_entropy(dev, logits.t, targets.t, scale, 0, loss.t, moe_tensor_none()));
    op_require(isnan(op_read(&loss)[0]), "a NaN at %d gave %g", bad, loss.v[0]);
  }
}

Test(loss, a_nan_among_the_logits_reaches_the_loss) {
  op_each(shows_nan);
}

static void refuses_targets(moe_device *dev) {
  if (!moe_device_is_host(dev)) return; /* kernels cannot refuse: the loader has checked */
  op_tensor logits = op_random(dev, "logits", MOE_F32, OP_SHAPE(2, 9), 1.0);
  op_tensor targets = op_ints(dev, "targets", OP_SHAPE(2), (int32_t[]){8, 9});
  op_tensor loss = op_filled(dev, "loss", MOE_F64, OP_SHAPE(2), 0.0);
  op_refuses(MOE_INVALID, "target 9 of row 1",
             moe_cross_entropy(dev, logits.t, targets.t, scale, 1, loss.t, moe_tensor_none()));
}

Test(loss, refuses_targets_outside_the_vocabulary) {
  op_each_device(refuses_targets);
}

/* ---- threads --------------------------------------------------------------------------- */

static double kept[2];
static int run;

static void keep_bits(moe_device *dev) {
  op_tensor logits = op_random(dev, "logits", MOE_F32, OP_SHAPE(301, 257), 2.0);
  op_tensor targets = targets_of(dev, 301, 257);
  op_tensor loss = op_filled(dev, "loss", MOE_F64, OP_SHAPE(2), 0.0);
  op_ok(moe_cross_entropy(dev, logits.t, targets.t, scale, 1, loss.t, moe_tensor_none()));
  kept[run++] = op_read(&loss)[0];
}

Test(loss, is_the_same_to_the_bit_on_any_number_of_threads) {
  op_with_threads(1, keep_bits);
  op_with_threads(3, keep_bits);
  cr_assert_eq(kept[0], kept[1]);
}
