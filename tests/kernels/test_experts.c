/* The experts' products against float64, over uneven segments. Rows that belong to no expert are
 * NaN on the way in and must come back as they were. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "tests/support/op_check.h"

enum { MOST_EXPERTS = 8 };

typedef struct {
  int64_t d, f, e, tail;
  int64_t rows[MOST_EXPERTS];
} shape;

typedef struct {
  shape s;
  int64_t used, c; /* rows of experts, rows of the buffers */
  op_tensor offsets, gates, w13, w2;
} experts;

static const shape shapes[] = {
    {8, 16, 1, 0, {5}},
    {20, 36, 4, 7, {3, 0, 11, 0}}, /* empty experts */
    {24, 300, 3, 40, {0, 530, 0}}, /* all rows to one, over several panels */
    {64, 264, 8, 1, {1, 2, 0, 257, 64, 5, 0, 17}},
    {16, 8, 2, 9, {0, 0}}, /* nothing at all */
};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

static experts make(moe_device *dev, moe_dtype act, shape s) {
  experts x = {.s = s};
  int32_t *offset = op_int32s(s.e + 1);
  for (int64_t j = 0; j < s.e; j++) offset[j + 1] = offset[j] + (int32_t)s.rows[j];
  x.used = offset[s.e];
  x.c = x.used + s.tail;
  x.offsets = op_ints(dev, "offsets", OP_SHAPE(s.e + 1), offset);
  x.gates = op_random(dev, "gates", MOE_F32, OP_SHAPE(x.c), 0.5);
  x.w13 = op_random(dev, "w13", act, OP_SHAPE(s.e, 2, s.f, s.d), 1.0 / sqrt((double)s.d));
  x.w2 = op_random(dev, "w2", act, OP_SHAPE(s.e, s.d, s.f), 1.0 / sqrt((double)s.f));
  op_scratch(dev, moe_expert_scratch(dev, x.c, s.d, s.f, act));
  return x;
}

/* Random rows for the experts, NaN after them. */
static op_tensor input(moe_device *dev, const experts *x, const char *name, moe_dtype act,
                       int64_t width) {
  op_tensor t = op_random(dev, name, act, OP_SHAPE(x->c, width), 1.0);
  for (int64_t i = x->used * width; i < t.count; i++) t.v[i] = NAN;
  return op_values(dev, name, act, OP_SHAPE(x->c, width), t.v);
}

/* The expert of row r. */
static int64_t owner(const experts *x, int64_t r) {
  int64_t j = 0;
  while ((int64_t)x->offsets.v[j + 1] <= r) j++;
  return j;
}

/* The experts' rows of `t` agree with `want`, the others are still NaN. */
static void check_rows(const experts *x, op_tensor t, const double *want, double tolerance) {
  op_require(x->c > 0, "no rows");
  int64_t width = t.count / x->c;
  op_read(&t);
  for (int64_t i = x->used * width; i < t.count; i++)
    op_require(isnan(t.v[i]), "%s: wrote row %lld, which is no expert's", t.name,
               (long long)(i / width));
  t.t.shape[0] = x->used;
  t.count = x->used * width;
  op_close(t, want, tolerance);
}

static double silu(double g) {
  return g / (1.0 + exp(-g));
}
static double silu_slope(double g) {
  double s = 1.0 / (1.0 + exp(-g));
  return s * (1.0 + g * (1.0 - s));
}

/* ---- forward --------------------------------------------------------------------------------- */

