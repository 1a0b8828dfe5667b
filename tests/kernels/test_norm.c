/* RMS norm: forward against its formula in float64, backward against central differences of it. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "tests/support/op_check.h"

static const double eps = 1e-5;

typedef struct {
  int64_t rows, width;
  const double *gain, *dout;
} problem;

static double rstd_of(const double *x, int64_t width) {
  return 1.0 / sqrt(op_dot(x, x, width) / (double)width + eps);
}

static void norm(const problem *p, const double *x, const double *gain, double *out) {
  for (int64_t t = 0; t < p->rows; t++) {
    double rstd = rstd_of(x + t * p->width, p->width);
    for (int64_t i = 0; i < p->width; i++)
      out[t * p->width + i] = x[t * p->width + i] * rstd * gain[i];
  }
}

static void forward(moe_device *dev, moe_dtype act) {
  const int64_t rows[] = {1, 3, 17, 40}, widths[] = {1, 17, 129, 1030};
  for (int i = 0; i < 16; i++) {
    problem p = {rows[i / 4], widths[i % 4], NULL, NULL};
    op_tensor x = op_random(dev, "x", act, OP_SHAPE(p.rows, p.width), 2.0);
    op_tensor gain = op_random(dev, "gain", MOE_F32, OP_SHAPE(p.width), 1.0);
    op_tensor out = op_output(dev, "out", act, OP_SHAPE(p.rows, p.width));
    op_tensor rstd = op_output(dev, "rstd", MOE_F32, OP_SHAPE(p.rows));
    double *reference = op_doubles(x.count), *inverse = op_doubles(p.rows);
    norm(&p, x.v, gain.v, reference);
    for (int64_t t = 0; t < p.rows; t++) inverse[t] = rstd_of(x.v + t * p.width, p.width);
    moe_tensor none = moe_tensor_none();
    op_ok(moe_rms_norm(dev, x.t, none, gain.t, eps, none, out.t, rstd.t));
    op_close(out, reference, op_tolerance(act));
    op_close(rstd, inverse, 1e-6);
  }
}

Test(norm, agrees_with_the_formula_in_float64) {
  op_each(forward);
}

/* Into sum's own memory, or over x or the residual. */
static void fused(moe_device *dev, moe_dtype act, int64_t rows, int64_t width, int over) {
  op_tensor x = op_random(dev, "x", act, OP_SHAPE(rows, width), 1.0);
  op_tensor residual = op_random(dev, "residual", act, OP_SHAPE(rows, width), 1.0);
  op_tensor gain = op_random(dev, "gain", MOE_F32, OP_SHAPE(width), 1.0);
  op_tensor own = op_output(dev, "sum", act, OP_SHAPE(rows, width));
  op_tensor sum = over == 0 ? own : over == 1 ? x : residual;
  op_tensor out = op_output(dev, "out", act, OP_SHAPE(rows, width));
  op_tensor rstd = op_output(dev, "rstd", MOE_F32, OP_SHAPE(rows));
  double *total = op_doubles(x.count), *reference = op_doubles(x.count);
  for (int64_t i = 0; i < x.count; i++)
    total[i] = op_round(act, (double)((float)x.v[i] + (float)residual.v[i]));
  norm(&(problem){rows, width, NULL, NULL}, total, gain.v, reference);
  op_ok(moe_rms_norm(dev, x.t, residual.t, gain.t, eps, sum.t, out.t, rstd.t));
  op_equal(sum, total);
  op_close(out, reference, op_tolerance(act));
}

static void adds_residual(moe_device *dev, moe_dtype act) {
  for (int over = 0; over < 3; over++) {
    fused(dev, act, 17, 129, over);
    fused(dev, act, 3, 2051, over);
    fused(dev, act, 1, 1, over);
  }
}

Test(norm, adds_the_residual_first_and_normalizes_the_stored_sum) {
  op_each(adds_residual);
}

/* ---- backward -------------------------------------------------------------------------- */

static double loss_of_x(const double *x, void *context) {
  const problem *p = context;
  double out[4096];
  norm(p, x, p->gain, out);
  return op_dot(out, p->dout, p->rows * p->width);
}

