/* The router against float64: choice, gates, statistics, dropping, gradients. */
#include <criterion/criterion.h>
#include <math.h>

#include "tests/support/op_check.h"

typedef struct {
  int64_t t, d, e, k, groups;
  bool bias;
} shape;

typedef struct {
  shape s;
  op_tensor x, weight, bias, probs, lse, experts, gates, stats;
} router;

static router make(moe_device *dev, moe_dtype act, shape s) {
  router r = {.s = s};
  r.x = op_random(dev, "x", act, OP_SHAPE(s.t, s.d), 1.0);
  r.weight = op_random(dev, "weight", MOE_F32, OP_SHAPE(s.e, s.d), 1.5 / sqrt((double)s.d));
  r.bias = s.bias ? op_random(dev, "bias", MOE_F32, OP_SHAPE(s.e), 0.2)
                  : (op_tensor){.t = moe_tensor_none()};
  r.probs = op_output(dev, "probs", MOE_F32, OP_SHAPE(s.t, s.e));
  r.lse = op_output(dev, "lse", MOE_F32, OP_SHAPE(s.t));
  r.experts = op_output(dev, "experts", MOE_I32, OP_SHAPE(s.t, s.k));
  r.gates = op_output(dev, "gates", MOE_F32, OP_SHAPE(s.t, s.k));
  r.stats = op_output(dev, "stats", MOE_F32, OP_SHAPE(s.groups, 2 * s.e + 1));
  return r;
}

static void run(moe_device *dev, router *r) {
  op_ok(moe_router(dev, r->x.t, r->weight.t, r->bias.t, r->probs.t, r->lse.t, r->experts.t,
                   r->gates.t, r->stats.t));
  op_read(&r->probs);
  op_read(&r->lse);
  op_read(&r->experts);
  op_read(&r->gates);
  op_read(&r->stats);
}

/* ---- reference ------------------------------------------------------------------------------- */

/* p [E] of one token; returns lse. */
static double soften(shape s, const double *x, const double *weight, double *p) {
  double top = -INFINITY, sum = 0.0;
  for (int64_t j = 0; j < s.e; j++) {
    p[j] = op_dot(x, weight + j * s.d, s.d);
    top = fmax(top, p[j]);
  }
  for (int64_t j = 0; j < s.e; j++) sum += exp(p[j] - top);
  double lse = top + log(sum);
  for (int64_t j = 0; j < s.e; j++) p[j] = exp(p[j] - lse);
  return lse;
}

/* The k largest of p + bias. */
static void choose(shape s, const double *p, const double *bias, double *experts, double *gates) {
  double sum = 0.0;
  for (int64_t i = 0; i < s.k; i++) {
    int64_t best = -1;
    for (int64_t j = 0; j < s.e; j++) {
      bool taken = false;
      for (int64_t n = 0; n < i; n++) taken = taken || experts[n] == (double)j;
      double better = best < 0 ? 0.0 : p[best] + (bias ? bias[best] : 0.0);
      if (!taken && (best < 0 || p[j] + (bias ? bias[j] : 0.0) > better)) best = j;
    }
    experts[i] = (double)best;
    sum += p[best];
  }
  for (int64_t i = 0; i < s.k; i++) gates[i] = p[(int64_t)experts[i]] / sum;
}

static void check(moe_device *dev, moe_dtype act, shape s) {
  router r = make(dev, act, s);
  double *probs = op_doubles(s.t * s.e), *lse = op_doubles(s.t), *experts = op_doubles(s.t * s.k);
  double *gates = op_doubles(s.t * s.k), *stats = op_doubles(s.groups * (2 * s.e + 1));
  double *mass = stats + s.groups * s.e, *z = mass + s.groups * s.e;
  for (int64_t t = 0; t < s.t; t++) {
    int64_t g = t / (s.t / s.groups);
    lse[t] = soften(s, r.x.v + t * s.d, r.weight.v, probs + t * s.e);
    choose(s, probs + t * s.e, r.bias.v, experts + t * s.k, gates + t * s.k);
    for (int64_t i = 0; i < s.k; i++) stats[g * s.e + (int64_t)experts[t * s.k + i]] += 1.0;
    for (int64_t j = 0; j < s.e; j++) mass[g * s.e + j] += probs[t * s.e + j];
    z[g] += lse[t] * lse[t];
  }
  run(dev, &r);
  op_close(r.probs, probs, 1e-6); /* whatever the type of x */
  op_close(r.lse, lse, 1e-6);
  op_equal(r.experts, experts);
  op_close(r.gates, gates, 1e-6);
  op_close(r.stats, stats, 1e-6);
  for (int64_t i = 0; i < s.groups * s.e; i++)
    op_require(r.stats.v[i] == stats[i], "count %lld is %g", (long long)i, r.stats.v[i]);
}

