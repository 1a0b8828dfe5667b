/* Checked entry points of the mixture of experts: router, permutation, expert products.
 *
 * The same pattern as ops.c. Expert buffers are looked at only in the rows that offsets says are in
 * use; the rest may hold anything. */
#include "kernels/check.h"
#include "kernels/ops.h"

/* ---- router ------------------------------------------------------------------------------ */

/* What both directions have: tokens, and where the router sent them. */
static moe_status check_choices(const char *op, moe_tensor x, moe_tensor weight, moe_tensor probs,
                                moe_tensor lse, moe_tensor experts, moe_tensor gates) {
  MOE_TRY(moe_check_2d(op, "x", x, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_2d(op, "weight", weight, MOE_IS_F32, MOE_ANY, x.shape[1]));
  int64_t tokens = x.shape[0], e = weight.shape[0];
  MOE_TRY(moe_check_2d(op, "probs", probs, MOE_IS_F32, tokens, e));
  MOE_TRY(moe_check_1d(op, "lse", lse, MOE_IS_F32, tokens));
  MOE_TRY(moe_check_2d(op, "experts", experts, MOE_IS_I32, tokens, MOE_ANY));
  int64_t k = experts.shape[1];
  MOE_TRY(moe_check_rule(op, k >= 1 && k <= e, "K must be from 1 to the number of experts"));
  return moe_check_2d(op, "gates", gates, MOE_IS_F32, tokens, k);
}

/* What a router is given and gives. */
typedef struct {
  moe_tensor weight, bias, probs, lse, experts, gates, stats;
} routing;

static moe_status check_routing(moe_tensor x, const routing *r) {
  const char *op = "router";
  int64_t tokens = x.shape[0], e = r->weight.shape[0];
  MOE_TRY(check_choices(op, x, r->weight, r->probs, r->lse, r->experts, r->gates));
  if (moe_tensor_present(r->bias)) MOE_TRY(moe_check_1d(op, "bias", r->bias, MOE_IS_F32, e));
  MOE_TRY(moe_check_2d(op, "stats", r->stats, MOE_IS_F32, MOE_ANY, 2 * e + 1));
  return moe_check_rule(op, r->stats.shape[0] > 0 && tokens % r->stats.shape[0] == 0,
                        "the tokens must divide evenly into the groups of stats");
}

static moe_status check_routed(moe_device *dev, const routing *r) {
  const char *op = "router";
  MOE_TRY(moe_check_finite(dev, op, "lse", r->lse));
  MOE_TRY(moe_check_finite(dev, op, "probs", r->probs));
  MOE_TRY(moe_check_finite(dev, op, "gates", r->gates));
  return moe_check_finite(dev, op, "stats", r->stats);
}

moe_status moe_router(moe_device *dev, moe_tensor x, moe_tensor weight, moe_tensor bias,
                      moe_tensor probs, moe_tensor lse, moe_tensor experts, moe_tensor gates,
                      moe_tensor stats) {
  routing r = {weight, bias, probs, lse, experts, gates, stats};
  MOE_TRY(check_routing(x, &r));
  MOE_TRY(dev->backend->router(dev, x, weight, bias, probs, lse, experts, gates, stats));
  return check_routed(dev, &r);
}

moe_status moe_norm_router(moe_device *dev, moe_norm n, moe_tensor weight, moe_tensor bias,
                           moe_tensor probs, moe_tensor lse, moe_tensor experts, moe_tensor gates,
                           moe_tensor stats) {
  routing r = {weight, bias, probs, lse, experts, gates, stats};
  bool done = false;
  MOE_TRY(moe_check_norm(n));
  MOE_TRY(check_routing(n.out, &r));
  if (dev->backend->norm_router)
    MOE_TRY(
        dev->backend->norm_router(dev, n, weight, bias, probs, lse, experts, gates, stats, &done));
  if (done) return check_routed(dev, &r);
  MOE_TRY(moe_rms_norm_of(dev, n));
  return moe_router(dev, n.out, weight, bias, probs, lse, experts, gates, stats);
}

moe_status moe_router_drop(moe_device *dev, moe_tensor probs, int64_t capacity, moe_tensor experts,
                           moe_tensor gates, moe_tensor dropped) {
  const char *op = "router_drop";
  MOE_TRY(moe_check_2d(op, "probs", probs, MOE_IS_F32, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_2d(op, "experts", experts, MOE_IS_I32, probs.shape[0], MOE_ANY));
  MOE_TRY(moe_check_2d(op, "gates", gates, MOE_IS_F32, probs.shape[0], experts.shape[1]));
  MOE_TRY(moe_check_1d(op, "dropped", dropped, MOE_IS_F32, 1));
  MOE_TRY(moe_check_rule(op, capacity >= 0, "capacity must not be negative"));
  return dev->backend->router_drop(dev, probs, capacity, experts, gates, dropped);
}

/* What a router's gradient is made of, and what it makes. */
typedef struct {
  moe_tensor dgates, x, weight, probs, lse, experts, gates, load, dlogits, dx, dweight;
} routing_gradient;

static moe_status check_routing_gradient(const routing_gradient *r) {
  const char *op = "router_backward";
  int64_t tokens = r->x.shape[0], e = r->weight.shape[0];
  MOE_TRY(check_choices(op, r->x, r->weight, r->probs, r->lse, r->experts, r->gates));
  MOE_TRY(moe_check_2d(op, "dgates", r->dgates, MOE_IS_F32, tokens, r->experts.shape[1]));
  MOE_TRY(moe_check_2d(op, "load", r->load, MOE_IS_F32, MOE_ANY, e));
  MOE_TRY(moe_check_rule(op, r->load.shape[0] > 0 && tokens % r->load.shape[0] == 0,
                         "the tokens must divide evenly into the groups of load"));
  MOE_TRY(moe_check_2d(op, "dlogits", r->dlogits, MOE_IS_F32, tokens, e));
  MOE_TRY(moe_check_2d(op, "dx", r->dx, moe_same_type(r->x), tokens, r->x.shape[1]));
  return moe_check_2d(op, "dweight", r->dweight, MOE_IS_F32, e, r->x.shape[1]);
}

moe_status moe_router_backward(moe_device *dev, moe_tensor dgates, moe_tensor x, moe_tensor weight,
                               moe_tensor probs, moe_tensor lse, moe_tensor experts,
                               moe_tensor gates, moe_tensor load, float aux_scale, float z_scale,
                               moe_tensor dlogits, moe_tensor dx, moe_tensor dweight) {
  const char *op = "router_backward";
  routing_gradient r = {dgates, x, weight, probs, lse, experts, gates, load, dlogits, dx, dweight};
  MOE_TRY(check_routing_gradient(&r));
  MOE_TRY(dev->backend->router_backward(dev, dgates, x, weight, probs, lse, experts, gates, load,
                                        aux_scale, z_scale, dlogits, dx, dweight));
  MOE_TRY(moe_check_finite(dev, op, "dlogits", dlogits));
  MOE_TRY(moe_check_finite(dev, op, "dx", dx));
  return moe_check_finite(dev, op, "dweight", dweight);
}

moe_status moe_router_norm_backward(moe_device *dev, moe_tensor dgates, moe_tensor x,
                                    moe_tensor weight, moe_tensor probs, moe_tensor lse,
                                    moe_tensor experts, moe_tensor gates, moe_tensor load,
                                    float aux_scale, float z_scale, moe_tensor dlogits,
                                    moe_tensor dweight, moe_norm_gradient n) {
  const char *op = "router_norm_backward";
  routing_gradient r = {dgates, x,    weight,  probs,  lse,    experts,
                        gates,  load, dlogits, n.dout, dweight};
  bool done = false;
  MOE_TRY(check_routing_gradient(&r));
  MOE_TRY(moe_check_norm_gradient(n));
  if (dev->backend->router_norm_backward)
    MOE_TRY(dev->backend->router_norm_backward(dev, dgates, x, weight, probs, lse, experts, gates,
                                               load, aux_scale, z_scale, dlogits, dweight, n,
                                               &done));
  if (!done) {
    MOE_TRY(moe_router_backward(dev, dgates, x, weight, probs, lse, experts, gates, load, aux_scale,
                                z_scale, dlogits, n.dout, dweight));
    return moe_rms_norm_backward(dev, n.dout, n.x, n.gain, n.rstd, n.dx, n.dgain);
  }
  MOE_TRY(moe_check_finite(dev, op, "dlogits", dlogits));
  MOE_TRY(moe_check_finite(dev, op, "dweight", dweight));
  MOE_TRY(moe_check_finite(dev, op, "dx", n.dx));
  return moe_check_finite(dev, op, "dgain", n.dgain);
}

/* ---- permute ----------------------------------------------------------------------------- */

moe_status moe_permute_plan(moe_device *dev, moe_tensor experts, int64_t pad, moe_tensor offsets,
                            moe_tensor pair, moe_tensor slot) {
  const char *op = "permute_plan";
  MOE_TRY(moe_check_2d(op, "experts", experts, MOE_IS_I32, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_1d(op, "offsets", offsets, MOE_IS_I32, MOE_ANY));
  MOE_TRY(moe_check_1d(op, "pair", pair, MOE_IS_I32, MOE_ANY));
  MOE_TRY(moe_check_2d(op, "slot", slot, MOE_IS_I32, experts.shape[0], experts.shape[1]));
  MOE_TRY(moe_check_rule(op, pad >= 1 && (pad & (pad - 1)) == 0, "pad must be a power of 2"));
  int64_t rows = experts.shape[0], k = experts.shape[1], e = offsets.shape[0] - 1;
  MOE_TRY(moe_check_rule(op, e >= 0, "offsets must have one entry more than there are experts"));
  int64_t most = rows * (k < e ? k : e) + e * (pad - 1);
  MOE_TRY(moe_check_rule(op, pair.shape[0] >= most,
                         "pair must hold R * min(K, e) + e * (pad - 1) rows, or some routing "
                         "would not fit"));
  MOE_TRY(moe_check_rule(op, pair.shape[0] <= INT32_MAX && rows * k <= INT32_MAX,
                         "rows are counted in 32 bits: lower the micro-batch"));
  return dev->backend->permute_plan(dev, experts, pad, offsets, pair, slot);
}

moe_status moe_permute_window(moe_device *dev, moe_tensor offsets, int64_t begin, int64_t rows,
                              moe_tensor out) {
  MOE_TRY(moe_check_1d("permute_window", "offsets", offsets, MOE_IS_I32, MOE_ANY));
  MOE_TRY(moe_check_1d("permute_window", "out", out, MOE_IS_I32, offsets.shape[0]));
  MOE_TRY(moe_check_rule("permute_window",
                         begin >= 0 && rows >= 0 && begin <= INT32_MAX && rows <= INT32_MAX,
                         "begin and rows must be from 0 to 2^31 - 1"));
  return dev->backend->permute_window(dev, offsets, begin, rows, out);
}

moe_status moe_gather_rows(moe_device *dev, moe_tensor src, moe_tensor pair, int64_t group,
                           moe_tensor out) {
  MOE_TRY(moe_check_2d("gather_rows", "src", src, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_1d("gather_rows", "pair", pair, MOE_IS_I32, MOE_ANY));
  MOE_TRY(moe_check_2d("gather_rows", "out", out, moe_same_type(src), pair.shape[0], src.shape[1]));
  MOE_TRY(moe_check_rule("gather_rows", group >= 1, "group must be at least 1"));
  MOE_TRY(dev->backend->gather_rows(dev, src, pair, group, out));
  return moe_check_finite(dev, "gather_rows", "out", out);
}

moe_status moe_gather_gates(moe_device *dev, moe_tensor values, moe_tensor pair, moe_tensor out) {
  MOE_TRY(moe_check_2d("gather_gates", "values", values, MOE_IS_F32, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_1d("gather_gates", "pair", pair, MOE_IS_I32, MOE_ANY));
  MOE_TRY(moe_check_1d("gather_gates", "out", out, MOE_IS_F32, pair.shape[0]));
  MOE_TRY(dev->backend->gather_gates(dev, values, pair, out));
  return moe_check_finite(dev, "gather_gates", "out", out);
}

static moe_status check_window(const char *op, int64_t begin, int beta) {
  MOE_TRY(moe_check_rule(op, begin >= 0 && begin <= INT32_MAX, "begin must not be negative"));
  return moe_check_rule(op, beta == 0 || beta == 1, "beta must be 0 or 1");
}

moe_status moe_combine_rows(moe_device *dev, moe_tensor src, moe_tensor slot, int64_t begin,
                            int beta, moe_tensor out) {
  MOE_TRY(moe_check_2d("combine_rows", "src", src, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_2d("combine_rows", "slot", slot, MOE_IS_I32, MOE_ANY, MOE_ANY));
  MOE_TRY(
      moe_check_2d("combine_rows", "out", out, moe_same_type(src), slot.shape[0], src.shape[1]));
  MOE_TRY(check_window("combine_rows", begin, beta));
  MOE_TRY(dev->backend->combine_rows(dev, src, slot, begin, beta, out));
  return moe_check_finite(dev, "combine_rows", "out", out);
}

moe_status moe_combine_norm(moe_device *dev, moe_tensor src, moe_tensor slot, moe_norm n) {
  const char *op = "combine_norm";
  bool done = false;
  MOE_TRY(moe_check_norm(n));
  MOE_TRY(moe_check_2d(op, "src", src, moe_same_type(n.x), MOE_ANY, n.x.shape[1]));
  MOE_TRY(moe_check_2d(op, "slot", slot, MOE_IS_I32, n.x.shape[0], MOE_ANY));
  MOE_TRY(moe_check_rule(op,
                         moe_tensor_present(n.residual) && n.residual.data != n.x.data &&
                             n.residual.data != n.sum.data,
                         "there must be a residual, for itself"));
  if (dev->backend->combine_norm) MOE_TRY(dev->backend->combine_norm(dev, src, slot, n, &done));
  if (!done) {
    MOE_TRY(moe_combine_rows(dev, src, slot, 0, 0, n.residual));
    return moe_rms_norm_of(dev, n);
  }
  MOE_TRY(moe_check_finite(dev, op, "sum", n.sum));
  MOE_TRY(moe_check_finite(dev, op, "rstd", n.rstd));
  return moe_check_finite(dev, op, "out", n.out);
}

moe_status moe_combine_gates(moe_device *dev, moe_tensor src, moe_tensor slot, int64_t begin,
                             int beta, moe_tensor out) {
  MOE_TRY(moe_check_1d("combine_gates", "src", src, MOE_IS_F32, MOE_ANY));
  MOE_TRY(moe_check_2d("combine_gates", "slot", slot, MOE_IS_I32, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_2d("combine_gates", "out", out, MOE_IS_F32, slot.shape[0], slot.shape[1]));
  MOE_TRY(check_window("combine_gates", begin, beta));
  MOE_TRY(dev->backend->combine_gates(dev, src, slot, begin, beta, out));
  return moe_check_finite(dev, "combine_gates", "out", out);
}

/* ---- experts ----------------------------------------------------------------------------- */

/* w13 may come as [e, 2 F, D], as it is stored and reduced; the slots see [e, 2, F, D]. */
static moe_tensor split_w13(moe_tensor w13) {
  if (w13.dims != 3 || w13.shape[1] % 2 != 0) return w13;
  moe_tensor split = {w13.data, w13.dtype, 4, {w13.shape[0], 2, w13.shape[1] / 2, w13.shape[2]}};
  return split;
}

moe_status moe_expert_up(moe_device *dev, moe_tensor x, moe_tensor offsets, moe_tensor w13,
                         moe_tensor gates, moe_gu_kind kind, moe_tensor gu, moe_tensor a) {
  const char *op = "expert_up";
  w13 = split_w13(w13);
  MOE_TRY(moe_check_2d(op, "x", x, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_4d(op, "w13", w13, moe_same_type(x), MOE_ANY, 2, MOE_ANY, x.shape[1]));
  int64_t rows = x.shape[0], ffn = w13.shape[2];
  MOE_TRY(moe_check_1d(op, "offsets", offsets, MOE_IS_I32, w13.shape[0] + 1));
  MOE_TRY(moe_check_1d(op, "gates", gates, MOE_IS_F32, rows));
  MOE_TRY(moe_check_2d(op, "gu", gu, moe_same_type(x), rows, 2 * ffn));
  MOE_TRY(moe_check_2d(op, "a", a, moe_same_type(x), rows, ffn));
  MOE_TRY(dev->backend->expert_up(dev, x, offsets, w13, gates, kind, gu, a));
  MOE_TRY(moe_check_finite_rows(dev, op, "gu", gu, offsets));
  return moe_check_finite_rows(dev, op, "a", a, offsets);
}

moe_status moe_expert_down(moe_device *dev, moe_tensor a, moe_tensor offsets, moe_tensor w2,
                           moe_tensor y) {
  const char *op = "expert_down";
  MOE_TRY(moe_check_2d(op, "a", a, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_3d(op, "w2", w2, moe_same_type(a), MOE_ANY, MOE_ANY, a.shape[1]));
  MOE_TRY(moe_check_1d(op, "offsets", offsets, MOE_IS_I32, w2.shape[0] + 1));
  MOE_TRY(moe_check_2d(op, "y", y, moe_same_type(a), a.shape[0], w2.shape[1]));
  MOE_TRY(dev->backend->expert_down(dev, a, offsets, w2, y));
  return moe_check_finite_rows(dev, op, "y", y, offsets);
}

moe_status moe_expert_down_backward(moe_device *dev, moe_tensor dy, moe_tensor offsets,
                                    moe_tensor w2, moe_tensor gates, moe_gu_kind kind,
                                    moe_tensor gu, moe_tensor a, moe_tensor dgates) {
  const char *op = "expert_down_backward";
  MOE_TRY(moe_check_2d(op, "dy", dy, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_3d(op, "w2", w2, moe_same_type(dy), MOE_ANY, dy.shape[1], MOE_ANY));
  int64_t rows = dy.shape[0], ffn = w2.shape[2];
  MOE_TRY(moe_check_1d(op, "offsets", offsets, MOE_IS_I32, w2.shape[0] + 1));
  MOE_TRY(moe_check_1d(op, "gates", gates, MOE_IS_F32, rows));
  MOE_TRY(moe_check_2d(op, "gu", gu, moe_same_type(dy), rows, 2 * ffn));
  MOE_TRY(moe_check_2d(op, "a", a, moe_same_type(dy), rows, ffn));
  if (kind == MOE_GU_SLOPES)
    MOE_TRY(moe_check_rule(op, !moe_tensor_present(dgates),
                           "dgates must be absent where gu holds slopes"));
  else
    MOE_TRY(moe_check_1d(op, "dgates", dgates, MOE_IS_F32, rows));
  const char *a_begin = a.data, *gu_begin = gu.data;
  MOE_TRY(moe_check_rule(
      op, a_begin + moe_tensor_bytes(a) <= gu_begin || gu_begin + moe_tensor_bytes(gu) <= a_begin,
      "a must not overlap gu"));
  MOE_TRY(dev->backend->expert_down_backward(dev, dy, offsets, w2, gates, kind, gu, a, dgates));
  MOE_TRY(moe_check_finite_rows(dev, op, "gu", gu, offsets));
  if (kind == MOE_GU_SLOPES) return MOE_OK;
  MOE_TRY(moe_check_finite_rows(dev, op, "a", a, offsets));
  return moe_check_finite_rows(dev, op, "dgates", dgates, offsets);
}

static moe_status check_gates_backward(moe_tensor dy, moe_tensor y, moe_tensor slot,
                                       moe_tensor gates, moe_tensor dgates) {
  const char *op = "gates_backward";
  MOE_TRY(moe_check_2d(op, "dy", dy, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_2d(op, "y", y, moe_same_type(dy), MOE_ANY, dy.shape[1]));
  MOE_TRY(moe_check_2d(op, "slot", slot, MOE_IS_I32, dy.shape[0], MOE_ANY));
  MOE_TRY(moe_check_2d(op, "gates", gates, MOE_IS_F32, slot.shape[0], slot.shape[1]));
  return moe_check_2d(op, "dgates", dgates, MOE_IS_F32, slot.shape[0], slot.shape[1]);
}

moe_status moe_gates_backward(moe_device *dev, moe_tensor dy, moe_tensor y, moe_tensor slot,
                              moe_tensor gates, moe_tensor dgates) {
  MOE_TRY(check_gates_backward(dy, y, slot, gates, dgates));
  MOE_TRY(dev->backend->gates_backward(dev, dy, y, slot, gates, dgates));
  return moe_check_finite(dev, "gates_backward", "dgates", dgates);
}

moe_status moe_gather_backward(moe_device *dev, moe_tensor dy, moe_tensor pair, moe_tensor y,
                               moe_tensor slot, moe_tensor gates, moe_tensor out,
                               moe_tensor dgates) {
  const char *op = "gather_backward";
  bool done = false;
  MOE_TRY(check_gates_backward(dy, y, slot, gates, dgates));
  MOE_TRY(moe_check_2d(op, "out", out, moe_same_type(dy), y.shape[0], dy.shape[1]));
  MOE_TRY(moe_check_1d(op, "pair", pair, MOE_IS_I32, y.shape[0]));
  MOE_TRY(moe_check_rule(op, out.data != dy.data && out.data != y.data,
                         "out must be neither dy nor y"));
  if (dev->backend->gather_backward)
    MOE_TRY(dev->backend->gather_backward(dev, dy, pair, y, slot, gates, out, dgates, &done));
  if (!done) {
    MOE_TRY(moe_gather_rows(dev, dy, pair, slot.shape[1], out));
    return moe_gates_backward(dev, dy, y, slot, gates, dgates);
  }
  MOE_TRY(moe_check_finite(dev, op, "out", out));
  return moe_check_finite(dev, op, "dgates", dgates);
}

moe_status moe_expert_up_backward(moe_device *dev, moe_tensor dgu, moe_tensor offsets,
                                  moe_tensor w13, moe_tensor dx) {
  const char *op = "expert_up_backward";
  w13 = split_w13(w13);
  MOE_TRY(moe_check_2d(op, "dgu", dgu, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_4d(op, "w13", w13, moe_same_type(dgu), MOE_ANY, 2, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_rule(op, dgu.shape[1] == 2 * w13.shape[2],
                         "dgu must have 2 F columns, for F rows in each half of w13"));
  MOE_TRY(moe_check_1d(op, "offsets", offsets, MOE_IS_I32, w13.shape[0] + 1));
  MOE_TRY(moe_check_2d(op, "dx", dx, moe_same_type(dgu), dgu.shape[0], w13.shape[3]));
  MOE_TRY(dev->backend->expert_up_backward(dev, dgu, offsets, w13, dx));
  return moe_check_finite_rows(dev, op, "dx", dx, offsets);
}

moe_status moe_expert_weight_grad(moe_device *dev, moe_tensor left, moe_tensor right,
                                  moe_tensor offsets, int accumulate, moe_tensor dw,
                                  moe_tensor squares) {
  const char *op = "expert_weight_grad";
  MOE_TRY(moe_check_2d(op, "left", left, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_2d(op, "right", right, moe_same_type(left), left.shape[0], MOE_ANY));
  int types = left.dtype == MOE_BF16 ? MOE_IS_STATE : MOE_IS_F32;
  MOE_TRY(moe_check_3d(op, "dw", dw, types, MOE_ANY, left.shape[1], right.shape[1]));
  MOE_TRY(moe_check_1d(op, "offsets", offsets, MOE_IS_I32, dw.shape[0] + 1));
  MOE_TRY(moe_check_rule(op, accumulate == 0 || accumulate == 1, "accumulate must be 0 or 1"));
  if (moe_tensor_present(squares)) MOE_TRY(moe_check_1d(op, "squares", squares, MOE_IS_F64, 1));
  MOE_TRY(dev->backend->expert_weight_grad(dev, left, right, offsets, accumulate, dw, squares));
  return moe_check_finite(dev, op, "dw", dw);
}

int64_t moe_expert_scratch(moe_device *dev, int64_t rows, int64_t hidden, int64_t ffn,
                           moe_dtype dtype) {
  return dev->backend->expert_scratch(dev, rows, hidden, ffn, dtype);
}

moe_status moe_experts_decode(moe_device *dev, moe_tensor x, moe_tensor experts, moe_tensor gates,
                              int64_t first, moe_tensor w13, moe_tensor w2, moe_tensor hidden,
                              moe_tensor out) {
  const char *op = "experts_decode";
  w13 = split_w13(w13);
  MOE_TRY(moe_check_2d(op, "x", x, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  int64_t tokens = x.shape[0], width = x.shape[1];
  int act = moe_same_type(x);
  MOE_TRY(moe_check_2d(op, "experts", experts, MOE_IS_I32, tokens, MOE_ANY));
  int64_t k = experts.shape[1];
  MOE_TRY(moe_check_2d(op, "gates", gates, MOE_IS_F32, tokens, k));
  MOE_TRY(moe_check_4d(op, "w13", w13, act, MOE_ANY, 2, MOE_ANY, width));
  int64_t count = w13.shape[0], ffn = w13.shape[2];
  MOE_TRY(moe_check_3d(op, "w2", w2, act, count, width, ffn));
  MOE_TRY(moe_check_2d(op, "hidden", hidden, act, tokens * k, ffn));
  if (moe_decodes_apart(experts, out))
    MOE_TRY(moe_check_2d(op, "out", out, MOE_IS_F32, tokens * k, width));
  else
    MOE_TRY(moe_check_2d(op, "out", out, act, tokens, width));
  MOE_TRY(moe_check_rule(op, first >= 0 && first <= INT32_MAX - count,
                         "first must be the number of an expert"));
  MOE_TRY(moe_check_rule(op, tokens * k <= INT32_MAX && 2 * count * ffn <= INT32_MAX,
                         "token-expert pairs and rows of weights are counted in 32 bits"));
  if (tokens == 0 || width == 0) return MOE_OK;
  if (k == 0 || count == 0 || ffn == 0) return moe_zero(dev, out);
  MOE_TRY(dev->backend->experts_decode(dev, x, experts, gates, first, w13, w2, hidden, out));
  return moe_check_finite(dev, op, "out", out);
}

moe_status moe_sum_choices(moe_device *dev, moe_tensor terms, moe_tensor out) {
  const char *op = "sum_choices";
  MOE_TRY(moe_check_2d(op, "out", out, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_2d(op, "terms", terms, moe_same_type(out) | MOE_IS_F32, MOE_ANY, out.shape[1]));
  if (moe_tensor_count(out) == 0) return MOE_OK;
  MOE_TRY(moe_check_rule(op, terms.shape[0] % out.shape[0] == 0,
                         "the rows of terms must be a multiple of the rows of out"));
  MOE_TRY(dev->backend->sum_choices(dev, terms, out));
  return moe_check_finite(dev, op, "out", out);
}
