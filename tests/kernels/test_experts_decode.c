/* The experts of a few tokens against float64; and of few or many tokens, that it makes no
 * difference to the bits which experts are here. */
#include <criterion/criterion.h>
#include <math.h>

#include "tests/support/op_check.h"

typedef struct {
  int64_t t, k, e, d, f;
  int skip; /* about one choice in `skip` is -1; 0: none */
} shape;

typedef struct {
  shape s;
  op_tensor x, experts, gates, w13, w2, hidden, out;
} setup;

/* K different experts per token, some of them taken out. */
static int32_t *choices(shape s) {
  int32_t *list = op_int32s(s.t * s.k);
  for (int64_t i = 0; i < s.t * s.k; i++) {
    int64_t first = op_pick("first", i / s.k, s.e), step = i % s.k;
    list[i] = (int32_t)((first + step) % s.e);
    if (s.skip > 0 && op_pick("skip", i, s.skip) == 0) list[i] = -1;
  }
  return list;
}

static setup make(moe_device *dev, moe_dtype act, shape s) {
  setup u = {.s = s};
  u.x = op_random(dev, "x", act, OP_SHAPE(s.t, s.d), 1.0);
  u.experts = op_ints(dev, "experts", OP_SHAPE(s.t, s.k), choices(s));
  u.gates = op_random(dev, "gates", MOE_F32, OP_SHAPE(s.t, s.k), 0.5);
  u.w13 = op_random(dev, "w13", act, OP_SHAPE(s.e, 2 * s.f, s.d), 1.0 / sqrt((double)s.d));
  u.w2 = op_random(dev, "w2", act, OP_SHAPE(s.e, s.d, s.f), 1.0 / sqrt((double)s.f));
  u.hidden = op_output(dev, "hidden", act, OP_SHAPE(s.t * s.k, s.f));
  u.out = op_output(dev, "out", act, OP_SHAPE(s.t, s.d));
  return u;
}

static void run(moe_device *dev, setup *u) {
  op_ok(moe_experts_decode(dev, u->x.t, u->experts.t, u->gates.t, 0, u->w13.t, u->w2.t, u->hidden.t,
                           u->out.t));
}

/* One pair's part of out; the hidden activation is rounded once, as it is stored. */
static void add_pair(const setup *u, moe_dtype act, int64_t pair, double *hidden, double *out) {
  shape s = u->s;
  int64_t e = (int64_t)u->experts.v[pair];
  const double *x = u->x.v + pair / s.k * s.d, *w1 = u->w13.v + e * 2 * s.f * s.d;
  for (int64_t i = 0; i < s.f; i++) {
    double g = op_dot(w1 + i * s.d, x, s.d), v = op_dot(w1 + (s.f + i) * s.d, x, s.d);
    hidden[i] = op_round(act, u->gates.v[pair] * g / (1.0 + exp(-g)) * v);
  }
  for (int64_t c = 0; c < s.d; c++) out[c] += op_dot(u->w2.v + (e * s.d + c) * s.f, hidden, s.f);
}

static void check(moe_device *dev, moe_dtype act, shape s) {
  setup u = make(dev, act, s);
  double *want = op_doubles(s.t * s.d), *hidden = op_doubles(s.f);
  for (int64_t pair = 0; pair < s.t * s.k; pair++)
    if (u.experts.v[pair] >= 0.0) add_pair(&u, act, pair, hidden, want + pair / s.k * s.d);
  run(dev, &u);
  op_close(u.out, want, 2.0 * op_tolerance(act));
}

/* ---- tests ----------------------------------------------------------------------------------- */

static void few_tokens(moe_device *dev, moe_dtype act) {
  const shape list[] = {{1, 4, 16, 96, 128, 0}, {1, 1, 1, 8, 8, 0},   {2, 2, 3, 20, 36, 0},
                        {3, 4, 8, 768, 72, 0},  {7, 3, 5, 33, 17, 0}, {8, 4, 16, 64, 264, 0},
                        {1, 2, 4, 520, 1032, 0}};
  for (size_t i = 0; i < sizeof list / sizeof *list; i++) check(dev, act, list[i]);
}
Test(experts_decode, sums_the_chosen_experts_of_few_tokens) {
  op_each(few_tokens);
}