static void many_shapes(moe_device *dev, moe_dtype act) {
  const shape list[] = {
      {1, 1, 1, 1, 1, false},     {3, 8, 4, 2, 1, false},    {70, 300, 16, 4, 2, false},
      {64, 256, 16, 4, 64, true}, {33, 40, 5, 5, 3, true},   {40, 17, 150, 8, 4, true},
      {37, 264, 40, 8, 1, false}, {66, 136, 64, 6, 2, true}, {20, 128, 65, 3, 1, false}};
  for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) check(dev, act, list[i]);
}
Test(router, matches_float64_for_odd_shapes_biases_and_groups) {
  op_each(many_shapes);
}

/* ---- the choice ------------------------------------------------------------------------------ */

static void ties(moe_device *dev, moe_dtype act) {
  shape s = {5, 16, 6, 4, 1, false};
  router r = make(dev, act, s);
  r.weight = op_filled(dev, "equal rows", MOE_F32, OP_SHAPE(s.e, s.d), 0.25);
  run(dev, &r);
  for (int64_t i = 0; i < s.t * s.k; i++) {
    op_require(r.experts.v[i] == (double)(i % s.k), "expert %g at %lld", r.experts.v[i],
               (long long)i);
    op_require(r.gates.v[i] == 0.25, "gate %g", r.gates.v[i]);
  }
}
Test(router, breaks_ties_by_lower_index) {
  op_each(ties);
}

static void bias_only_chooses(moe_device *dev, moe_dtype act) {
  shape s = {20, 16, 4, 2, 1, false};
  const double push[] = {0.0, 0.0, 0.0, 10.0};
  router r = make(dev, act, s);
  r.bias = op_values(dev, "bias", MOE_F32, OP_SHAPE(s.e), push);
  run(dev, &r);
  for (int64_t t = 0; t < s.t; t++) {
    const double *e = r.experts.v + t * 2, *p = r.probs.v + t * 4;
    double first = p[3] / (p[3] + p[(int64_t)e[1]]);
    op_require(e[0] == 3.0, "expert %g first", e[0]);
    op_require(fabs(r.gates.v[t * 2] - first) < 1e-6, "gate %g, not %g", r.gates.v[t * 2], first);
  }
}
Test(router, bias_moves_the_choice_but_not_the_gates) {
  op_each(bias_only_chooses);
}

static void hopeless_choice(moe_device *dev, moe_dtype act) {
  const double weight[] = {200.0, 0.0, 0.0}, bias[] = {0.0, 5.0, 5.0};
  router r = make(dev, act, (shape){1, 1, 3, 2, 1, false});
  r.x = op_filled(dev, "x", act, OP_SHAPE(1, 1), 1.0);
  r.weight = op_values(dev, "weight", MOE_F32, OP_SHAPE(3, 1), weight);
  r.bias = op_values(dev, "bias", MOE_F32, OP_SHAPE(3), bias);
  run(dev, &r);
  op_require(r.gates.v[0] == 0.5 && r.gates.v[1] == 0.5, "gates %g %g", r.gates.v[0], r.gates.v[1]);
}
Test(router, shares_evenly_among_chosen_experts_without_probability) {
  op_each(hopeless_choice);
}

/* ---- drop ------------------------------------------------------------------------------------ */

/* What is left of expert j's assignments when only the `capacity` best stay. */
static void drop_reference(shape s, const double *probs, int64_t capacity, double *experts,
                           double *gates, double *dropped) {
  for (int64_t j = 0; j < s.e; j++)
    for (;;) {
      int64_t count = 0, worst = -1;
      for (int64_t i = 0; i < s.t * s.k; i++) {
        if (experts[i] != (double)j) continue;
        count++;
        if (worst < 0 || probs[i / s.k * s.e + j] <= probs[worst / s.k * s.e + j]) worst = i;
      }
      if (count <= capacity) break;
      experts[worst] = -1.0;
      gates[worst] = 0.0;
      *dropped += 1.0;
    }
}

