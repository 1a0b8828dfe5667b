/* CUDA against the CPU at sizes that reach what small tests do not: the mixture of experts. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/both.h"

static const moe_dtype types[] = {MOE_F32, MOE_BF16, MOE_F16};

static double rounding(moe_dtype type) {
  return type == MOE_BF16 ? 3e-3 : type == MOE_F16 ? 4e-4 : 2e-6;
}

/* ---- router -------------------------------------------------------------------------------- */

typedef struct {
  int64_t t, d, e, k, groups;
} router_shape;

typedef struct {
  both x, weight, bias, probs, lse, experts, gates, stats;
} router;

static router route(moe_dtype act, router_shape n, bool bias) {
  router r = {both_random("x", act, SHAPE(n.t, n.d), 1.0),
              both_random("weight", MOE_F32, SHAPE(n.e, n.d), 0.05),
              bias ? both_random("bias", MOE_F32, SHAPE(n.e), 0.1) : both_none(),
              both_output("probs", MOE_F32, SHAPE(n.t, n.e)),
              both_output("lse", MOE_F32, SHAPE(n.t)),
              both_output("experts", MOE_I32, SHAPE(n.t, n.k)),
              both_output("gates", MOE_F32, SHAPE(n.t, n.k)),
              both_output("stats", MOE_F32, SHAPE(n.groups, 2 * n.e + 1))};
  BOTH(moe_router(dev, r.x.t[s], r.weight.t[s], r.bias.t[s], r.probs.t[s], r.lse.t[s],
                  r.experts.t[s], r.gates.t[s], r.stats.t[s]));
  return r;
}

/* A choice may differ where two probabilities agree to the last bits: of the CPU's experts of each
 * token and the GPU's, all but one in ten thousand must be the same. */
static void choices_agree(both experts) {
  int64_t n = moe_tensor_count(experts.t[0]), differ = 0;
  int32_t *gpu = malloc((size_t)(4 * n)), *cpu = experts.t[CPU_SIDE].data;
  moe_device *dev = both_dev[GPU_SIDE];
  both_ok(moe_device_download(dev, gpu, experts.t[GPU_SIDE].data, 4 * n), "", __FILE__, __LINE__);
  both_ok(moe_device_sync(dev), "sync", __FILE__, __LINE__);
  for (int64_t i = 0; i < n; i++) differ += cpu[i] != gpu[i];
  free(gpu);
  cr_assert(differ <= n / 10000 + 2, "%lld of %lld choices differ", (long long)differ,
            (long long)n);
}

Test(gpu_router, agrees_from_three_to_four_thousand_experts, .init = both_open,
     .fini = both_close) {
  const router_shape shapes[] = {{4096, 768, 16, 4, 1}, {4096, 768, 16, 4, 8},
                                 {510, 1000, 64, 8, 5}, {96, 300, 4096, 64, 3},
                                 {777, 129, 3, 2, 777}, {200, 64, 48, 48, 1}};
  for (int i = 0; i < 6; i++)
    for (int n = 0; n < 3; n++)
      for (int bias = 0; bias < 2; bias++) {
        router r = route(types[n], shapes[i], bias);
        AGREE(r.probs, 4e-6);
        AGREE(r.lse, 4e-6);
        choices_agree(r.experts);
        AGREE(r.gates, 1e-3); /* a swapped pair of equals costs little */
        AGREE(r.stats, 1e-4);
      }
}

Test(gpu_router, gradients_agree, .init = both_open, .fini = both_close) {
  const router_shape shapes[] = {
      {4096, 768, 16, 4, 8}, {500, 1000, 64, 8, 1}, {96, 300, 4096, 64, 3}, {2500, 8192, 32, 6, 1}};
  for (int i = 0; i < 4; i++)
    for (int n = 0; n < 3; n++) {
      router_shape q = shapes[i];
      router r = route(types[n], q, false);
      both dgates = both_random("dgates", MOE_F32, SHAPE(q.t, q.k), 1.0);
      both load = both_random("load", MOE_F32, SHAPE(q.groups, q.e), 1.0);
      both dlogits = both_output("dlogits", MOE_F32, SHAPE(q.t, q.e));
      both dx = both_random("dx", types[n], SHAPE(q.t, q.d), 1.0);
      both dweight = both_random("dweight", MOE_F32, SHAPE(q.e, q.d), 1.0);
      both_align(r.probs), both_align(r.lse), both_align(r.experts), both_align(r.gates);
      BOTH(moe_router_backward(dev, dgates.t[s], r.x.t[s], r.weight.t[s], r.probs.t[s], r.lse.t[s],
                               r.experts.t[s], r.gates.t[s], load.t[s], 0.3f, 0.1f, dlogits.t[s],
                               dx.t[s], dweight.t[s]));
      AGREE(dlogits, 4e-6);
      AGREE(dx, rounding(types[n]));
      AGREE(dweight, 4e-6);
    }
}