typedef struct {
  problem p;
  const double *x;
} gain_problem;

static double loss_of_gain(const double *gain, void *context) {
  const gain_problem *g = context;
  double out[4096];
  norm(&g->p, g->x, gain, out);
  return op_dot(out, g->p.dout, g->p.rows * g->p.width);
}

static void gradients(moe_device *dev, moe_dtype act, int64_t rows, int64_t width) {
  op_tensor x = op_random(dev, "x", act, OP_SHAPE(rows, width), 1.0);
  op_tensor gain = op_random(dev, "gain", MOE_F32, OP_SHAPE(width), 1.0);
  op_tensor dout = op_random(dev, "dout", act, OP_SHAPE(rows, width), 1.0);
  op_tensor dx = op_random(dev, "dx", act, OP_SHAPE(rows, width), 1.0);
  op_tensor dgain = op_random(dev, "dgain", MOE_F32, OP_SHAPE(width), 1.0);
  op_tensor out = op_output(dev, "out", act, OP_SHAPE(rows, width));
  op_tensor rstd = op_output(dev, "rstd", MOE_F32, OP_SHAPE(rows));
  moe_tensor none = moe_tensor_none();
  op_ok(moe_rms_norm(dev, x.t, none, gain.t, eps, none, out.t, rstd.t));

  gain_problem g = {{rows, width, gain.v, dout.v}, x.v};
  double *x_reference = op_doubles(x.count), *gain_reference = op_doubles(width);
  op_differences(loss_of_x, &g.p, x.v, x.count, x_reference);
  op_differences(loss_of_gain, &g, gain.v, width, gain_reference);
  for (int64_t i = 0; i < x.count; i++) x_reference[i] += dx.v[i];
  for (int64_t i = 0; i < width; i++) gain_reference[i] += dgain.v[i];

  op_ok(moe_rms_norm_backward(dev, dout.t, x.t, gain.t, rstd.t, dx.t, dgain.t));
  op_close(dx, x_reference, op_tolerance(act));
  op_close(dgain, gain_reference, 1e-6);
}

static void backward(moe_device *dev, moe_dtype act) {
  gradients(dev, act, 1, 1);
  gradients(dev, act, 3, 17);
  gradients(dev, act, 17, 33);
  gradients(dev, act, 129, 3);
  gradients(dev, act, 3, 129);
}

Test(norm, backward_adds_the_central_differences_of_forward) {
  op_each(backward);
}

/* ---- threads --------------------------------------------------------------------------- */

enum { ROWS = 300, WIDTH = 200 };
static double kept[2][ROWS * WIDTH], kept_gain[2][WIDTH];
static int run;

static void keep_bits(moe_device *dev) {
  op_tensor x = op_random(dev, "x", MOE_F32, OP_SHAPE(ROWS, WIDTH), 1.0);
  op_tensor gain = op_random(dev, "gain", MOE_F32, OP_SHAPE(WIDTH), 1.0);
  op_tensor dx = op_filled(dev, "dx", MOE_F32, OP_SHAPE(ROWS, WIDTH), 0.0);
  op_tensor dgain = op_filled(dev, "dgain", MOE_F32, OP_SHAPE(WIDTH), 0.0);
  op_tensor rstd = op_filled(dev, "rstd", MOE_F32, OP_SHAPE(ROWS), 1.25);
  op_ok(moe_rms_norm_backward(dev, x.t, x.t, gain.t, rstd.t, dx.t, dgain.t));
  memcpy(kept[run], op_read(&dx), sizeof kept[0]);
  memcpy(kept_gain[run++], op_read(&dgain), sizeof kept_gain[0]);
}

Test(norm, backward_gives_the_same_bits_on_any_number_of_threads) {
  op_with_threads(1, keep_bits);
  op_with_threads(3, keep_bits);
  cr_assert_eq(memcmp(kept[0], kept[1], sizeof kept[0]), 0);
  cr_assert_eq(memcmp(kept_gain[0], kept_gain[1], sizeof kept_gain[0]), 0);
}