static void check_drop(moe_device *dev, router *r, int64_t capacity) {
  shape s = r->s;
  op_tensor dropped = op_output(dev, "dropped", MOE_F32, OP_SHAPE(1));
  double *experts = op_doubles(s.t * s.k), *gates = op_doubles(s.t * s.k), lost = 0.0;
  run(dev, r);
  for (int64_t i = 0; i < s.t * s.k; i++) {
    experts[i] = r->experts.v[i];
    gates[i] = r->gates.v[i];
  }
  drop_reference(s, r->probs.v, capacity, experts, gates, &lost);
  op_ok(moe_router_drop(dev, r->probs.t, capacity, r->experts.t, r->gates.t, dropped.t));
  op_equal(r->experts, experts);
  op_equal(r->gates, gates);
  op_equal(dropped, &lost);
}

static void drop(moe_device *dev, moe_dtype act) {
  const int64_t capacities[] = {0, 1, 3, 9, 1000};
  for (size_t i = 0; i < 5; i++) {
    router many = make(dev, act, (shape){60, 20, 6, 3, 1, false});
    check_drop(dev, &many, capacities[i]);
    router wide = make(dev, act, (shape){20, 8, 140, 5, 1, false});
    check_drop(dev, &wide, capacities[i]);
    router tied = make(dev, act, (shape){30, 8, 4, 2, 1, false});
    tied.weight = op_filled(dev, "equal rows", MOE_F32, OP_SHAPE(4, 8), 0.5);
    check_drop(dev, &tied, capacities[i]);
  }
}
Test(router, drops_the_least_probable_and_then_the_later_token) {
  op_each(drop);
}

/* ---- gradient -------------------------------------------------------------------------------- */

enum { GROUPS = 2 };
static const double aux_scale = 0.03, z_scale = 0.02;

typedef struct {
  shape s;
  const double *experts, *dgates, *load, *lost; /* lost [T]: probability of dropped choices */
} loss_terms;

/* sum dgates gates + aux + z as a function of x, then weight. */
static double loss(const double *values, void *context) {
  const loss_terms *c = context;
  shape s = c->s;
  const double *weight = values + s.t * s.d;
  double p[64], total = 0.0;
  for (int64_t t = 0; t < s.t; t++) {
    const double *expert = c->experts + t * s.k;
    double lse = soften(s, values + t * s.d, weight, p), sum = c->lost[t];
    for (int64_t i = 0; i < s.k; i++) sum += expert[i] < 0.0 ? 0.0 : p[(int64_t)expert[i]];
    for (int64_t i = 0; i < s.k; i++)
      if (expert[i] >= 0.0) total += c->dgates[t * s.k + i] * p[(int64_t)expert[i]] / sum;
    for (int64_t j = 0; j < s.e; j++)
      total += aux_scale * c->load[t / (s.t / GROUPS) * s.e + j] * p[j];
    total += z_scale * lse * lse;
  }
  return total;
}

/* The gradient in x and weight, one after the other, by central differences. */
static double *differences(router *r, const op_tensor *dgates, const op_tensor *load,
                           const double *lost) {
  shape s = r->s;
  int64_t count = s.t * s.d + s.e * s.d;
  double *values = op_doubles(count), *gradient = op_doubles(count);
  for (int64_t i = 0; i < count; i++)
    values[i] = i < s.t * s.d ? r->x.v[i] : r->weight.v[i - s.t * s.d];
  loss_terms terms = {s, r->experts.v, dgates->v, load->v, lost};
  op_differences(loss, &terms, values, count, gradient);
  return gradient;
}

