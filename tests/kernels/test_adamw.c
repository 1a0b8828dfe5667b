/* AdamW over several steps against float64, and the clipping factor. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "core/base/halves.h"
#include "tests/support/op_check.h"

static const moe_adamw_args usual = {0.9, 0.95, 1e-8, 0.1, 0};

/* One step of the formula in ops.h. */
static void update(moe_adamw_args a, double lr, int64_t step, int64_t n, const double *grad,
                   double scale, double *w, double *m, double *v) {
  double correct1 = 1.0 - pow(a.beta1, (double)step);
  double correct2 = 1.0 - pow(a.beta2, (double)step);
  for (int64_t i = 0; i < n; i++) {
    double g = grad[i] * scale;
    m[i] = a.beta1 * m[i] + (1.0 - a.beta1) * g;
    v[i] = a.beta2 * v[i] + (1.0 - a.beta2) * g * g;
    w[i] -= lr * (m[i] / correct1 / (sqrt(v[i] / correct2) + a.eps) + a.weight_decay * w[i]);
  }
}

/* The numbers of a step to where the update reads them. */
static void set_step(moe_device *dev, op_tensor now, moe_adamw_args args, double lr, int64_t step) {
  double numbers[MOE_ADAMW_NUMBERS];
  op_ok(moe_adamw_numbers(args, lr, step, numbers));
  op_ok(moe_device_upload(dev, now.t.data, numbers, (int64_t)sizeof numbers));
  op_ok(moe_device_sync(dev));
}

static op_tensor at_step(moe_device *dev, moe_adamw_args args, double lr, int64_t step) {
  op_tensor now = op_output(dev, "now", MOE_F64, OP_SHAPE(MOE_ADAMW_NUMBERS));
  set_step(dev, now, args, lr, step);
  return now;
}

typedef struct {
  op_tensor w; /* the masters: f32, or beside bf16 weights low16 */
  op_tensor m, v, weight, scale;
  double *w_reference, *m_reference, *v_reference;
} state;

/* Masters with these values: with bf16 weights in halves, else whole and the weights not yet
 * written. */
static void set_masters(moe_device *dev, moe_dtype act, op_tensor whole, op_tensor *w,
                        op_tensor *weight) {
  int64_t n = whole.count;
  double *low = op_doubles(n);
  *w = whole;
  *weight = op_output(dev, "weight", act, OP_SHAPE(n));
  if (act != MOE_BF16) return;
  for (int64_t i = 0; i < n; i++) {
    float value = (float)whole.v[i];
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    low[i] = (double)moe_halves_low(bits);
  }
  *w = op_values(dev, "w", MOE_LOW16, OP_SHAPE(n), low);
  *weight = op_values(dev, "weight", MOE_BF16, OP_SHAPE(n), whole.v);
}

/* The masters as they are now, in f32. */
static op_tensor masters(moe_device *dev, op_tensor w, op_tensor weight) {
  if (w.t.dtype == MOE_F32) return w;
  double *whole = op_doubles(w.count);
  op_read(&w);
  op_read(&weight);
  for (int64_t i = 0; i < w.count; i++) {
    uint16_t low = (uint16_t)w.v[i], high = moe_f32_to_bf16((float)weight.v[i]);
    float value;
    moe_join_halves(&high, &low, &value, 1);
    whole[i] = (double)value;
  }
  return op_values(dev, "masters", MOE_F32, OP_SHAPE(w.count), whole);
}

static state start(moe_device *dev, moe_dtype act, int64_t n) {
  state s = {.m = op_filled(dev, "m", MOE_F32, OP_SHAPE(n), 0.0),
             .v = op_filled(dev, "v", MOE_F32, OP_SHAPE(n), 0.0),
             .scale = op_filled(dev, "scale", MOE_F32, OP_SHAPE(1), 0.25),
             .w_reference = op_doubles(n),
             .m_reference = op_doubles(n),
             .v_reference = op_doubles(n)};
  op_tensor whole = op_random(dev, "w", MOE_F32, OP_SHAPE(n), 0.02);
  set_masters(dev, act, whole, &s.w, &s.weight);
  memcpy(s.w_reference, masters(dev, s.w, s.weight).v, (size_t)n * sizeof *whole.v);
  return s;
}