static void more_tokens(moe_device *dev, moe_dtype act) {
  const shape list[] = {{9, 2, 4, 64, 80, 0},
                        {32, 4, 16, 64, 96, 0},
                        {33, 2, 3, 40, 56, 0},
                        {100, 4, 8, 32, 48, 0},
                        {70, 1, 1, 16, 24, 0}}; /* all to one expert */
  for (size_t i = 0; i < sizeof list / sizeof *list; i++) check(dev, act, list[i]);
}
Test(experts_decode, takes_many_tokens_in_passes) {
  op_each(more_tokens);
}

static void skips(moe_device *dev, moe_dtype act) {
  const shape list[] = {{3, 4, 8, 32, 40, 2},
                        {40, 4, 8, 32, 40, 3},
                        {1, 1, 4, 8, 16, 1},
                        {12, 2, 4, 24, 16, 1}}; /* skip 1: nobody is chosen, out is zero */
  for (size_t i = 0; i < sizeof list / sizeof *list; i++) check(dev, act, list[i]);
}
Test(experts_decode, skips_choices_of_minus_one_and_writes_zeros_for_none) {
  op_each(skips);
}

/* A number that names no expert is skipped too, never followed. */
static void strangers(moe_device *dev, moe_dtype act) {
  shape s = {2, 2, 4, 16, 24, 0};
  setup u = make(dev, act, s);
  u.experts = op_ints(dev, "experts", OP_SHAPE(2, 2), (int32_t[]){1, 4, 1 << 30, -7});
  double *want = op_doubles(s.t * s.d), *hidden = op_doubles(s.f);
  add_pair(&u, act, 0, hidden, want);
  run(dev, &u);
  op_close(u.out, want, 2.0 * op_tolerance(act));
}
Test(experts_decode, skips_numbers_that_name_no_expert) {
  op_each(strangers);
}

/* ---- terms ----------------------------------------------------------------------------------- */

/* Some of the experts, as a rank has them, and the terms they make. */
typedef struct {
  int64_t begin, count;
  moe_tensor w13, w2;
  op_tensor terms;
} share;

static share share_of(moe_device *dev, const setup *u, int64_t begin, int64_t count,
                      moe_dtype terms) {
  share h = {.begin = begin, .count = count};
  h.terms = op_output(dev, "terms", terms, OP_SHAPE(u->s.t * u->s.k, u->s.d));
  h.w13 = moe_tensor_rows(u->w13.t, begin, count);
  h.w2 = moe_tensor_rows(u->w2.t, begin, count);
  return h;
}

static void few_terms(moe_device *dev, setup *u, share *h) {
  op_ok(moe_experts_decode(dev, u->x.t, u->experts.t, u->gates.t, h->begin, h->w13, h->w2,
                           u->hidden.t, h->terms.t));
}

/* The same by sorting, as training does it, in segments as GPUs want them. */
static void sorted_terms(moe_device *dev, setup *u, share *h) {
  shape s = u->s;
  moe_dtype act = u->x.t.dtype;
  int64_t pad = 128, most = s.t * s.k + h->count * pad;
  op_tensor experts = op_clone(dev, u->experts), all_gates = op_clone(dev, u->gates);
  op_tensor offsets = op_output(dev, "offsets", MOE_I32, OP_SHAPE(h->count + 1));
  op_tensor pair = op_output(dev, "pair", MOE_I32, OP_SHAPE(most));
  op_tensor slot = op_output(dev, "slot", MOE_I32, OP_SHAPE(s.t, s.k));
  op_tensor rows = op_output(dev, "rows", act, OP_SHAPE(most, s.d));
  op_tensor gates = op_output(dev, "sorted gates", MOE_F32, OP_SHAPE(most));
  op_tensor gu = op_output(dev, "gu", act, OP_SHAPE(most, 2 * s.f));
  op_tensor a = op_output(dev, "a", act, OP_SHAPE(most, s.f));
  op_tensor y = op_output(dev, "y", act, OP_SHAPE(most, s.d));
  op_scratch(dev, moe_expert_scratch(dev, most, s.d, s.f, act));
  op_ok(moe_localize_experts(dev, experts.t, all_gates.t, h->begin, h->count));
  op_ok(moe_permute_plan(dev, experts.t, pad, offsets.t, pair.t, slot.t));
  op_ok(moe_gather_rows(dev, u->x.t, pair.t, s.k, rows.t));
  op_ok(moe_gather_gates(dev, all_gates.t, pair.t, gates.t));
  op_ok(moe_expert_up(dev, rows.t, offsets.t, h->w13, gates.t, MOE_GU_VALUES, gu.t, a.t));
  op_ok(moe_expert_down(dev, a.t, offsets.t, h->w2, y.t));
  op_ok(moe_gather_rows(dev, y.t, moe_tensor_1d(slot.t.data, MOE_I32, s.t * s.k), 1, h->terms.t));
  op_ok(moe_combine_rows(dev, y.t, slot.t, 0, 0, u->out.t));
}