static void up(moe_device *dev, moe_dtype act) {
  for (int n = 0; n < SHAPES; n++) {
    experts x = make(dev, act, shapes[n]);
    int64_t d = x.s.d, f = x.s.f;
    op_tensor in = input(dev, &x, "x", act, d);
    op_tensor gu = op_output(dev, "gu", act, OP_SHAPE(x.c, 2 * f));
    op_tensor a = op_output(dev, "a", act, OP_SHAPE(x.c, f));
    op_tensor slopes = op_output(dev, "slopes", act, OP_SHAPE(x.c, 2 * f));
    op_tensor other_a = op_output(dev, "a beside slopes", act, OP_SHAPE(x.c, f));
    op_ok(moe_expert_up(dev, in.t, x.offsets.t, x.w13.t, x.gates.t, MOE_GU_VALUES, gu.t, a.t));
    op_ok(moe_expert_up(dev, in.t, x.offsets.t, x.w13.t, x.gates.t, MOE_GU_SLOPES, slopes.t,
                        other_a.t));
    double *want_gu = op_doubles(x.c * 2 * f), *want_a = op_doubles(x.c * f);
    double *want_slopes = op_doubles(x.c * 2 * f);
    for (int64_t r = 0; r < x.used; r++) {
      const double *w = x.w13.v + owner(&x, r) * 2 * f * d;
      double *row = want_gu + r * 2 * f, *slope = want_slopes + r * 2 * f, gate = x.gates.v[r];
      for (int64_t i = 0; i < 2 * f; i++) row[i] = op_dot(in.v + r * d, w + i * d, d);
      for (int64_t i = 0; i < f; i++) {
        want_a[r * f + i] = gate * silu(row[i]) * row[f + i];
        slope[i] = gate * silu_slope(row[i]) * row[f + i];
        slope[f + i] = gate * silu(row[i]);
      }
    }
    check_rows(&x, gu, want_gu, op_tolerance(act));
    check_rows(&x, a, want_a, 2.0 * op_tolerance(act));
    check_rows(&x, slopes, want_slopes, 2.0 * op_tolerance(act));
    check_rows(&x, other_a, want_a, 2.0 * op_tolerance(act));
  }
}
Test(experts, up_makes_gate_up_or_slopes_and_gated_activation) {
  op_each(up);
}

static void down(moe_device *dev, moe_dtype act) {
  for (int n = 0; n < SHAPES; n++) {
    experts x = make(dev, act, shapes[n]);
    int64_t d = x.s.d, f = x.s.f;
    op_tensor a = input(dev, &x, "a", act, f);
    op_tensor y = op_output(dev, "y", act, OP_SHAPE(x.c, d));
    op_ok(moe_expert_down(dev, a.t, x.offsets.t, x.w2.t, y.t));
    double *want = op_doubles(x.c * d);
    for (int64_t i = 0; i < x.used * d; i++)
      want[i] = op_dot(a.v + i / d * f, x.w2.v + (owner(&x, i / d) * d + i % d) * f, f);
    check_rows(&x, y, want, op_tolerance(act));
  }
}
Test(experts, down_multiplies_each_segment_by_its_expert) {
  op_each(down);
}

/* ---- backward -------------------------------------------------------------------------------- */

static void down_backward(moe_device *dev, moe_dtype act) {
  for (int n = 0; n < SHAPES; n++) {
    experts x = make(dev, act, shapes[n]);
    int64_t d = x.s.d, f = x.s.f;
    op_tensor dy = input(dev, &x, "dy", act, d), gu = input(dev, &x, "gu", act, 2 * f);
    op_tensor slopes = op_clone(dev, gu), work = op_output(dev, "work", act, OP_SHAPE(x.c, f));
    double *want_slopes = op_doubles(x.c * 2 * f);
    op_tensor a = op_output(dev, "a", act, OP_SHAPE(x.c, f));
    op_tensor dgates = op_output(dev, "dgates", MOE_F32, OP_SHAPE(x.c));
    double *want_dgu = op_doubles(x.c * 2 * f), *want_a = op_doubles(x.c * f);
    double *want_dgates = op_doubles(x.c);
    for (int64_t r = 0; r < x.used; r++)
      for (int64_t i = 0; i < f; i++) {
        double da = 0.0, g = gu.v[r * 2 * f + i], u = gu.v[r * 2 * f + f + i];
        double s = 1.0 / (1.0 + exp(-g)), gate = x.gates.v[r];
        for (int64_t c = 0; c < d; c++)
          da += dy.v[r * d + c] * x.w2.v[(owner(&x, r) * d + c) * f + i];
        want_a[r * f + i] = gate * g * s * u;
        want_dgates[r] += da * g * s * u;
        want_dgu[r * 2 * f + i] = gate * da * u * silu_slope(g);
        want_dgu[r * 2 * f + f + i] = gate * da * g * s;
        want_slopes[r * 2 * f + i] = da * g;
        want_slopes[r * 2 * f + f + i] = da * u;
      }
    op_ok(moe_expert_down_backward(dev, dy.t, x.offsets.t, x.w2.t, x.gates.t, MOE_GU_VALUES, gu.t,
                                   a.t, dgates.t));
    op_ok(moe_expert_down_backward(dev, dy.t, x.offsets.t, x.w2.t, x.gates.t, MOE_GU_SLOPES,
                                   slopes.t, work.t, moe_tensor_none()));
    check_rows(&x, slopes, want_slopes, 2.0 * op_tolerance(act));
    check_rows(&x, gu, want_dgu, 2.0 * op_tolerance(act));
    check_rows(&x, a, want_a, 2.0 * op_tolerance(act));
    check_rows(&x, dgates, want_dgates, 2.0 * op_tolerance(act));
  }
}
Test(experts, down_backward_turns_gate_and_up_or_slopes_into_their_gradients) {
  op_each(down_backward);
}

