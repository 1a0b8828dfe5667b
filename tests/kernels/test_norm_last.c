/* Operations that end with a norm or its gradient, in one kernel where there is one, against the
 * two operations that they are made of. */
#include <criterion/criterion.h>

#include "tests/support/op_check.h"

static const double eps = 1e-5;

typedef struct {
  int64_t tokens, width, experts, k, groups, dropped; /* each so many-th assignment; 0: none */
} shape;

/* A norm and the router of what it made, and the gradients of both. */
typedef struct {
  op_tensor x, gain, out, rstd;
  op_tensor weight, probs, lse, experts, gates, load;
  op_tensor dgates, dlogits, dweight, dout, dx, dgain;
} layer;

static void drop(moe_device *dev, layer *l, int64_t each) {
  op_read(&l->experts);
  op_read(&l->gates);
  for (int64_t i = 0; i < l->experts.count; i += each) l->experts.v[i] = -1.0, l->gates.v[i] = 0.0;
  moe_tensor e = l->experts.t, g = l->gates.t;
  l->experts = op_values(dev, "experts", MOE_I32, OP_SHAPE(e.shape[0], e.shape[1]), l->experts.v);
  l->gates = op_values(dev, "gates", MOE_F32, OP_SHAPE(g.shape[0], g.shape[1]), l->gates.v);
}

/* Each call makes the same numbers, and outputs of its own. */
static layer make(moe_device *dev, moe_dtype act, shape s) {
  int64_t t = s.tokens, d = s.width, e = s.experts;
  layer l = {.x = op_random(dev, "x", act, OP_SHAPE(t, d), 2.0),
             .gain = op_random(dev, "gain", MOE_F32, OP_SHAPE(d), 1.0),
             .out = op_output(dev, "out", act, OP_SHAPE(t, d)),
             .rstd = op_output(dev, "rstd", MOE_F32, OP_SHAPE(t)),
             .weight = op_random(dev, "weight", MOE_F32, OP_SHAPE(e, d), 0.2),
             .probs = op_output(dev, "probs", MOE_F32, OP_SHAPE(t, e)),
             .lse = op_output(dev, "lse", MOE_F32, OP_SHAPE(t)),
             .experts = op_output(dev, "experts", MOE_I32, OP_SHAPE(t, s.k)),
             .gates = op_output(dev, "gates", MOE_F32, OP_SHAPE(t, s.k)),
             .load = op_random(dev, "load", MOE_F32, OP_SHAPE(s.groups, e), 3.0),
             .dgates = op_random(dev, "dgates", MOE_F32, OP_SHAPE(t, s.k), 1.0),
             .dlogits = op_output(dev, "dlogits", MOE_F32, OP_SHAPE(t, e)),
             .dweight = op_random(dev, "dweight", MOE_F32, OP_SHAPE(e, d), 1.0),
             .dout = op_random(dev, "dout", act, OP_SHAPE(t, d), 1.0),
             .dx = op_random(dev, "dx", act, OP_SHAPE(t, d), 1.0),
             .dgain = op_random(dev, "dgain", MOE_F32, OP_SHAPE(d), 1.0)};
  op_tensor stats = op_output(dev, "stats", MOE_F32, OP_SHAPE(s.groups, 2 * e + 1));
  op_ok(moe_rms_norm(dev, l.x.t, moe_tensor_none(), l.gain.t, eps, moe_tensor_none(), l.out.t,
                     l.rstd.t));
  op_ok(moe_router(dev, l.out.t, l.weight.t, moe_tensor_none(), l.probs.t, l.lse.t, l.experts.t,
                   l.gates.t, stats.t));
  if (s.dropped) drop(dev, &l, s.dropped);
  return l;
}

static moe_norm_gradient norm_of(const layer *l) {
  return (moe_norm_gradient){l->dout.t, l->x.t, l->gain.t, l->rstd.t, l->dx.t, l->dgain.t};
}

static moe_status joint(moe_device *dev, const layer *l) {
  return moe_router_norm_backward(dev, l->dgates.t, l->out.t, l->weight.t, l->probs.t, l->lse.t,
                                  l->experts.t, l->gates.t, l->load.t, 0.01f, 0.02f, l->dlogits.t,
                                  l->dweight.t, norm_of(l));
}

static void check(moe_device *dev, moe_dtype act, shape s) {
  layer one = make(dev, act, s), two = make(dev, act, s);
  moe_norm_gradient n = norm_of(&two);
  op_ok(joint(dev, &one));
  op_ok(moe_router_backward(dev, two.dgates.t, two.out.t, two.weight.t, two.probs.t, two.lse.t,
                            two.experts.t, two.gates.t, two.load.t, 0.01f, 0.02f, two.dlogits.t,
                            n.dout, two.dweight.t));
  op_ok(moe_rms_norm_backward(dev, n.dout, n.x, n.gain, n.rstd, n.dx, n.dgain));
  op_equal(one.dlogits, op_read(&two.dlogits));
  op_close(one.dweight, op_read(&two.dweight), op_sum_tolerance(dev, act));
  op_close(one.dx, op_read(&two.dx), op_tolerance(act) / 10.0); /* few roundings differ */
  op_close(one.dgain, op_read(&two.dgain), 1e-6);
}

/* Tiles and blocks of tokens that are full and not, one warp's columns to the most, and what the
 * one kernel does not take: other widths, more experts. */
