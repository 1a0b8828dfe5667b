/* AdamW over several steps against float64, and the clipping factor. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "tests/support/op_check.h"

static const moe_adamw_args usual = {1e-3, 0.9, 0.95, 1e-8, 0.1, 1};

/* One step of the formula in ops.h. */
static void update(moe_adamw_args a, int64_t n, const double *grad, double scale, double *w,
                   double *m, double *v) {
  double correct1 = 1.0 - pow(a.beta1, (double)a.step);
  double correct2 = 1.0 - pow(a.beta2, (double)a.step);
  for (int64_t i = 0; i < n; i++) {
    double g = grad[i] * scale;
    m[i] = a.beta1 * m[i] + (1.0 - a.beta1) * g;
    v[i] = a.beta2 * v[i] + (1.0 - a.beta2) * g * g;
    w[i] -= a.lr * (m[i] / correct1 / (sqrt(v[i] / correct2) + a.eps) + a.weight_decay * w[i]);
  }
}

typedef struct {
  op_tensor w, m, v, weight, scale;
  double *w_reference, *m_reference, *v_reference;
} state;

static state start(moe_device *dev, moe_dtype act, int64_t n) {
  state s = {.w = op_random(dev, "w", MOE_F32, OP_SHAPE(n), 0.02),
             .m = op_filled(dev, "m", MOE_F32, OP_SHAPE(n), 0.0),
             .v = op_filled(dev, "v", MOE_F32, OP_SHAPE(n), 0.0),
             .weight = op_output(dev, "weight", act, OP_SHAPE(n)),
             .scale = op_filled(dev, "scale", MOE_F32, OP_SHAPE(1), 0.25),
             .w_reference = op_doubles(n),
             .m_reference = op_doubles(n),
             .v_reference = op_doubles(n)};
  memcpy(s.w_reference, s.w.v, (size_t)n * sizeof *s.w.v);
  return s;
}

static void many_steps(moe_device *dev, moe_dtype act, int64_t n) {
  state s = start(dev, act, n);
  moe_adamw_args args = usual;
  for (args.step = 1; args.step <= 20; args.step++) {
    char name[16] = "grad ";
    name[4] = (char)('a' + args.step);
    op_tensor grad = op_random(dev, name, MOE_F32, OP_SHAPE(n), 0.01);
    args.lr = 1e-3 * (double)args.step / 20.0;
    update(args, n, grad.v, 0.25, s.w_reference, s.m_reference, s.v_reference);
    op_ok(moe_adamw(dev, args, grad.t, s.scale.t, s.w.t, s.m.t, s.v.t, s.weight.t));
  }
  op_close(s.w, s.w_reference, 5e-7);
  op_close(s.m, s.m_reference, 1e-6);
  op_close(s.v, s.v_reference, 1e-6);
  double *rounded = op_doubles(n);
  for (int64_t i = 0; i < n; i++) rounded[i] = op_round(act, s.w.v[i]);
  op_equal(s.weight, rounded);
}

static void agrees(moe_device *dev, moe_dtype act) {
  const int64_t lengths[] = {1, 3, 17, 127, 129, 20011};
  for (int i = 0; i < 6; i++) many_steps(dev, act, lengths[i]);
}

Test(adamw, follows_float64_over_twenty_steps) {
  op_each(agrees);
}

/* With lr * decay near 1e-5, decay by multiplication in f32 would be wrong in its third digit. */
static void decays(moe_device *dev) {
  op_tensor w = op_filled(dev, "w", MOE_F32, OP_SHAPE(5), 3.0);
  op_tensor zero = op_filled(dev, "zero", MOE_F32, OP_SHAPE(5), 0.0);
  op_tensor m = op_clone(dev, zero), v = op_clone(dev, zero);
  op_tensor scale = op_filled(dev, "scale", MOE_F32, OP_SHAPE(1), 1.0);
  moe_adamw_args args = {1e-4, 0.9, 0.95, 1e-8, 0.1, 1};
  for (args.step = 1; args.step <= 1000; args.step++)
    op_ok(moe_adamw(dev, args, zero.t, scale.t, w.t, m.t, v.t, moe_tensor_none()));
  double lost = 3.0 - op_read(&w)[0], expected = 3.0 * (1.0 - pow(1.0 - 1e-5, 1000.0));
  op_require(fabs(lost - expected) <= 5e-3 * expected, "decayed by %.6g, not %.6g", lost, expected);
}

Test(adamw, decays_weights_without_a_gradient) {
  op_each_device(decays);
}

static void skips(moe_device *dev, moe_dtype act) {
  state s = start(dev, act, 129);
  op_tensor grad = op_random(dev, "grad", MOE_F32, OP_SHAPE(129), 1.0);
  op_tensor minus = op_filled(dev, "scale", MOE_F32, OP_SHAPE(1), -1.0);
  op_tensor weight = op_filled(dev, "weight", act, OP_SHAPE(129), 0.5);
  op_ok(moe_adamw(dev, usual, grad.t, minus.t, s.w.t, s.m.t, s.v.t, weight.t));
  op_equal(s.w, s.w_reference);
  op_equal(s.m, s.m_reference);
  op_equal(s.v, s.v_reference);
  for (int i = 0; i < 129; i++) s.w_reference[i] = 0.5;
  op_equal(weight, s.w_reference);
}

Test(adamw, changes_nothing_when_the_scale_is_negative) {
  op_each(skips);
}

/* ---- the clipping factor --------------------------------------------------------------- */

static double factor(moe_device *dev, double squares, double max_norm, double unscale) {
  op_tensor sum = op_values(dev, "sum", MOE_F64, OP_SHAPE(1), &squares);
  op_tensor scale = op_output(dev, "scale", MOE_F32, OP_SHAPE(1));
  op_ok(moe_clip_scale(dev, sum.t, max_norm, unscale, scale.t));
  return op_read(&scale)[0];
}

static void clips(moe_device *dev) {
  op_require(factor(dev, 0.25, 1.0, 1.0) == 1.0, "a small norm must pass");
  op_require(factor(dev, 16.0, 1.0, 1.0) == 0.25, "norm 4 to 1");
  op_require(factor(dev, 16.0, 3.0, 1.0) == 0.75, "norm 4 to 3");
  op_require(factor(dev, 16.0, 0.0, 1.0) == 1.0, "0 is no limit");
  op_require(factor(dev, 16.0, 1.0, 0.125) == 0.125, "norm 1/2 after unscaling");
  op_require(factor(dev, 16.0, 1.0, 0.5) == 0.25, "norm 2 after unscaling, to 1");
  op_require(factor(dev, 0.0, 1.0, 0.5) == 0.5, "a zero gradient");
  op_require(factor(dev, (double)NAN, 1.0, 1.0) == -1.0, "NaN skips the step");
  op_require(factor(dev, (double)INFINITY, 1.0, 1.0) == -1.0, "infinity skips the step");
  op_require(factor(dev, (double)NAN, 0.0, 1.0) == -1.0, "NaN skips the step without a limit");
}

Test(adamw, clip_scale_limits_the_norm_and_marks_steps_to_skip) {
  op_each_device(clips);
}