static void many_steps(moe_device *dev, moe_dtype act, int64_t n) {
  state s = start(dev, act, n);
  for (int step = 1; step <= 20; step++) {
    char name[16] = "grad ";
    name[4] = (char)('a' + step);
    op_tensor grad = op_random(dev, name, MOE_F32, OP_SHAPE(n), 0.01);
    double lr = 1e-3 * (double)step / 20.0;
    op_tensor now = at_step(dev, usual, lr, step);
    update(usual, lr, step, n, grad.v, 0.25, s.w_reference, s.m_reference, s.v_reference);
    op_ok(moe_adamw(dev, usual, now.t, grad.t, s.scale.t, s.w.t, s.m.t, s.v.t, s.weight.t));
  }
  op_tensor w = masters(dev, s.w, s.weight);
  op_close(w, s.w_reference, 5e-7);
  op_close(s.m, s.m_reference, 1e-6);
  op_close(s.v, s.v_reference, 1e-6);
  double *rounded = op_doubles(n);
  for (int64_t i = 0; i < n; i++) rounded[i] = op_round(act, w.v[i]);
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
  op_tensor now = at_step(dev, usual, 1e-4, 1);
  for (int step = 1; step <= 1000; step++) {
    set_step(dev, now, usual, 1e-4, step);
    op_ok(moe_adamw(dev, usual, now.t, zero.t, scale.t, w.t, m.t, v.t, moe_tensor_none()));
  }
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
  op_tensor weight = op_filled(dev, "weight", act, OP_SHAPE(129), 0.5), w = op_clone(dev, s.w);
  op_tensor now = at_step(dev, usual, 1e-3, 1);
  op_ok(moe_adamw(dev, usual, now.t, grad.t, minus.t, s.w.t, s.m.t, s.v.t, weight.t));
  op_equal(s.w, w.v);
  op_equal(s.m, s.m_reference);
  op_equal(s.v, s.v_reference);
  for (int i = 0; i < 129; i++) s.w_reference[i] = 0.5;
  op_equal(weight, s.w_reference);
}

Test(adamw, changes_nothing_when_the_scale_is_negative) {
  op_each(skips);
}

/* ---- bf16 gradients and moments ------------------------------------------------------------- */

/* The same result from a bf16 gradient as from its values in f32. */
static void takes_rounded_gradients(moe_device *dev, moe_dtype act) {
  const int64_t n = 2100;
  state a = start(dev, act, n), b = start(dev, act, n);
  op_tensor half = op_random(dev, "grad", MOE_BF16, OP_SHAPE(n), 0.01);
  op_tensor full = op_values(dev, "grad", MOE_F32, OP_SHAPE(n), half.v);
  op_tensor now = at_step(dev, usual, 1e-3, 1);
  op_ok(moe_adamw(dev, usual, now.t, half.t, a.scale.t, a.w.t, a.m.t, a.v.t, a.weight.t));
  op_ok(moe_adamw(dev, usual, now.t, full.t, b.scale.t, b.w.t, b.m.t, b.v.t, b.weight.t));
  op_equal(a.w, op_read(&b.w));
  op_equal(a.weight, op_read(&b.weight));
  op_equal(a.m, op_read(&b.m));
  op_equal(a.v, op_read(&b.v));
}

Test(adamw, takes_gradients_of_half_precision) {
  op_each(takes_rounded_gradients);
}

/* bf16 has 8 bits: the next below and above x, for x > 0 inside the range. */
static double neighbour(double x, int above) {
  int exponent;
  frexp(x, &exponent);
  double unit = ldexp(1.0, exponent - 8), below = floor(x / unit) * unit;
  return above ? below + unit : below;
}

/* With b2 = 0.999, v shrinks by a quarter of a unit of its last place at most: rounding to nearest
 * would leave it where it is. Over many elements the mean follows the formula. */
static void forgets(moe_device *dev) {
  enum { N = 1 << 14, AGES = 300 };
  op_tensor w = op_filled(dev, "w", MOE_F32, OP_SHAPE(N), 1.0);
  op_tensor zero = op_filled(dev, "zero", MOE_BF16, OP_SHAPE(N), 0.0), m = op_clone(dev, zero);
  op_tensor v = op_filled(dev, "v", MOE_BF16, OP_SHAPE(N), 1.0);
  op_tensor scale = op_filled(dev, "scale", MOE_F32, OP_SHAPE(1), 1.0);
  moe_adamw_args args = {0.9, 0.999, 1e-8, 0.0, 0};
  op_tensor now = at_step(dev, args, 0.0, 1);
  for (int step = 1; step <= AGES; step++) {
    set_step(dev, now, args, 0.0, step);
    op_ok(moe_adamw(dev, args, now.t, zero.t, scale.t, w.t, m.t, v.t, moe_tensor_none()));
  }
  double mean = 0.0, expected = pow(0.999, AGES);
  op_read(&v);
  for (int i = 0; i < N; i++) mean += v.v[i] / N;
  op_require(fabs(mean - expected) < 1e-3 * expected, "mean %.6f, not %.6f", mean, expected);
}