static void check_backward(moe_device *dev, moe_dtype act, int64_t capacity) {
  shape s = {34, 12, 5, 3, GROUPS, true};
  router r = make(dev, act, s);
  run(dev, &r);
  double *lost = op_doubles(s.t), *before = op_doubles(s.t * s.k);
  for (int64_t i = 0; i < s.t * s.k; i++) before[i] = r.experts.v[i];
  op_tensor dropped = op_output(dev, "dropped", MOE_F32, OP_SHAPE(1));
  op_ok(moe_router_drop(dev, r.probs.t, capacity, r.experts.t, r.gates.t, dropped.t));
  op_read(&r.experts);
  for (int64_t i = 0; i < s.t * s.k; i++)
    if (r.experts.v[i] < 0.0) lost[i / s.k] += r.probs.v[i / s.k * s.e + (int64_t)before[i]];

  op_tensor dgates = op_random(dev, "dgates", MOE_F32, OP_SHAPE(s.t, s.k), 1.0);
  op_tensor load = op_random(dev, "load", MOE_F32, OP_SHAPE(GROUPS, s.e), 10.0);
  op_tensor dlogits = op_output(dev, "dlogits", MOE_F32, OP_SHAPE(s.t, s.e));
  op_tensor dx = op_random(dev, "dx", act, OP_SHAPE(s.t, s.d), 1.0);
  op_tensor dweight = op_random(dev, "dweight", MOE_F32, OP_SHAPE(s.e, s.d), 1.0);
  double *want = differences(&r, &dgates, &load, lost);
  for (int64_t i = 0; i < s.t * s.d; i++) want[i] += dx.v[i];
  for (int64_t i = 0; i < s.e * s.d; i++) want[s.t * s.d + i] += dweight.v[i];
  op_ok(moe_router_backward(dev, dgates.t, r.x.t, r.weight.t, r.probs.t, r.lse.t, r.experts.t,
                            r.gates.t, load.t, (float)aux_scale, (float)z_scale, dlogits.t, dx.t,
                            dweight.t));
  op_close(dx, want, act == MOE_F32 ? 2e-6 : op_tolerance(act));
  op_close(dweight, want + s.t * s.d, 2e-6);
}

static void backward(moe_device *dev, moe_dtype act) {
  check_backward(dev, act, 1000);
}
Test(router, gradient_agrees_with_central_differences) {
  op_each(backward);
}

static void backward_dropped(moe_device *dev, moe_dtype act) {
  check_backward(dev, act, 9);
  check_backward(dev, act, 0);
}
Test(router, a_dropped_assignment_has_no_gradient) {
  op_each(backward_dropped);
}

/* Tokens over several tiles, columns too: against plain sums of dlogits. */
static void check_products(moe_device *dev, moe_dtype act, shape s) {
  router r = make(dev, act, s);
  run(dev, &r);
  op_tensor dgates = op_random(dev, "dgates", MOE_F32, OP_SHAPE(s.t, s.k), 1.0);
  op_tensor load = op_filled(dev, "load", MOE_F32, OP_SHAPE(1, s.e), 0.0);
  op_tensor dlogits = op_output(dev, "dlogits", MOE_F32, OP_SHAPE(s.t, s.e));
  op_tensor dx = op_filled(dev, "dx", act, OP_SHAPE(s.t, s.d), 0.0);
  op_tensor dweight = op_filled(dev, "dweight", MOE_F32, OP_SHAPE(s.e, s.d), 0.0);
  op_ok(moe_router_backward(dev, dgates.t, r.x.t, r.weight.t, r.probs.t, r.lse.t, r.experts.t,
                            r.gates.t, load.t, 0.0f, 0.0f, dlogits.t, dx.t, dweight.t));
  double *want_dx = op_doubles(s.t * s.d), *want_dweight = op_doubles(s.e * s.d);
  op_read(&dlogits);
  for (int64_t t = 0; t < s.t; t++)
    for (int64_t j = 0; j < s.e; j++)
      for (int64_t c = 0; c < s.d; c++) {
        want_dx[t * s.d + c] += dlogits.v[t * s.e + j] * r.weight.v[j * s.d + c];
        want_dweight[j * s.d + c] += dlogits.v[t * s.e + j] * r.x.v[t * s.d + c];
      }
  op_close(dx, want_dx, op_tolerance(act));
  op_close(dweight, want_dweight, 1e-6);
}

static void backward_products(moe_device *dev, moe_dtype act) {
  const shape list[] = {{75, 530, 16, 4, 1, false},
                        {75, 536, 16, 4, 1, false},
                        {300, 264, 17, 3, 1, false},
                        {37, 24, 64, 8, 1, false},
                        {70, 40, 65, 6, 1, false}};
  for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) check_products(dev, act, list[i]);
}
Test(router, gradient_covers_every_token_and_column) {
  op_each(backward_products);
}