Test(gpu_router, drops_the_same_assignments, .init = both_open, .fini = both_close) {
  const int64_t capacities[] = {0, 1, 100, 1024, 5000};
  for (int i = 0; i < 5; i++) {
    router r = route(MOE_F32, (router_shape){4096, 64, 16, 4, 1}, false);
    both dropped = both_output("dropped", MOE_F32, SHAPE(1));
    float *p = r.probs.t[CPU_SIDE].data;
    for (int64_t j = 0; j < 4096 * 16; j++) p[j] = (float)(int)(p[j] * 64.0f) / 64.0f; /* ties */
    both_align(r.probs), both_align(r.experts), both_align(r.gates);
    BOTH(moe_router_drop(dev, r.probs.t[s], capacities[i], r.experts.t[s], r.gates.t[s],
                         dropped.t[s]));
    AGREE(r.experts, 0.0);
    AGREE(r.gates, 0.0);
    AGREE(dropped, 0.0);
  }
}

/* ---- permute ------------------------------------------------------------------------------- */

Test(gpu_permute, plans_and_moves_agree, .init = both_open, .fini = both_close) {
  const int64_t sizes[][5] = {/* R, K, e, pad, D */
                              {20000, 4, 16, 128, 768}, {3000, 3, 7, 1, 77},
                              {300000, 4, 4096, 1, 8},  {500, 8, 1, 64, 2048},
                              {31, 2, 100, 32, 12},     {40000, 1, 333, 16, 1}};
  for (int i = 0; i < 6; i++) {
    int64_t r = sizes[i][0], k = sizes[i][1], e = sizes[i][2], pad = sizes[i][3], d = sizes[i][4];
    int64_t most = r * k + e * (pad - 1), begin = most / 3, rows = most / 2;
    moe_dtype act = types[i % 3];
    both experts = both_ints("experts", SHAPE(r, k), -1, e + e / 4 + 1);
    both offsets = both_output("offsets", MOE_I32, SHAPE(e + 1));
    both window = both_output("window", MOE_I32, SHAPE(e + 1));
    both pair = both_output("pair", MOE_I32, SHAPE(most));
    both slot = both_output("slot", MOE_I32, SHAPE(r, k));
    both x = both_random("x", act, SHAPE(r, d), 1.0), y = both_random("y", act, SHAPE(r, d), 1.0);
    both gates = both_random("gates", MOE_F32, SHAPE(r, k), 1.0);
    both sorted = both_output("sorted", act, SHAPE(rows, d));
    both sorted_gates = both_output("sorted gates", MOE_F32, SHAPE(rows));
    BOTH(moe_localize_experts(dev, experts.t[s], gates.t[s], e / 4, e));
    AGREE(experts, 0.0);
    BOTH(moe_permute_plan(dev, experts.t[s], pad, offsets.t[s], pair.t[s], slot.t[s]));
    AGREE(offsets, 0.0);
    AGREE(pair, 0.0);
    AGREE(slot, 0.0);
    BOTH(moe_permute_window(dev, offsets.t[s], begin, rows, window.t[s]));
    AGREE(window, 0.0);
    BOTH(moe_gather_rows(dev, x.t[s], moe_tensor_rows(pair.t[s], begin, rows), k, sorted.t[s]));
    AGREE(sorted, 0.0);
    BOTH(moe_gather_gates(dev, gates.t[s], moe_tensor_rows(pair.t[s], begin, rows),
                          sorted_gates.t[s]));
    AGREE(sorted_gates, 0.0);
    for (int beta = 1; beta >= 0; beta--) {
      BOTH(moe_combine_rows(dev, sorted.t[s], slot.t[s], begin, beta, y.t[s]));
      AGREE(y, 0.0); /* the same order of addition */
      BOTH(moe_combine_gates(dev, sorted_gates.t[s], slot.t[s], begin, beta, gates.t[s]));
      AGREE(gates, 0.0);
    }
  }
}

/* ---- experts ------------------------------------------------------------------------------- */

enum { E = 8 };

typedef struct {
  both offsets, gates, w13, w2, x, dy, gu, a, y, again, dgates, dx, dw13, dw2;
  int64_t rows, used;
} network;