Test(adamw, second_moments_of_half_precision_decay_without_bias) {
  op_each_device(forgets);
}

/* One step from zero: each moment goes to a neighbour of its exact value, to the upper one as often
 * as its distance says. */
static void rounds_to_neighbours(moe_device *dev) {
  enum { N = 1 << 14 };
  op_tensor w = op_filled(dev, "w", MOE_F32, OP_SHAPE(N), 1.0);
  op_tensor m = op_filled(dev, "m", MOE_BF16, OP_SHAPE(N), 0.0), v = op_clone(dev, m);
  op_tensor grad = op_filled(dev, "grad", MOE_F32, OP_SHAPE(N), 0.7);
  op_tensor scale = op_filled(dev, "scale", MOE_F32, OP_SHAPE(1), 1.0);
  op_tensor now = at_step(dev, usual, 1e-3, 1);
  op_ok(moe_adamw(dev, usual, now.t, grad.t, scale.t, w.t, m.t, v.t, moe_tensor_none()));
  op_tensor *moments[] = {&m, &v};
  double exact[] = {0.1 * 0.7, 0.05 * 0.49};
  for (int k = 0; k < 2; k++) {
    double below = neighbour(exact[k], 0), above = neighbour(exact[k], 1), ups = 0.0;
    op_read(moments[k]);
    for (int i = 0; i < N; i++) {
      double x = moments[k]->v[i];
      op_require(x == below || x == above, "element %d: %.9g is not beside %.9g", i, x, exact[k]);
      ups += x == above;
    }
    double share = (exact[k] - below) / (above - below), deviation = sqrt(share * (1 - share) / N);
    op_require(fabs(ups / N - share) < 5.0 * deviation, "%.4f went up, not %.4f", ups / N, share);
  }
}

Test(adamw, moments_of_half_precision_go_to_a_neighbour_at_random) {
  op_each_device(rounds_to_neighbours);
}

/* Elements [from, from + n) of one update, on their own: the same as in the whole. */
static void numbers_count(moe_device *dev, moe_dtype act) {
  enum { N = 5000 };
  const int64_t parts[][2] = {{0, 1000}, {1000, 1001}, {2001, 998}, {2999, 2001}};
  state whole = start(dev, act, N), split = start(dev, act, N);
  op_tensor grad = op_random(dev, "grad", MOE_BF16, OP_SHAPE(N), 0.01);
  op_tensor m[2] = {op_filled(dev, "m", MOE_BF16, OP_SHAPE(N), 0.0)}, v[2];
  m[1] = op_clone(dev, m[0]), v[0] = op_clone(dev, m[0]), v[1] = op_clone(dev, m[0]);
  moe_adamw_args args = usual;
  op_tensor now = at_step(dev, args, 1e-3, 7);
  op_ok(moe_adamw(dev, args, now.t, grad.t, whole.scale.t, whole.w.t, m[0].t, v[0].t,
                  whole.weight.t));
  for (int i = 0; i < 4; i++) {
    int64_t at = args.first = parts[i][0], n = parts[i][1];
#define PART(x) moe_tensor_rows((x).t, at, n)
    op_ok(moe_adamw(dev, args, now.t, PART(grad), split.scale.t, PART(split.w), PART(m[1]),
                    PART(v[1]), PART(split.weight)));
#undef PART
  }
  op_equal(split.w, op_read(&whole.w));
  op_equal(split.weight, op_read(&whole.weight));
  op_equal(m[1], op_read(&m[0]));
  op_equal(v[1], op_read(&v[0]));
}

Test(adamw, random_bits_belong_to_the_number_of_an_element) {
  op_each(numbers_count);
}

/* ---- masters in halves ---------------------------------------------------------------------- */

/* Without rate and gradient an update joins the halves and parts them again: no bit may change,
 * whatever a finite master is. */