static void sorted(moe_device *dev, moe_dtype act) {
  setup u = make(dev, act, (shape){24, 4, 16, 64, 96, 0});
  share all = share_of(dev, &u, 0, u.s.e, act);
  sorted_terms(dev, &u, &all);
  op_read(&u.out);
  op_tensor want = u.out;
  u.out = op_output(dev, "out", act, OP_SHAPE(u.s.t, u.s.d));
  run(dev, &u);
  op_close(u.out, want.v, 4.0 * op_tolerance(act));
}
Test(experts_decode, agrees_with_sorted_expert_products) {
  op_each(sorted);
}

typedef void term_maker(moe_device *, setup *, share *);

/* Experts [0, cut) on one rank and the others on another: the terms add up to one rank's, and their
 * sums to its output, bit for bit. */
static void cut_in_two(moe_device *dev, moe_dtype act, shape s, int64_t cut, moe_dtype terms,
                       term_maker *make_terms) {
  setup u = make(dev, act, s);
  share all = share_of(dev, &u, 0, s.e, terms), left = share_of(dev, &u, 0, cut, terms);
  share right = share_of(dev, &u, cut, s.e - cut, terms);
  make_terms(dev, &u, &left);
  make_terms(dev, &u, &right);
  make_terms(dev, &u, &all);
  if (make_terms == few_terms) run(dev, &u); /* the other has left the sums in out */
  op_ok(moe_add(dev, left.terms.t, right.terms.t));
  op_read(&all.terms);
  op_equal(left.terms, all.terms.v);
  op_tensor sums = op_output(dev, "sums", act, OP_SHAPE(s.t, s.d));
  op_ok(moe_sum_choices(dev, left.terms.t, sums.t));
  op_read(&u.out);
  op_equal(sums, u.out.v);
}

/* Each shape after a quarter, a half and three quarters of its experts. */
static void cut_all(moe_device *dev, moe_dtype act, const shape *list, size_t n, moe_dtype terms,
                    term_maker *make_terms) {
  for (size_t i = 0; i < n; i++)
    for (int64_t part = 1; part < 4; part++)
      cut_in_two(dev, act, list[i], (list[i].e * part + 2) / 4, terms, make_terms);
}

static void cuts_few(moe_device *dev, moe_dtype act) {
  const shape list[] = {{1, 4, 16, 96, 1000, 0}, {3, 4, 8, 768, 72, 0},  {7, 3, 5, 33, 17, 0},
                        {8, 2, 6, 64, 264, 3},   {40, 5, 9, 40, 136, 0}, {33, 1, 4, 24, 16, 0},
                        {2, 12, 12, 64, 520, 0}, {1, 40, 64, 32, 48, 0}};
  cut_all(dev, act, list, sizeof list / sizeof *list, MOE_F32, few_terms);
}
Test(experts_decode, makes_the_same_terms_wherever_the_experts_are) {
  op_each(cuts_few);
}

static void cuts_sorted(moe_device *dev, moe_dtype act) {
  const shape list[] = {{200, 4, 8, 64, 128, 0}, {140, 2, 5, 40, 56, 0}, {300, 1, 3, 128, 192, 0}};
  cut_all(dev, act, list, sizeof list / sizeof *list, act, sorted_terms);
}
Test(experts_decode, makes_the_same_sorted_terms_wherever_the_experts_are) {
  op_each(cuts_sorted);
}