/* The same gates' gradients, to the bit, beside rows of dy in y's order with zeros between. */
static void gathers_too(moe_device *dev, op_tensor dy, op_tensor y, op_tensor slot, op_tensor gates,
                        op_tensor dgates) {
  int64_t c = y.t.shape[0], d = y.t.shape[1], k = slot.t.shape[1];
  op_tensor out = op_output(dev, "out", y.t.dtype, OP_SHAPE(c, d));
  op_tensor again = op_output(dev, "dgates again", MOE_F32, OP_SHAPE(slot.t.shape[0], k));
  int32_t *pairs = op_int32s(c);
  double *want = op_doubles(c * d);
  memset(pairs, 0xff, (size_t)c * sizeof *pairs);
  for (int64_t i = 0; i < slot.count; i++) {
    int64_t at = (int64_t)slot.v[i];
    if (at < 0 || at >= c) continue;
    pairs[at] = (int32_t)i;
    memcpy(want + at * d, dy.v + i / k * d, (size_t)d * sizeof *want);
  }
  op_tensor pair = op_ints(dev, "pair", OP_SHAPE(c), pairs);
  op_ok(moe_gather_backward(dev, dy.t, pair.t, y.t, slot.t, gates.t, out.t, again.t));
  op_equal(out, want);
  op_equal(again, op_read(&dgates));
}

/* Rows that no slot names are NaN; some slots name none, or one beyond the rows there are. */
static void gates_backward(moe_device *dev, moe_dtype act) {
  enum { R = 37, K = 3, C = 90 };
  const int64_t widths[] = {1, 77, 768};
  for (int n = 0; n < 3; n++) {
    int64_t d = widths[n];
    op_tensor dy = op_random(dev, "dy", act, OP_SHAPE(R, d), 1.0);
    op_tensor y = op_random(dev, "y", act, OP_SHAPE(C, d), 1.0);
    op_tensor gates = op_random(dev, "gates", MOE_F32, OP_SHAPE(R, K), 0.5);
    op_tensor dgates = op_output(dev, "dgates", MOE_F32, OP_SHAPE(R, K));
    int32_t *slots = op_int32s(R * K);
    double *want = op_doubles(R * K), *named = op_doubles(C);
    for (int64_t i = 0; i < R * K; i++) { /* a stride that visits each row at most once */
      slots[i] = (int32_t)(i * 7 % (R * K));
      if (i % 5 == 0) slots[i] = -1;
      if (i % 11 == 3) gates.v[i] = 0.0;
      bool there = slots[i] >= 0 && slots[i] < C;
      if (there) named[slots[i]] = 1.0;
      if (there && gates.v[i] != 0.0)
        want[i] = op_dot(dy.v + i / K * d, y.v + slots[i] * d, d) / gates.v[i];
    }
    for (int64_t i = 0; i < C * d; i++)
      if (named[i / d] == 0.0) y.v[i] = NAN;
    y = op_values(dev, "y", act, OP_SHAPE(C, d), y.v);
    gates = op_values(dev, "gates", MOE_F32, OP_SHAPE(R, K), gates.v);
    op_tensor slot = op_ints(dev, "slot", OP_SHAPE(R, K), slots);
    op_ok(moe_gates_backward(dev, dy.t, y.t, slot.t, gates.t, dgates.t));
    op_close(dgates, want, 2e-6);
    gathers_too(dev, dy, y, slot, gates, dgates);
  }
}
Test(experts, gates_backward_is_a_dot_product_with_what_came_back) {
  op_each(gates_backward);
}