/* counts[j] rows for expert j, from multiples of `pad`; the rows between are zero, as gather_rows
 * leaves them, and those after the last are NaN. */
static network make(moe_dtype act, int64_t d, int64_t f, const int64_t *counts, int64_t pad) {
  network n = {.rows = 100};
  for (int j = 0; j < E; j++) n.rows += (counts[j] + pad - 1) / pad * pad;
  n.used = n.rows - 100;
  n.offsets = both_ints("offsets", SHAPE(E + 1), 0, 1);
  n.gates = both_random("gates", MOE_F32, SHAPE(n.rows), 0.5);
  n.x = both_random("x", act, SHAPE(n.rows, d), 1.0);
  n.dy = both_random("dy", act, SHAPE(n.rows, d), 1.0);
  int32_t *offset = n.offsets.t[CPU_SIDE].data;
  size_t row = (size_t)(d * moe_dtype_size(act));
  for (int j = 0; j < E; j++) {
    int64_t end = offset[j] + counts[j];
    offset[j + 1] = offset[j] + (int32_t)((counts[j] + pad - 1) / pad * pad);
    for (int64_t i = end; i < offset[j + 1]; i++) {
      memset((char *)n.x.t[CPU_SIDE].data + (size_t)i * row, 0, row);
      memset((char *)n.dy.t[CPU_SIDE].data + (size_t)i * row, 0, row);
      ((float *)n.gates.t[CPU_SIDE].data)[i] = 0.0f;
    }
  }
  memset((char *)n.x.t[CPU_SIDE].data + (size_t)n.used * row, 0xff, 100 * row);
  memset((char *)n.dy.t[CPU_SIDE].data + (size_t)n.used * row, 0xff, 100 * row);
  both_align(n.offsets), both_align(n.x), both_align(n.dy), both_align(n.gates);
  n.w13 = both_random("w13", act, SHAPE(E, 2, f, d), 0.04);
  n.w2 = both_random("w2", act, SHAPE(E, d, f), 0.04);
  n.gu = both_output("gu", act, SHAPE(n.rows, 2 * f));
  n.a = both_output("a", act, SHAPE(n.rows, f));
  n.again = both_output("again", act, SHAPE(n.rows, f));
  n.y = both_output("y", act, SHAPE(n.rows, d));
  n.dx = both_output("dx", act, SHAPE(n.rows, d));
  n.dgates = both_output("dgates", MOE_F32, SHAPE(n.rows));
  n.dw13 = both_output("dw13", MOE_F32, SHAPE(E, 2 * f, d));
  n.dw2 = both_output("dw2", MOE_F32, SHAPE(E, d, f));
  for (int s = 0; s < SIDES; s++) {
    int64_t bytes = moe_expert_scratch(both_dev[s], n.rows, d, f, act);
    void *data = moe_device_alloc(both_dev[s], bytes + 1);
    cr_assert(data != NULL);
    moe_device_set_scratch(both_dev[s], data, bytes); /* freed with the process */
  }
  return n;
}

/* Forward and back where a's derivatives are kept in place of g and u. */
static void check_slopes(const network *n, moe_dtype act, int64_t f, double once) {
  both slopes = both_output("slopes", act, SHAPE(n->rows, 2 * f));
  both a = both_output("a beside slopes", act, SHAPE(n->rows, f));
  both slot = both_ints("slot", SHAPE(n->used, 1), -1, n->used);
  both dgates = both_output("dgates of slots", MOE_F32, SHAPE(n->used, 1));
  BOTH(moe_expert_up(dev, n->x.t[s], n->offsets.t[s], n->w13.t[s], n->gates.t[s], MOE_GU_SLOPES,
                     slopes.t[s], a.t[s]));
  ROWS_AGREE(slopes, n->used, 2 * once);
  ROWS_AGREE(a, n->used, 2 * once);
  both_align(slopes);
  BOTH(moe_expert_down_backward(dev, n->dy.t[s], n->offsets.t[s], n->w2.t[s], n->gates.t[s],
                                MOE_GU_SLOPES, slopes.t[s], a.t[s], moe_tensor_none()));
  ROWS_AGREE(slopes, n->used, 2 * once);
  BOTH(moe_gates_backward(dev, moe_tensor_rows(n->dy.t[s], 0, n->used), n->y.t[s], slot.t[s],
                          moe_tensor_2d(n->gates.t[s].data, MOE_F32, n->used, 1), dgates.t[s]));
  AGREE(dgates, 4e-6);
}