static void keeps_masters(moe_device *dev) {
  static const uint32_t upper[] = {0x0000, 0x0001, 0x007f, 0x0080, 0x3c23, 0x3f7f,
                                   0x3f80, 0x4048, 0x7f7e, 0x7f7f, 0x8000, 0x8001,
                                   0x807f, 0x8080, 0xbc22, 0xbf80, 0xff7e, 0xff7f};
  enum { UPPER = sizeof upper / sizeof upper[0], LOW = 1 << 16, N = UPPER * LOW };
  op_tensor grad = op_filled(dev, "grad", MOE_BF16, OP_SHAPE(N), 0.0);
  op_tensor m = op_filled(dev, "m", MOE_BF16, OP_SHAPE(N), 0.0), v = op_clone(dev, m);
  op_tensor scale = op_filled(dev, "scale", MOE_F32, OP_SHAPE(1), 1.0), w, weight;
  op_tensor whole = op_output(dev, "whole", MOE_F32, OP_SHAPE(N));
  for (uint32_t i = 0; i < N; i++) {
    float value;
    uint32_t bits = upper[i / LOW] << 16 | i % LOW;
    memcpy(&value, &bits, sizeof bits);
    whole.v[i] = (double)value;
  }
  set_masters(dev, MOE_BF16, whole, &w, &weight);
  op_tensor now = at_step(dev, usual, 0.0, 1), low = op_clone(dev, w), high = op_clone(dev, weight);
  op_ok(moe_adamw(dev, usual, now.t, grad.t, scale.t, w.t, m.t, v.t, weight.t));
  op_equal(w, low.v);
  op_equal(weight, high.v);
}

Test(adamw, a_master_in_halves_stays_what_it_is) {
  op_each_device(keeps_masters);
}

/* Steps far smaller than a bf16 weight's last place add up all the same. */
static void creeps(moe_device *dev) {
  enum { N = 1000, STEPS = 500 };
  op_tensor whole = op_filled(dev, "w", MOE_F32, OP_SHAPE(N), 1.0), w, weight;
  op_tensor grad = op_filled(dev, "grad", MOE_F32, OP_SHAPE(N), 0.5);
  op_tensor m = op_filled(dev, "m", MOE_F32, OP_SHAPE(N), 0.0), v = op_clone(dev, m);
  op_tensor scale = op_filled(dev, "scale", MOE_F32, OP_SHAPE(1), 1.0);
  moe_adamw_args args = {0.9, 0.95, 1e-8, 0.0, 0};
  op_tensor now = at_step(dev, args, 1e-5, 1);
  set_masters(dev, MOE_BF16, whole, &w, &weight);
  for (int step = 1; step <= STEPS; step++) {
    set_step(dev, now, args, 1e-5, step);
    op_ok(moe_adamw(dev, args, now.t, grad.t, scale.t, w.t, m.t, v.t, weight.t));
  }
  double lost = 1.0 - masters(dev, w, weight).v[0];
  op_require(fabs(lost - STEPS * 1e-5) < 1e-5, "moved by %.7g", lost);
}

Test(adamw, small_steps_add_up_in_halves) {
  op_each_device(creeps);
}

/* ---- recorded ------------------------------------------------------------------------------- */

/* An update recorded at another step gives the bits of one queued at this step. */
static void reads_its_step(moe_device *dev, moe_dtype act) {
  enum { N = 3001 };
  if (!moe_device_has_graphs(dev)) return;
  state queued = start(dev, act, N), recorded = start(dev, act, N);
  op_tensor grad = op_random(dev, "grad", MOE_F32, OP_SHAPE(N), 0.01);
  op_tensor m[2] = {op_filled(dev, "m", MOE_BF16, OP_SHAPE(N), 0.0)}, v[2];
  m[1] = op_clone(dev, m[0]), v[0] = op_clone(dev, m[0]), v[1] = op_clone(dev, m[0]);
  op_tensor now = at_step(dev, usual, 1.0, 99);
  moe_graph *graph;
  op_ok(moe_device_graph_begin(dev));
  op_ok(moe_adamw(dev, usual, now.t, grad.t, recorded.scale.t, recorded.w.t, m[1].t, v[1].t,
                  recorded.weight.t));
  op_ok(moe_device_graph_end(dev, &graph));
  for (int step = 1; step <= 5; step++) {
    set_step(dev, now, usual, 1e-3 * step, step);
    op_ok(moe_adamw(dev, usual, now.t, grad.t, queued.scale.t, queued.w.t, m[0].t, v[0].t,
                    queued.weight.t));
    op_ok(moe_device_graph_launch(dev, graph));
    op_equal(recorded.w, op_read(&queued.w));
    op_equal(recorded.weight, op_read(&queued.weight));
    op_equal(m[1], op_read(&m[0]));
    op_equal(v[1], op_read(&v[0]));
  }
  moe_graph_destroy(dev, graph);
}

Test(adamw, recorded_reads_the_numbers_of_its_step) {
  op_each(reads_its_step);
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