static void up_backward(moe_device *dev, moe_dtype act) {
  for (int n = 0; n < SHAPES; n++) {
    experts x = make(dev, act, shapes[n]);
    int64_t d = x.s.d, f = x.s.f;
    op_tensor dgu = input(dev, &x, "dgu", act, 2 * f);
    op_tensor dx = op_output(dev, "dx", act, OP_SHAPE(x.c, d));
    op_ok(moe_expert_up_backward(dev, dgu.t, x.offsets.t, x.w13.t, dx.t));
    double *want = op_doubles(x.c * d);
    for (int64_t r = 0; r < x.used; r++)
      for (int64_t i = 0; i < 2 * f; i++)
        for (int64_t c = 0; c < d; c++)
          want[r * d + c] += dgu.v[r * 2 * f + i] * x.w13.v[(owner(&x, r) * 2 * f + i) * d + c];
    check_rows(&x, dx, want, op_tolerance(act));
  }
}
Test(experts, up_backward_sums_both_halves) {
  op_each(up_backward);
}

/* squares, 3 before the call, got the squares of dw as it was stored. */
static void check_squares(op_tensor *squares, op_tensor *dw) {
  double sum = 0.0, got = op_read(squares)[0] - 3.0;
  op_read(dw);
  for (int64_t i = 0; i < dw->count; i++) sum += dw->v[i] * dw->v[i];
  op_require(fabs(got - sum) <= 1e-6 * sum, "squares: %.9g, not %.9g", got, sum);
}

static void check_weight_grad(moe_device *dev, moe_dtype act, shape s, int accumulate) {
  experts x = make(dev, act, s);
  int64_t m = 2 * s.f, n = s.d;
  op_tensor left = input(dev, &x, "left", act, m), right = input(dev, &x, "right", act, n);
  op_tensor dw = accumulate ? op_random(dev, "dw", MOE_F32, OP_SHAPE(s.e, m, n), 1.0)
                            : op_output(dev, "dw", MOE_F32, OP_SHAPE(s.e, m, n));
  double *want = op_doubles(dw.count);
  for (int64_t i = 0; i < dw.count && accumulate; i++) want[i] = dw.v[i];
  for (int64_t r = 0; r < x.used; r++)
    for (int64_t i = 0; i < m; i++)
      for (int64_t c = 0; c < n; c++)
        want[(owner(&x, r) * m + i) * n + c] += left.v[r * m + i] * right.v[r * n + c];
  op_tensor squares = op_filled(dev, "squares", MOE_F64, OP_SHAPE(1), 3.0);
  op_ok(moe_expert_weight_grad(dev, left.t, right.t, x.offsets.t, accumulate, dw.t, squares.t));
  op_close(dw, want, op_sum_tolerance(dev, act));
  check_squares(&squares, &dw);
}

static void weight_grad(moe_device *dev, moe_dtype act) {
  for (int n = 0; n < SHAPES; n++)
    for (int accumulate = 0; accumulate < 2; accumulate++)
      check_weight_grad(dev, act, shapes[n], accumulate);
}
Test(experts, weight_gradient_adds_or_writes_every_expert) {
  op_each(weight_grad);
}