static void check_network(moe_dtype act, int64_t d, int64_t f, const int64_t *counts, int64_t pad) {
  network n = make(act, d, f, counts, pad);
  double once = 1.5 * rounding(act), sums = act == MOE_F32 ? 4e-6 : 4e-5;
  BOTH(moe_expert_up(dev, n.x.t[s], n.offsets.t[s], n.w13.t[s], n.gates.t[s], MOE_GU_VALUES,
                     n.gu.t[s], n.a.t[s]));
  ROWS_AGREE(n.gu, n.used, once);
  ROWS_AGREE(n.a, n.used, 2 * once);
  both_align(n.gu), both_align(n.a);
  BOTH(moe_expert_down(dev, n.a.t[s], n.offsets.t[s], n.w2.t[s], n.y.t[s]));
  ROWS_AGREE(n.y, n.used, once);
  both_align(n.y);
  check_slopes(&n, act, f, once);
  BOTH(moe_expert_down_backward(dev, n.dy.t[s], n.offsets.t[s], n.w2.t[s], n.gates.t[s],
                                MOE_GU_VALUES, n.gu.t[s], n.again.t[s], n.dgates.t[s]));
  ROWS_AGREE(n.gu, n.used, 2 * once);
  ROWS_AGREE(n.again, n.used, 2 * once);
  ROWS_AGREE(n.dgates, n.used, 2 * once);
  both_align(n.gu), both_align(n.again);
  BOTH(moe_expert_up_backward(dev, n.gu.t[s], n.offsets.t[s], n.w13.t[s], n.dx.t[s]));
  ROWS_AGREE(n.dx, n.used, once);
  for (int accumulate = 0; accumulate < 2; accumulate++) {
    BOTH(moe_expert_weight_grad(dev, n.gu.t[s], n.x.t[s], n.offsets.t[s], accumulate, n.dw13.t[s],
                                both_none().t[s]));
    AGREE(n.dw13, sums);
    BOTH(moe_expert_weight_grad(dev, n.dy.t[s], n.again.t[s], n.offsets.t[s], accumulate,
                                n.dw2.t[s], both_none().t[s]));
    AGREE(n.dw2, sums);
  }
  if (act != MOE_BF16) return;
  both half = both_output("half", MOE_BF16, SHAPE(E, 2 * f, d));
  for (int accumulate = 0; accumulate < 2; accumulate++) {
    BOTH(moe_expert_weight_grad(dev, n.gu.t[s], n.x.t[s], n.offsets.t[s], accumulate, half.t[s],
                                both_none().t[s]));
    AGREE(half, (1 + accumulate) * rounding(act));
  }
}

static const int64_t uneven[E] = {0, 1, 127, 128, 129, 777, 0, 300};
static const int64_t none[E] = {0};

Test(gpu_experts, agree_on_padded_segments, .init = both_open, .fini = both_close) {
  for (int i = 0; i < 3; i++) check_network(types[i], 768, 1024, uneven, 128);
}
Test(gpu_experts, agree_on_segments_as_they_come, .init = both_open, .fini = both_close) {
  for (int i = 0; i < 3; i++) check_network(types[i], 256, 384, uneven, 1);
}
Test(gpu_experts, agree_on_awkward_sizes, .init = both_open, .fini = both_close) {
  for (int i = 0; i < 3; i++) check_network(types[i], 77, 129, uneven, 16);
}
Test(gpu_experts, agree_without_rows, .init = both_open, .fini = both_close) {
  for (int i = 0; i < 3; i++) check_network(types[i], 64, 128, none, 128);
}

/* The offsets kept on the host must not outlive what is in memory. */
Test(gpu_experts, notice_when_offsets_change, .init = both_open, .fini = both_close) {
  const int64_t first[E] = {100, 0, 0, 0, 0, 0, 0, 28}, d = 64, f = 128;
  network n = make(MOE_BF16, d, f, first, 4);
  both experts = both_ints("experts", SHAPE(n.used, 1), 0, E);
  both pair = both_output("pair", MOE_I32, SHAPE(n.used + E * 3));
  both slot = both_output("slot", MOE_I32, SHAPE(n.used, 1));
  BOTH(moe_expert_down(dev, n.a.t[s], n.offsets.t[s], n.w2.t[s], n.y.t[s]));
  BOTH(moe_permute_plan(dev, experts.t[s], 1, n.offsets.t[s], pair.t[s], slot.t[s]));
  BOTH(moe_expert_weight_grad(dev, n.x.t[s], n.dy.t[s], n.offsets.t[s], 0,
                              moe_tensor_3d(n.dw13.t[s].data, MOE_F32, E, d, d), both_none().t[s]));
  both dw = n.dw13;
  for (int s = 0; s < SIDES; s++) dw.t[s] = moe_tensor_3d(dw.t[s].data, MOE_F32, E, d, d);
  AGREE(dw, 4e-5);
}

