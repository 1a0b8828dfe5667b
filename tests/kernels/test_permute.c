/* The sort by expert and the moves into and out of it, exactly: small integers and copies. */
#include <criterion/criterion.h>

#include "core/base/integers.h"
#include "tests/support/op_check.h"

typedef struct {
  int64_t r, k, e, pad;
  op_tensor experts, offsets, pair, slot;
  double *want_offsets, *want_pair, *want_slot;
} plan;

/* The plan by its definition: for each expert, its pairs in order, then padding. */
static void reference(plan *p) {
  int64_t row = 0, pairs = p->r * p->k;
  for (int64_t i = 0; i < p->pair.count; i++) p->want_pair[i] = -1.0;
  for (int64_t i = 0; i < pairs; i++) p->want_slot[i] = -1.0;
  for (int64_t j = 0; j < p->e; j++) {
    p->want_offsets[j] = (double)row;
    for (int64_t i = 0; i < pairs; i++) {
      if (p->experts.v[i] != (double)j) continue;
      p->want_slot[i] = (double)row;
      p->want_pair[row++] = (double)i;
    }
    row = moe_round_up64(row, p->pad);
  }
  p->want_offsets[p->e] = (double)row;
}

static plan make(moe_device *dev, int64_t r, int64_t k, int64_t e, int64_t pad,
                 const int32_t *experts, int64_t spare) {
  int64_t most = r * (k < e ? k : e) + e * (pad - 1) + spare;
  plan p = {.r = r, .k = k, .e = e, .pad = pad};
  p.experts = op_ints(dev, "experts", OP_SHAPE(r, k), experts);
  p.offsets = op_output(dev, "offsets", MOE_I32, OP_SHAPE(e + 1));
  p.pair = op_output(dev, "pair", MOE_I32, OP_SHAPE(most));
  p.slot = op_output(dev, "slot", MOE_I32, OP_SHAPE(r, k));
  p.want_offsets = op_doubles(e + 1);
  p.want_pair = op_doubles(most);
  p.want_slot = op_doubles(r * k);
  reference(&p);
  op_ok(moe_permute_plan(dev, p.experts.t, pad, p.offsets.t, p.pair.t, p.slot.t));
  return p;
}

static void check(plan *p) {
  op_equal(p->offsets, p->want_offsets);
  op_equal(p->pair, p->want_pair);
  op_equal(p->slot, p->want_slot);
}

/* k different experts per row, out of `among`, numbered from `first` on. */
static int32_t *draw(int64_t r, int64_t k, int64_t among, int32_t first) {
  int32_t *experts = op_int32s(r * k);
  for (int64_t t = 0; t < r; t++) {
    int64_t start = op_pick("start", t, among), step = 1 + op_pick("step", t, 2) * (among - 2);
    for (int64_t i = 0; i < k; i++)
      experts[t * k + i] = first + (int32_t)((start + i * step) % among);
  }
  return experts;
}

/* ---- plan ------------------------------------------------------------------------------------ */

static void plans(moe_device *dev) {
  const int64_t pads[] = {1, 4, 128};
  for (size_t i = 0; i < 3; i++) {
    plan mine = make(dev, 37, 3, 7, pads[i], draw(37, 3, 7, 0), 0);
    check(&mine);
    plan others = make(dev, 100, 4, 5, pads[i], draw(100, 4, 16, -6), 13);
    check(&others);
    plan one_row = make(dev, 1, 1, 1, pads[i], draw(1, 1, 1, 0), 0);
    check(&one_row);
    plan many = make(dev, 3000, 4, 16, pads[i], draw(3000, 4, 16, 0), 0);
    check(&many);
  }
}
Test(permute, sorts_pairs_stably_and_pads_each_expert) {
  op_each_device(plans);
}

static void crowded(moe_device *dev) {
  int32_t *experts = op_int32s(300);
  for (int64_t i = 0; i < 300; i++) experts[i] = i % 3 == 0 ? 2 : -1;
  plan p = make(dev, 100, 3, 4, 16, experts, 0);
  check(&p);
  for (int64_t i = 0; i < 300; i++) experts[i] = i % 2 == 0 ? -1 : 4;
  plan none = make(dev, 100, 3, 4, 16, experts, 0);
  check(&none);
  plan no_rows = make(dev, 0, 3, 4, 16, experts, 5);
  check(&no_rows);
}
Test(permute, takes_one_expert_for_all_and_nothing_at_all) {
  op_each_device(crowded);
}

static void windows(moe_device *dev) {
  const int32_t offsets[] = {0, 4, 4, 12, 20};
  const double want[4][5] = {{0, 4, 4, 12, 20}, {0, 0, 0, 8, 10}, {0, 0, 0, 0, 0}, {0, 1, 1, 5, 5}};
  const int64_t begin[] = {0, 4, 20, 3}, rows[] = {100, 10, 4, 5};
  op_tensor x = op_ints(dev, "offsets", OP_SHAPE(5), offsets);
  for (int i = 0; i < 4; i++) {
    op_tensor out = op_output(dev, "out", MOE_I32, OP_SHAPE(5));
    op_ok(moe_permute_window(dev, x.t, begin[i], rows[i], out.t));
    op_equal(out, want[i]);
  }
}
Test(permute, cuts_offsets_to_a_window) {
  op_each_device(windows);
}