/* bf16 gradients: the sums rounded once, or twice where a GPU rounds what it adds as well. */
static void rounded_weight_grad(moe_device *dev) {
  for (int i = 0; i < 2 * SHAPES; i++) {
    experts x = make(dev, MOE_BF16, shapes[i / 2]);
    int64_t m = x.s.d, n = x.s.f, e = x.s.e;
    int accumulate = i % 2;
    op_tensor left = input(dev, &x, "left", MOE_BF16, m),
              right = input(dev, &x, "right", MOE_BF16, n);
    op_tensor dw = accumulate ? op_random(dev, "dw", MOE_BF16, OP_SHAPE(e, m, n), 1.0)
                              : op_output(dev, "dw", MOE_BF16, OP_SHAPE(e, m, n));
    op_tensor sums = accumulate ? op_values(dev, "sums", MOE_F32, OP_SHAPE(e, m, n), dw.v)
                                : op_output(dev, "sums", MOE_F32, OP_SHAPE(e, m, n));
    op_tensor squares = op_filled(dev, "squares", MOE_F64, OP_SHAPE(1), 3.0);
    op_ok(moe_expert_weight_grad(dev, left.t, right.t, x.offsets.t, accumulate, dw.t, squares.t));
    op_ok(moe_expert_weight_grad(dev, left.t, right.t, x.offsets.t, accumulate, sums.t,
                                 moe_tensor_none()));
    check_squares(&squares, &dw);
    op_close(dw, op_read(&sums), 1.5 * op_tolerance(MOE_BF16));
    if (moe_device_what(dev) == MOE_DEVICE_CUDA) continue;
    for (int64_t k = 0; k < sums.count; k++) sums.v[k] = op_round(MOE_BF16, sums.v[k]);
    op_close(dw, sums.v, 1e-4); /* f32 sums in another order round elsewhere now and then */
  }
}
Test(experts, weight_gradient_may_be_of_half_precision) {
  op_each_device(rounded_weight_grad);
}

/* ---- the whole network ----------------------------------------------------------------------- */

/* sum of dy * y in float64, as a function of x, gates, w13, w2, one after the other. */
typedef struct {
  const experts *x;
  const double *dy;
} network;

static double loss(const double *values, void *context) {
  const network *n = context;
  const shape *s = &n->x->s;
  const double *gates = values + n->x->c * s->d, *w13 = gates + n->x->c;
  const double *w2 = w13 + s->e * 2 * s->f * s->d;
  double total = 0.0;
  for (int64_t r = 0; r < n->x->used; r++) {
    int64_t j = owner(n->x, r);
    for (int64_t i = 0; i < s->f; i++) {
      const double *row = w13 + (j * 2 * s->f + i) * s->d, *in = values + r * s->d;
      double a = gates[r] * silu(op_dot(in, row, s->d)) * op_dot(in, row + s->f * s->d, s->d);
      for (int64_t c = 0; c < s->d; c++)
        total += n->dy[r * s->d + c] * a * w2[(j * s->d + c) * s->f + i];
    }
  }
  return total;
}

static int64_t append(double *values, int64_t at, const op_tensor *x) {
  for (int64_t i = 0; i < x->count; i++) values[at + i] = x->v[i];
  return at + x->count;
}

/* Each sorted row as a token of its own: slot[r, 0] = r. */
static op_tensor own_slots(moe_device *dev, int64_t rows) {
  int32_t *slots = op_int32s(rows);
  for (int64_t r = 0; r < rows; r++) slots[r] = (int32_t)r;
  return op_ints(dev, "slot", OP_SHAPE(rows, 1), slots);
}