/* ---- the same bits ------------------------------------------------------------------------- */

static uint64_t gradients_once(void) {
  router_shape q = {4096, 768, 16, 4, 4};
  router r = route(MOE_BF16, q, false);
  both dgates = both_random("dgates", MOE_F32, SHAPE(q.t, q.k), 1.0);
  both load = both_random("load", MOE_F32, SHAPE(q.groups, q.e), 1.0);
  both dlogits = both_output("dlogits", MOE_F32, SHAPE(q.t, q.e));
  both dx = both_random("dx", MOE_BF16, SHAPE(q.t, q.d), 1.0);
  both dweight = both_random("dweight", MOE_F32, SHAPE(q.e, q.d), 1.0);
  both gain = both_random("gain", MOE_F32, SHAPE(q.d), 1.0);
  both dgain = both_random("dgain", MOE_F32, SHAPE(q.d), 1.0);
  both logits = both_random("logits", MOE_BF16, SHAPE(512, 32000), 1.0);
  both targets = both_ints("targets", SHAPE(512), -1, 32000);
  both loss = both_random("loss", MOE_F64, SHAPE(2), 0.0);
  network n = make(MOE_BF16, 256, 384, uneven, 128);
  ON_GPU(moe_router_backward(dev, dgates.t[s], r.x.t[s], r.weight.t[s], r.probs.t[s], r.lse.t[s],
                             r.experts.t[s], r.gates.t[s], load.t[s], 0.3f, 0.1f, dlogits.t[s],
                             dx.t[s], dweight.t[s]));
  ON_GPU(moe_rms_norm_backward(dev, dx.t[s], r.x.t[s], gain.t[s], r.lse.t[s], dx.t[s], dgain.t[s]));
  ON_GPU(moe_cross_entropy(dev, logits.t[s], targets.t[s], 1.0f, 1, loss.t[s], both_none().t[s]));
  ON_GPU(moe_expert_up(dev, n.x.t[s], n.offsets.t[s], n.w13.t[s], n.gates.t[s], MOE_GU_VALUES,
                       n.gu.t[s], n.a.t[s]));
  ON_GPU(moe_expert_down_backward(dev, n.dy.t[s], n.offsets.t[s], n.w2.t[s], n.gates.t[s],
                                  MOE_GU_VALUES, n.gu.t[s], n.again.t[s], n.dgates.t[s]));
  ON_GPU(moe_expert_weight_grad(dev, n.gu.t[s], n.x.t[s], n.offsets.t[s], 0, n.dw13.t[s],
                                both_none().t[s]));
  both slopes = both_output("slopes", MOE_BF16, SHAPE(n.rows, 2 * 384));
  both slot = both_ints("slot", SHAPE(n.used, 1), -1, n.used);
  both row_dgates = both_output("dgates of slots", MOE_F32, SHAPE(n.used, 1));
  ON_GPU(moe_expert_up(dev, n.x.t[s], n.offsets.t[s], n.w13.t[s], n.gates.t[s], MOE_GU_SLOPES,
                       slopes.t[s], n.a.t[s]));
  ON_GPU(moe_expert_down(dev, n.a.t[s], n.offsets.t[s], n.w2.t[s], n.y.t[s]));
  ON_GPU(moe_expert_down_backward(dev, n.dy.t[s], n.offsets.t[s], n.w2.t[s], n.gates.t[s],
                                  MOE_GU_SLOPES, slopes.t[s], n.again.t[s], moe_tensor_none()));
  ON_GPU(moe_gates_backward(dev, moe_tensor_rows(n.dy.t[s], 0, n.used), n.y.t[s], slot.t[s],
                            moe_tensor_2d(n.gates.t[s].data, MOE_F32, n.used, 1), row_dgates.t[s]));
  const both outputs[] = {r.stats, r.gates, dlogits,  dx,     dweight, dgain,
                          logits,  loss,    n.dgates, n.dw13, slopes,  row_dgates};
  uint64_t hash = 0;
  for (size_t i = 0; i < sizeof outputs / sizeof *outputs; i++)
    hash = hash * 31 + both_hash(outputs[i]);
  return hash;
}

Test(gpu_determinism, gives_the_same_bits_every_time, .init = both_open, .fini = both_close) {
  uint64_t first = gradients_once();
  for (int i = 0; i < 3; i++) cr_assert_eq(gradients_once(), first, "run %d differs", i + 2);
}