/* ---- moves ----------------------------------------------------------------------------------- */

enum { R = 41, K = 3, E = 5, WIDTH = 523 };

static void gather(moe_device *dev, moe_dtype act) {
  plan p = make(dev, R, K, E, 8, draw(R, K, 9, 0), 6);
  op_tensor src = op_random(dev, "src", act, OP_SHAPE(R, WIDTH), 1.0);
  op_tensor gates = op_random(dev, "gates", MOE_F32, OP_SHAPE(R, K), 1.0);
  op_tensor out = op_output(dev, "out", act, OP_SHAPE(p.pair.count, WIDTH));
  op_tensor sorted = op_output(dev, "sorted gates", MOE_F32, OP_SHAPE(p.pair.count));
  op_ok(moe_gather_rows(dev, src.t, p.pair.t, K, out.t));
  op_ok(moe_gather_gates(dev, gates.t, p.pair.t, sorted.t));
  double *want = op_doubles(out.count), *want_gates = op_doubles(sorted.count);
  for (int64_t i = 0; i < p.pair.count; i++) {
    int64_t from = (int64_t)p.want_pair[i];
    if (from < 0) continue;
    want_gates[i] = gates.v[from];
    for (int64_t c = 0; c < WIDTH; c++) want[i * WIDTH + c] = src.v[from / K * WIDTH + c];
  }
  op_equal(out, want);
  op_equal(sorted, want_gates);
}
Test(permute, gathers_rows_and_gates_and_zeroes_padding) {
  op_each(gather);
}

/* Two windows of the sorted buffer, one after the other, as rounds of an exchange do. */
static void combine(moe_device *dev, moe_dtype act) {
  plan p = make(dev, R, K, E, 8, draw(R, K, 9, 0), 6);
  int64_t rows = p.pair.count, split = 24;
  op_tensor src = op_output(dev, "src", act, OP_SHAPE(rows, WIDTH));
  op_tensor gates = op_random(dev, "sorted gates", MOE_F32, OP_SHAPE(rows), 1.0);
  op_tensor values = op_random(dev, "values", act, OP_SHAPE(rows, WIDTH), 1.0);
  for (int64_t i = 0; i < src.count; i++) /* padding stays NaN: it must not be read */
    if (p.want_pair[i / WIDTH] >= 0.0) src.v[i] = values.v[i];
  src = op_values(dev, "src", act, OP_SHAPE(rows, WIDTH), src.v);
  op_tensor out = op_output(dev, "out", act, OP_SHAPE(R, WIDTH));
  op_tensor back = op_output(dev, "gates back", MOE_F32, OP_SHAPE(R, K));
  double *want = op_doubles(R * WIDTH), *want_back = op_doubles(R * K);
  for (int round = 0; round < 2; round++) {
    int64_t begin = round * split, end = round ? rows : split;
    moe_tensor part = moe_tensor_rows(src.t, begin, end - begin);
    moe_tensor gate_part = moe_tensor_rows(gates.t, begin, end - begin);
    op_ok(moe_combine_rows(dev, part, p.slot.t, begin, round, out.t));
    op_ok(moe_combine_gates(dev, gate_part, p.slot.t, begin, round, back.t));
    for (int64_t i = 0; i < R * K; i++) {
      int64_t at = (int64_t)p.want_slot[i];
      if (at < begin || at >= end) continue;
      want_back[i] = gates.v[at];
      for (int64_t c = 0; c < WIDTH; c++) want[i / K * WIDTH + c] += src.v[at * WIDTH + c];
    }
    op_close(out, want, 2.0 * op_tolerance(act));
    op_equal(back, want_back);
  }
}
Test(permute, combines_windows_without_reading_padding) {
  op_each(combine);
}

static void round_trip(moe_device *dev, moe_dtype act) {
  plan p = make(dev, R, 1, E, 4, draw(R, 1, E, 0), 0);
  op_tensor src = op_random(dev, "src", act, OP_SHAPE(R, WIDTH), 1.0);
  op_tensor sorted = op_output(dev, "sorted", act, OP_SHAPE(p.pair.count, WIDTH));
  op_tensor back = op_output(dev, "back", act, OP_SHAPE(R, WIDTH));
  op_ok(moe_gather_rows(dev, src.t, p.pair.t, 1, sorted.t));
  op_ok(moe_combine_rows(dev, sorted.t, p.slot.t, 0, 0, back.t));
  op_equal(back, src.v);
}
Test(permute, returns_every_row_to_its_place) {
  op_each(round_trip);
}