static void check_differences(moe_device *dev, moe_dtype act, moe_gu_kind kind) {
  experts x = make(dev, act, (shape){6, 10, 3, 0, {4, 0, 7}});
  int64_t d = x.s.d, f = x.s.f, c = x.c, e = x.s.e;
  op_tensor in = input(dev, &x, "x", act, d), dy = input(dev, &x, "dy", act, d);
  op_tensor gu = op_output(dev, "gu", act, OP_SHAPE(c, 2 * f));
  op_tensor a = op_output(dev, "a", act, OP_SHAPE(c, f));
  op_tensor again = op_output(dev, "a again", act, OP_SHAPE(c, f));
  op_tensor y = op_output(dev, "y", act, OP_SHAPE(c, d)), slot = own_slots(dev, c);
  op_tensor dx = op_output(dev, "dx", act, OP_SHAPE(c, d));
  op_tensor dgates = op_output(dev, "dgates", MOE_F32, OP_SHAPE(c));
  op_tensor dw13 = op_output(dev, "dw13", MOE_F32, OP_SHAPE(e, 2 * f, d));
  op_tensor dw2 = op_output(dev, "dw2", MOE_F32, OP_SHAPE(e, d, f));
  bool slopes = kind == MOE_GU_SLOPES;
  op_ok(moe_expert_up(dev, in.t, x.offsets.t, x.w13.t, x.gates.t, kind, gu.t, a.t));
  op_ok(moe_expert_down(dev, a.t, x.offsets.t, x.w2.t, y.t));
  op_ok(moe_expert_down_backward(dev, dy.t, x.offsets.t, x.w2.t, x.gates.t, kind, gu.t, again.t,
                                 slopes ? moe_tensor_none() : dgates.t));
  if (slopes)
    op_ok(moe_gates_backward(dev, dy.t, y.t, slot.t, moe_tensor_2d(x.gates.t.data, MOE_F32, c, 1),
                             moe_tensor_2d(dgates.t.data, MOE_F32, c, 1)));
  op_ok(moe_expert_up_backward(dev, gu.t, x.offsets.t, x.w13.t, dx.t));
  op_ok(moe_expert_weight_grad(dev, gu.t, in.t, x.offsets.t, 0, dw13.t, moe_tensor_none()));
  op_ok(moe_expert_weight_grad(dev, dy.t, slopes ? a.t : again.t, x.offsets.t, 0, dw2.t,
                               moe_tensor_none()));

  int64_t count = in.count + x.gates.count + x.w13.count + x.w2.count;
  double *values = op_doubles(count), *want = op_doubles(count);
  network n = {&x, dy.v};
  append(values, append(values, append(values, append(values, 0, &in), &x.gates), &x.w13), &x.w2);
  op_differences(loss, &n, values, count, want);
  op_close(dx, want, 2e-6);
  op_close(dgates, want + in.count, 2e-6);
  op_close(dw13, want + in.count + c, 2e-6);
  op_close(dw2, want + in.count + c + dw13.count, 2e-6);
}
static void differences(moe_device *dev, moe_dtype act) {
  if (act != MOE_F32) return;
  check_differences(dev, act, MOE_GU_VALUES);
  check_differences(dev, act, MOE_GU_SLOPES);
}
Test(experts, gradients_agree_with_central_differences) {
  op_each(differences);
}

/* Whether a is made again or there: the same bits, and a is the forward's. */
static void kinds(moe_device *dev, moe_dtype act) {
  for (int n = 0; n < SHAPES; n++) {
    experts x = make(dev, act, shapes[n]);
    int64_t d = x.s.d, f = x.s.f;
    op_tensor in = input(dev, &x, "x", act, d), dy = input(dev, &x, "dy", act, d);
    op_tensor gu = op_output(dev, "gu", act, OP_SHAPE(x.c, 2 * f));
    op_tensor forward = op_output(dev, "a", act, OP_SHAPE(x.c, f)), dgu[2], dgates[2];
    op_ok(
        moe_expert_up(dev, in.t, x.offsets.t, x.w13.t, x.gates.t, MOE_GU_VALUES, gu.t, forward.t));
    op_read(&gu), op_read(&forward);
    for (int i = 0; i < 2; i++) {
      op_tensor a = i ? op_clone(dev, forward) : op_output(dev, "a again", act, OP_SHAPE(x.c, f));
      dgu[i] = op_clone(dev, gu);
      dgates[i] = op_output(dev, "dgates", MOE_F32, OP_SHAPE(x.c));
      op_ok(moe_expert_down_backward(dev, dy.t, x.offsets.t, x.w2.t, x.gates.t,
                                     i ? MOE_GU_AND_A : MOE_GU_VALUES, dgu[i].t, a.t, dgates[i].t));
      check_rows(&x, a, forward.v, 0.0);
      check_rows(&x, dgu[i], op_read(&dgu[0]), 0.0);
      check_rows(&x, dgates[i], op_read(&dgates[0]), 0.0);
    }
  }
}
Test(experts, backward_makes_the_forward_activation_again_where_it_is_wanted) {
  op_each(kinds);
}

static void any_threads(moe_device *dev) {
  for (int n = 0; n < SHAPES; n++) {
    check_weight_grad(dev, MOE_F32, shapes[n], 0);
    check_weight_grad(dev, MOE_BF16, shapes[n], 1);
  }
  down_backward(dev, MOE_BF16);
  up(dev, MOE_F32);
}
Test(experts, need_no_particular_number_of_threads) {
  for (int threads = 1; threads <= 5; threads += 2) op_with_threads(threads, any_threads);
}