static void sums(moe_device *dev, moe_dtype act) {
  const int64_t sizes[][3] = {{1, 4, 768}, {5, 3, 33}, {70, 1, 8}, {3, 40, 1000}, {2, 0, 8}};
  for (int i = 0; i < 5; i++)
    for (int wide = 0; wide < 2; wide++) {
      int64_t t = sizes[i][0], k = sizes[i][1], d = sizes[i][2];
      op_tensor terms = op_random(dev, "terms", wide ? MOE_F32 : act, OP_SHAPE(t * k, d), 1000.0);
      op_tensor out = op_output(dev, "out", act, OP_SHAPE(t, d));
      double *want = op_doubles(t * d);
      for (int64_t j = 0; j < t * d; j++) {
        float sum = 0.0f;
        for (int64_t n = 0; n < k; n++) sum += (float)terms.v[(j / d * k + n) * d + j % d];
        want[j] = op_round(act, (double)sum);
      }
      op_ok(moe_sum_choices(dev, terms.t, out.t));
      op_equal(out, want);
    }
}
Test(experts_decode, sums_terms_in_float_in_the_order_of_choices_and_rounds_once) {
  op_each(sums);
}

/* ---- bits and refusals ----------------------------------------------------------------------- */

static void twice(moe_device *dev, moe_dtype act) {
  for (int64_t t = 1; t <= 17; t += 8) {
    setup u = make(dev, act, (shape){t, 4, 8, 96, 520, 0});
    run(dev, &u);
    op_tensor out = op_clone(dev, u.out);
    run(dev, &u);
    op_equal(u.out, out.v);
  }
}
Test(experts_decode, gives_the_same_bits_again) {
  op_each(twice);
}

static void any_threads(moe_device *dev) {
  check(dev, MOE_F32, (shape){5, 2, 4, 40, 72, 0});
  check(dev, MOE_BF16, (shape){40, 2, 4, 40, 72, 4});
}
Test(experts_decode, shares_work_among_any_number_of_threads) {
  for (int threads = 1; threads <= 4; threads++) op_with_threads(threads, any_threads);
}

static void refusals(moe_device *dev) {
  static float block[64];
  moe_tensor x = moe_tensor_2d(block, MOE_F32, 2, 4), pairs = moe_tensor_2d(block, MOE_F32, 2, 1);
  moe_tensor experts = moe_tensor_2d(block, MOE_I32, 2, 1);
  moe_tensor w13 = moe_tensor_3d(block, MOE_F32, 1, 6, 4),
             hidden = moe_tensor_2d(block, MOE_F32, 2, 3);
  moe_tensor w2 = moe_tensor_3d(block, MOE_F32, 1, 4, 3),
             wide = moe_tensor_3d(block, MOE_F32, 1, 4, 5);
  op_refuses(MOE_INVALID, "experts_decode: w2 is fp32 [1, 4, 5]: it must be fp32 [1, 4, 3]",
             moe_experts_decode(dev, x, experts, pairs, 0, w13, wide, hidden, x));
  op_refuses(MOE_INVALID, "hidden is fp32 [2, 4]: it must be fp32 [2, 3]",
             moe_experts_decode(dev, x, experts, pairs, 0, w13, w2, x, x));
  op_refuses(MOE_INVALID, "experts is fp32",
             moe_experts_decode(dev, x, pairs, pairs, 0, w13, w2, hidden, x));
  op_refuses(MOE_INVALID, "first must be the number of an expert",
             moe_experts_decode(dev, x, experts, pairs, -1, w13, w2, hidden, x));
  op_refuses(MOE_INVALID, "out is fp32 [2, 3]: it must be fp32 [2, 4]",
             moe_experts_decode(dev, x, experts, pairs, 0, w13, w2, hidden, hidden));
  op_refuses(MOE_INVALID, "sum_choices: terms is bf16 [2, 4]: it must be fp32",
             moe_sum_choices(dev, moe_tensor_2d(block, MOE_BF16, 2, 4), x));
  op_refuses(MOE_INVALID, "the rows of terms must be a multiple of the rows of out",
             moe_sum_choices(dev, moe_tensor_2d(block, MOE_F32, 3, 4), x));
}
Test(experts_decode, refuses_wrong_operands) {
  op_each_device(refusals);
}