static void shapes(moe_device *dev, moe_dtype act) {
  const shape list[] = {{1, 64, 4, 2, 1, 0},     {16, 64, 1, 1, 1, 0},   {127, 128, 16, 4, 1, 0},
                        {130, 768, 16, 4, 2, 3}, {300, 256, 7, 3, 3, 0}, {257, 576, 9, 9, 1, 2},
                        {40, 72, 8, 2, 2, 0},    {33, 832, 16, 4, 1, 0}, {48, 64, 17, 4, 1, 5}};
  for (size_t i = 0; i < sizeof list / sizeof *list; i++) check(dev, act, list[i]);
}
Test(norm_last, the_routers_gradient_and_the_norms_are_those_one_after_the_other) {
  op_each(shapes);
}

/* More tokens than the partial sums of one launch can hold on a GPU. */
static void long_text(moe_device *dev) {
  if (moe_device_is_host(dev)) return;
  check(dev, MOE_BF16, (shape){45000, 768, 16, 4, 1, 0});
}
Test(norm_last, many_tokens_are_summed_in_several_launches) {
  op_each_device(long_text);
}

static void refusals(moe_device *dev) {
  layer l = make(dev, MOE_F32, (shape){4, 8, 3, 2, 1, 0});
  op_tensor narrow = op_output(dev, "narrow", MOE_F32, OP_SHAPE(7));
  l.dgain = narrow;
  op_refuses(MOE_INVALID, "dgain", joint(dev, &l));
}
Test(norm_last, refuses_a_norm_of_another_width) {
  op_each_device(refusals);
}

/* ---- sums of experts' rows, then a norm ------------------------------------------------------ */

/* Each token's slots are different rows, of which some name none and two thirds are left over. */
static op_tensor draw_slots(moe_device *dev, int64_t tokens, int64_t k) {
  int32_t *slots = op_int32s(tokens * k);
  for (int64_t i = 0; i < tokens * k; i++)
    slots[i] = op_pick("none", i, 5) == 0 ? -1 : (int32_t)(i * 3 + op_pick("slot", i, 3));
  return op_ints(dev, "slot", OP_SHAPE(tokens, k), slots);
}

static void check_sum(moe_device *dev, moe_dtype act, int64_t tokens, int64_t width, int64_t k) {
  op_tensor src = op_random(dev, "src", act, OP_SHAPE(3 * tokens * k, width), 1.0);
  op_tensor slot = draw_slots(dev, tokens, k),
            gain = op_random(dev, "gain", MOE_F32, OP_SHAPE(width), 1.0);
  op_tensor x = op_random(dev, "x", act, OP_SHAPE(tokens, width), 2.0);
  op_tensor sum[2], out[2], rstd[2], residual[2];
  moe_norm n[2];
  for (int i = 0; i < 2; i++) {
    residual[i] = op_output(dev, "residual", act, OP_SHAPE(tokens, width));
    sum[i] = op_output(dev, "sum", act, OP_SHAPE(tokens, width));
    out[i] = op_output(dev, "out", act, OP_SHAPE(tokens, width));
    rstd[i] = op_output(dev, "rstd", MOE_F32, OP_SHAPE(tokens));
    n[i] = (moe_norm){x.t, residual[i].t, gain.t, eps, sum[i].t, out[i].t, rstd[i].t};
  }
  op_ok(moe_combine_norm(dev, src.t, slot.t, n[0]));
  op_ok(moe_combine_rows(dev, src.t, slot.t, 0, 0, n[1].residual));
  op_ok(moe_rms_norm_of(dev, n[1]));
  op_equal(sum[0], op_read(&sum[1]));
  op_close(rstd[0], op_read(&rstd[1]), 1e-6);
  op_close(out[0], op_read(&out[1]), op_tolerance(act) / 10.0);
}

static void sums(moe_device *dev, moe_dtype act) {
  const int64_t list[][3] = {{1, 8, 1},     {37, 72, 3},  {9, 256, 4},  {20, 768, 4},
                             {33, 1000, 5}, {5, 1024, 9}, {7, 1032, 2}, {12, 77, 4}};
  for (size_t i = 0; i < sizeof list / sizeof *list; i++)
    check_sum(dev, act, list[i][0], list[i][1], list[i][2]);
}
Test(norm_last, the_norm_of_summed_rows_is_their_sum_and_the_norm) {
  op_each(sums);
}

static void shared_residual(moe_device *dev) {
  op_tensor x = op_random(dev, "x", MOE_F32, OP_SHAPE(4, 8), 1.0);
  op_tensor gain = op_random(dev, "gain", MOE_F32, OP_SHAPE(8), 1.0);
  op_tensor rstd = op_output(dev, "rstd", MOE_F32, OP_SHAPE(4));
  op_tensor out = op_output(dev, "out", MOE_F32, OP_SHAPE(4, 8));
  moe_norm n = {x.t, x.t, gain.t, eps, out.t, out.t, rstd.t};
  op_refuses(MOE_INVALID, "combine_norm: there must be a residual",
             moe_combine_norm(dev, x.t, draw_slots(dev, 4, 1).t, n));
}
Test(norm_last, a_norm_of_summed_rows_refuses_a_residual_that_is_not_its_own) {
  op_each_device(shared_residual);
}
